from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gracec import ir
from gracec.errors import PassError
from gracec.ir.program import Program
from gracec.passes import PassResult
from gracec.passes.strip import Strip

Golden = Callable[..., None]
After = Callable[[str], Program]
TAPPED = "analyze-modality,insert-taps"
PIPELINE = f"{TAPPED},strip"


def test_golden(after: After, golden: Golden) -> None:
    text = ir.diff(after(TAPPED), after(PIPELINE)) + "\n"
    golden("strip/llava.txt", text, made_by=Strip(), after=TAPPED)


def test_numerics_are_kept_bit_for_bit(
    captured: Program, after: After, batch: dict[str, Tensor]
) -> None:
    (logits,) = after(PIPELINE)(**batch)
    assert torch.equal(logits, captured(**batch)[0])


def test_what_the_logits_do_not_need_is_gone(captured: Program, after: After) -> None:
    names = {name for names in after(PIPELINE).fqns.values() for name in names}
    assert not any("vision_tower.encoder.layers.1" in name for name in names)
    assert not any("post_layernorm" in name for name in names)
    assert any("vision_tower.encoder.layers.1" in n for ns in captured.fqns.values() for n in ns)
    left = dict(after(PIPELINE).graph_module.named_parameters())
    assert not any("vision_tower.encoder.layers.1" in name for name in left)


def test_idempotent(after: After) -> None:
    assert not Strip().run(after(PIPELINE)).modified


def test_refusal(after: After) -> None:
    program = after("analyze-modality").copy()
    program.set_outputs({"scores": program.outputs["logits"]})
    with pytest.raises(PassError, match="there is no output named 'logits'"):
        Strip().run(program)


def test_an_output_or_a_node_that_is_left_is_an_error(
    after: After, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Strip, "apply", lambda self, program: PassResult(program, False))
    with pytest.raises(PassError, match=r"the outputs are \('logits', 'hidden'\)"):
        Strip().run(after(TAPPED))
    with pytest.raises(PassError, match=r"aten\.\S+ is left and used by nothing"):
        Strip().run(with_a_dead_node(after("strip")))


def with_a_dead_node(program: Program) -> Program:
    copied = program.copy()
    logits = copied.outputs["logits"]
    with copied.graph.inserting_after(logits):
        dead = copied.graph.call_function(torch.ops.aten.neg.default, (logits,))
    dead.meta = dict(logits.meta)
    return copied

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gracec import ir
from gracec.errors import PassError
from gracec.ir.program import Program, annotation
from gracec.passes import PassResult
from gracec.passes.insert_taps import InsertTaps

Golden = Callable[..., None]
After = Callable[[str], Program]
PIPELINE = "analyze-modality,insert-taps"


def test_golden(after: After, golden: Golden) -> None:
    before = "analyze-modality"
    text = ir.diff(after(before), after(PIPELINE)) + "\n"
    golden("insert-taps/llava.txt", text, made_by=InsertTaps(), after=before)


def test_outputs_are_the_logits_and_the_models_hidden_state(
    after: After, llava: torch.nn.Module, batch: dict[str, Tensor]
) -> None:
    program = after(PIPELINE)
    assert program.output_names == ("logits", "hidden")
    with torch.no_grad():
        logits, hidden = program(**batch)
        expected = llava(**batch, output_hidden_states=True, use_cache=False)
    assert torch.equal(logits, expected.logits)
    assert torch.equal(hidden, expected.hidden_states[-2])


def test_gradients_flow_through_both_outputs(after: After, batch: dict[str, Tensor]) -> None:
    program = after(PIPELINE).copy()
    logits, hidden = program(**batch)
    first = program.tensor("model.model.language_model.layers.0.self_attn.q_proj.weight")
    last = program.tensor("model.model.language_model.layers.1.mlp.down_proj.weight")
    grads = torch.autograd.grad(hidden.square().sum(), (first, last), allow_unused=True)
    assert grads[0].abs().sum() > 0
    assert grads[1] is None
    assert torch.autograd.grad(logits.square().sum(), last)[0].abs().sum() > 0


def test_idempotent_and_the_tap_can_be_moved(after: After) -> None:
    assert not InsertTaps().run(after(PIPELINE)).modified
    moved = InsertTaps(block=-1).run(after(PIPELINE)).program
    assert moved.output_names == ("logits", "hidden")
    tapped = [annotation(node)["block"] for node in moved.nodes(tap="hidden")]
    assert tapped == [1]


def test_it_survives_reexport(after: After, batch: dict[str, Tensor]) -> None:
    again = after(PIPELINE).reexport().module()
    with torch.no_grad():
        found = again(**batch)
        expected = after(PIPELINE)(**batch)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_refusals(captured: Program, after: After) -> None:
    with pytest.raises(PassError, match="no decoder block is known; run analyze-modality first"):
        InsertTaps().run(captured)
    with pytest.raises(PassError, match="there is no block -3, the decoder has 2"):
        InsertTaps(block=-3).run(after("analyze-modality"))


def test_a_block_that_is_not_returned_is_an_error(
    after: After, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InsertTaps, "apply", lambda self, program: PassResult(program, False))
    with pytest.raises(PassError, match="insert-taps: the tapped block is not returned"):
        InsertTaps().run(after("analyze-modality"))

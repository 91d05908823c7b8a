from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gracec import ir
from gracec.errors import PassError
from gracec.ir.program import Program
from gracec.passes.apply_codes import ApplyCodes
from gracec.passes.freeze import QUANTIZE_DEQUANTIZE, frozen_activations, frozen_weights
from tests.goldens import ONE_BLOCK

Golden = Callable[..., None]
After = Callable[[str], Program]
FROZEN = "analyze-modality,plan-quantization,insert-fake-quant,freeze"


def observed(recipe: str) -> str:
    plan = f"analyze-modality,plan-quantization{{recipe={recipe}}}"
    return f"{plan},insert-observers,insert-fake-quant,freeze"


@pytest.mark.parametrize(
    ("name", "frozen"),
    [
        ("llava", FROZEN),
        ("llava-w8a8", observed("w8a8")),
        ("llava-w4a8", observed("w4a8")),
    ],
)
def test_golden(
    captured_block: Program, after_block: After, golden: Golden, name: str, frozen: str
) -> None:
    item = ApplyCodes(frozen_weights(after_block(frozen)))
    text = ir.diff(captured_block, item.run(captured_block).program) + "\n"
    made_by = f"{item} with the codes of {frozen}"
    golden(f"apply-codes/{name}.txt", text, made_by=made_by, model=ONE_BLOCK)


def test_another_capture_computes_what_the_frozen_graph_does(
    captured: Program, after: After, batch: dict[str, Tensor]
) -> None:
    weights = frozen_weights(after(FROZEN))
    applied = ApplyCodes(weights).run(captured)
    assert torch.equal(applied.program(**batch)[0], after(FROZEN)(**batch)[0])
    assert not ApplyCodes(weights).run(applied.program).modified


@pytest.mark.parametrize(("recipe", "activations"), [("w8a8", 6), ("w4a8", 8)])
def test_inputs_are_rounded_as_in_the_frozen_graph(
    captured: Program,
    after: After,
    batch: dict[str, Tensor],
    recipe: str,
    activations: int,
) -> None:
    frozen = after(observed(recipe))
    weights = frozen_weights(frozen)
    assert all(weight.activation is not None for weight in weights.values())
    applied = ApplyCodes(weights).run(captured).program
    assert torch.equal(applied(**batch)[0], frozen(**batch)[0])
    assert len(list(applied.nodes(QUANTIZE_DEQUANTIZE))) == activations
    found = frozen_activations(applied)
    assert found.keys() == weights.keys()
    for fqn, weight in weights.items():
        assert weight.activation is not None and weight.activation.equals(found[fqn])


def test_codes_of_another_model_are_refused(captured: Program, after: After) -> None:
    weights = frozen_weights(after(FROZEN))
    renamed = {fqn.replace("layers.1", "layers.9"): weight for fqn, weight in weights.items()}
    with pytest.raises(PassError, match=r"layers\.9.*the codes belong to another model"):
        ApplyCodes(renamed).run(captured)


def test_no_codes_are_refused(captured: Program) -> None:
    with pytest.raises(PassError, match="no codes to apply"):
        ApplyCodes({}).run(captured)

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gracec import ir
from gracec.errors import PassError
from gracec.ir.program import Program
from gracec.passes import PassResult
from gracec.passes.select_supervised import SelectSupervised
from tests.tiny import VOCAB_SIZE

Golden = Callable[..., None]
After = Callable[[str], Program]
MLP_TENSORS = 4  # gate, up, silu and their product, in each of the two blocks
PIPELINE = "analyze-modality,select-supervised"


def test_golden(after: After, golden: Golden) -> None:
    text = ir.diff(after("analyze-modality"), after(PIPELINE))
    made_by, before = SelectSupervised(), "analyze-modality"
    golden("select-supervised/llava.txt", text + "\n", made_by=made_by, after=before)


@pytest.mark.parametrize("positions", [[5], [0, 7, 20, 33], list(range(3, 41))])
def test_selected_logits_are_rows_of_all_logits(
    captured: Program, after: After, batch: dict[str, Tensor], positions: list[int]
) -> None:
    with torch.no_grad():
        everywhere = captured(**batch)[0].flatten(0, 1)
        selected = after(PIPELINE)(**batch, supervised_index=torch.tensor(positions))[0]
    assert selected.shape == (len(positions), everywhere.shape[1])
    torch.testing.assert_close(selected, everywhere[positions], rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same(captured: Program, after: After, batch: dict[str, Tensor]) -> None:
    index = torch.tensor([4, 9, 30])
    weight = captured.tensor("model.model.language_model.layers.0.mlp.up_proj.weight")
    everywhere = captured(**batch)[0].flatten(0, 1)[index]
    selected = after(PIPELINE)(**batch, supervised_index=index)[0]
    expected = torch.autograd.grad(everywhere.square().sum(), weight)[0]
    found = torch.autograd.grad(selected.square().sum(), weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_tensor_of_all_logits_is_left(captured: Program, after: After) -> None:
    def all_logits(program: Program) -> list[str]:
        values = [(node.name, node.meta.get("val")) for node in program.graph.nodes]
        return [
            name
            for name, value in values
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[-1] == VOCAB_SIZE
        ]

    assert len(all_logits(captured)) == 1 + 2 * MLP_TENSORS  # the MLP is as wide as the vocabulary
    assert len(all_logits(after(PIPELINE))) == 2 * MLP_TENSORS


def test_idempotent_and_it_survives_reexport(after: After, batch: dict[str, Tensor]) -> None:
    assert not SelectSupervised().run(after(PIPELINE)).modified
    index = torch.tensor([1, 2, 3, 40])
    again = after(PIPELINE).reexport().module()
    with torch.no_grad():
        expected = after(PIPELINE)(**batch, supervised_index=index)[0]
        assert torch.equal(again(**batch, supervised_index=index), expected)


def test_refusals(captured: Program, after: After) -> None:
    with pytest.raises(PassError, match="the head is unknown; run analyze-modality first"):
        SelectSupervised().run(captured)
    program = after("analyze-modality").copy()
    logits = program.outputs["logits"]
    with program.graph.inserting_after(logits):
        view = program.graph.call_function(torch.ops.aten.transpose.int, (logits, 0, 1))
    view.meta["val"] = logits.meta["val"].transpose(0, 1)
    program.set_outputs({"logits": view})
    with pytest.raises(PassError, match=r"aten.transpose.int follows the head and depends on the"):
        SelectSupervised().run(program)


def test_logits_of_every_position_are_an_error(
    after: After, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SelectSupervised, "apply", lambda self, program: PassResult(program, False))
    with pytest.raises(PassError, match="the logits still have a position axis"):
        SelectSupervised().run(after("analyze-modality"))

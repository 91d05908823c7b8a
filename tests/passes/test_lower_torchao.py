from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gracec import ir
from gracec.backends.torchao import CountInt4Kernels
from gracec.capture import capture
from gracec.errors import PassError
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.freeze import frozen_weights
from gracec.passes.lower_torchao import LowerTorchao, lowered_weights
from gracec.passes.plan_quantization import PlanQuantization
from gracec.program import Program
from gracec.recipe import Recipe
from tests.tiny import tiny_llava

Golden = Callable[[str, str], None]
After = Callable[[str], Program]
FROZEN = "analyze-modality,plan-quantization,insert-fake-quant,freeze"
PIPELINE = f"{FROZEN},lower-torchao"


def test_golden(after: After, golden: Golden) -> None:
    golden("lower-torchao/llava.txt", ir.diff(after(FROZEN), after(PIPELINE)) + "\n")


def test_float32_kernels_agree_with_the_frozen_graph(
    after: After, batch: dict[str, Tensor]
) -> None:
    expected, found = after(FROZEN)(**batch)[0], after(PIPELINE)(**batch)[0]
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_every_planned_matmul_runs_on_an_int4_kernel(
    after: After, batch: dict[str, Tensor]
) -> None:
    weights = frozen_weights(after(FROZEN))
    assert set(lowered_weights(after(PIPELINE))) == set(weights)
    with torch.no_grad(), CountInt4Kernels() as kernels:
        after(PIPELINE)(**batch)
    assert kernels.count == len(weights)


def test_idempotent(after: After) -> None:
    assert not LowerTorchao().run(after(PIPELINE)).modified


def test_it_needs_codes(captured: Program) -> None:
    with pytest.raises(PassError, match="run freeze first"):
        LowerTorchao().run(captured)


def test_a_weight_that_no_kernel_takes_runs_dense_and_is_named(batch: dict[str, Tensor]) -> None:
    model = tiny_llava()
    recipe = Recipe.from_dict({"name": "w3", "weights": {"decoder": {"bits": 3, "group_size": 32}}})
    analyzed = run_passes(capture(model), parse_pipeline("analyze-modality")).program
    planned = PlanQuantization(recipe=recipe).run(analyzed).program
    frozen = run_passes(planned, parse_pipeline("insert-fake-quant,freeze")).program
    result = LowerTorchao().run(frozen)
    refused = [note for note in result.notes if "runs dense: the kernel takes 4-bit codes" in note]
    assert len(refused) == 14
    assert torch.equal(result.program(**batch)[0], frozen(**batch)[0])
    with pytest.raises(PassError, match="the kernel takes 4-bit codes, these have 3 bits"):
        LowerTorchao(strict=True).run(frozen)

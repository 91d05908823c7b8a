import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracec import ir
from gracec.capture import capture
from gracec.errors import PassError
from gracec.ir.program import Program
from gracec.kernels import torchao
from gracec.kernels.torchao import CountInt4Kernels
from gracec.passes import PassResult, parse_pipeline, run_passes
from gracec.passes.freeze import Freeze, frozen_weights
from gracec.passes.lower_torchao import LowerTorchao, lowered_weights
from gracec.passes.plan_quantization import PlanQuantization
from gracec.recipe import Recipe
from tests.frozen_graphs import (
    EDITS,
    Edit,
    X,
    convolution_graph,
    edited,
    frozen_graph,
    linear_graph,
)
from tests.goldens import ONE_BLOCK
from tests.signed import fake_quantized_by_halves
from tests.tiny import tiny_llava

Golden = Callable[..., None]
After = Callable[[str], Program]
FROZEN = "analyze-modality,plan-quantization,insert-fake-quant,freeze"
PIPELINE = f"{FROZEN},lower-torchao"


def test_golden(after_block: After, golden: Golden) -> None:
    text = ir.diff(after_block(FROZEN), after_block(PIPELINE)) + "\n"
    made_by = LowerTorchao()
    golden("lower-torchao/llava.txt", text, made_by=made_by, after=FROZEN, model=ONE_BLOCK)


def test_float32_kernels_agree_with_the_frozen_graph(
    after: After, batch: dict[str, Tensor]
) -> None:
    expected, found = after(FROZEN)(**batch)[0], after(PIPELINE)(**batch)[0]
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_kernels_multiply_with_negative_scales(after: After, batch: dict[str, Tensor]) -> None:
    frozen = Freeze().run(fake_quantized_by_halves(after("analyze-modality"))).program
    lowered = LowerTorchao(strict=True).run(frozen).program
    assert set(lowered_weights(lowered)) == set(frozen_weights(frozen))
    expected, found = frozen(**batch)[0], lowered(**batch)[0]
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
    recipe = Recipe.from_dict({"name": "w8", "weights": {"decoder": {"bits": 8, "group_size": 32}}})
    analyzed = run_passes(capture(model), parse_pipeline("analyze-modality")).program
    planned = PlanQuantization(recipe=recipe).run(analyzed).program
    frozen = run_passes(planned, parse_pipeline("insert-fake-quant,freeze")).program
    result = LowerTorchao().run(frozen)
    dense = "runs dense: the kernel takes codes of up to 4"
    refused = [note for note in result.notes if dense in note]
    assert len(refused) == 14
    assert torch.equal(result.program(**batch)[0], frozen(**batch)[0])
    with pytest.raises(PassError, match="the kernel takes codes of up to 4 bits, these have 8"):
        LowerTorchao(strict=True).run(frozen)


@pytest.mark.parametrize("bits", [2, 3])
def test_fewer_bits_run_on_the_kernel_of_four(bits: int, batch: dict[str, Tensor]) -> None:
    weights = {"decoder": {"bits": bits, "group_size": 32, "signed": True}}
    recipe = Recipe.from_dict({"name": "few", "weights": weights})
    analyzed = run_passes(capture(tiny_llava()), parse_pipeline("analyze-modality")).program
    planned = PlanQuantization(recipe=recipe).run(analyzed).program
    frozen = run_passes(planned, parse_pipeline("insert-fake-quant,freeze")).program
    result = LowerTorchao(strict=True).run(frozen)
    with CountInt4Kernels() as kernels:
        found = result.program(**batch)[0]
    assert kernels.count == 14
    assert torch.allclose(frozen(**batch)[0], found, atol=1e-4, rtol=1e-3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"bits": 8}, "the kernel takes codes of up to 4 bits, these have 8"),
    (
        {"granularity": "per_channel"},
        "the kernel takes one scale per group, these are per_channel",
    ),
    ({"group_size": 16}, "the kernel takes groups of (32, 64, 128, 256), these have 16"),
]


@pytest.mark.parametrize(("rule", "reason"), REFUSED)
def test_codes_that_the_kernel_does_not_take(rule: dict[str, Any], reason: str) -> None:
    runs_dense(linear_graph(**rule), f"weight runs dense: {reason}")


def test_the_number_of_outputs_and_a_convolution() -> None:
    torch.manual_seed(0)
    linear = frozen_graph(nn.Linear(32, 8), X, bits=4, group_size=32)
    reason = "the kernel takes multiples of 16 output features, there are 8"
    runs_dense(linear, f"weight runs dense: {reason}")
    convolution = convolution_graph(bits=4, granularity="per_channel")
    runs_dense(convolution, "gracec.conv2d reads it, for which there is no kernel")


@pytest.mark.parametrize(("edit", "reason"), EDITS)
def test_codes_that_something_else_reads(edit: Edit, reason: str) -> None:
    runs_dense(edited(edit), f"weight runs dense: {reason}")


def runs_dense(program: Program, reason: str) -> None:
    """The one weight runs dense for a reason, with the same values, and not at all if strict."""
    before = ir.format(program)
    result = LowerTorchao().run(program)
    note, last = result.notes
    assert reason in note and last == "0 weights run on INT4 kernels"
    assert not LowerTorchao().run(result.program).modified
    inputs = program.example_inputs
    assert torch.equal(result.program(**inputs)[0], program(**inputs)[0])
    assert not lowered_weights(result.program) and ir.format(program) == before
    with pytest.raises(PassError, match=re.escape(reason.removeprefix("weight runs dense: "))):
        LowerTorchao(strict=True).run(program)


def test_codes_that_are_left_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowerTorchao, "apply", lambda self, program: PassResult(program, False))
    with pytest.raises(PassError, match="lower-torchao: a dequantize node is left"):
        LowerTorchao().run(linear_graph())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda codes, scales: (codes ^ (codes == codes.flatten()[0]).to(torch.int8), scales),
            "codes",
        ),
        (lambda codes, scales: (codes, scales * 2), "scales"),
    ],
)
def test_a_packed_weight_that_reads_back_otherwise_is_an_error(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack = torchao.pack

    def wrong(codes: Tensor, scales: Tensor, *more: Any) -> torchao.PackedWeight:
        return pack(*change(codes, scales), *more)

    monkeypatch.setattr(torchao, "pack", wrong)
    with pytest.raises(PassError, match=f"weight: .*reads back wrong, its {reason} are different"):
        LowerTorchao().run(linear_graph())

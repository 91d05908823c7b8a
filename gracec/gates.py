"""Numeric gates: each returns the figure it found, or raises `GateError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from transformers import PreTrainedModel

from gracec.capture.capture import gate_batches
from gracec.capture.eager import eager_logits
from gracec.capture.families import family_of
from gracec.errors import GateError
from gracec.ir.program import Program, annotation
from gracec.kernels.torchao import CountInt4Kernels, PackedWeight, packed_expert_linear
from gracec.quant.frozen import FrozenWeight, by_matrix
from gracec.recipe import Expectation

MATMUL_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
KERNEL_BOUND = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 1e-1}
"""Of the largest logit, between kernels of one device that compute the same thing."""
NEAR_TIE = 0.02
"""Two top logits closer than this share of their spread are a tie that rounding may decide."""

ROUNDING_KL = 0.3
"""Nats that another dtype may cost; more is another model."""
KL_FACTOR = 3
"""How many times as far as dense weights lowered ones may be: they add up in another order, which a
model that codes have nearly destroyed makes more of."""


def logits_are_those_of(
    whom: str, expected: Tensor, found: Tensor, bound: float, where: str
) -> float:
    """The largest difference of two logits, relative to the largest that is expected.

    Args:
        whom: whose the expected ones are.
        bound: the largest difference that passes; 0 for equal bits.
        where: what the found ones are of.
    """
    if torch.equal(expected, found):
        return 0.0
    if expected.shape != found.shape:
        raise GateError(
            f"the logits are {tuple(found.shape)}, those of {whom} {tuple(expected.shape)}",
            where=where,
        )
    largest = expected.double().abs().max().clamp_min(1e-30)
    change = ((expected.double() - found.double()).abs().max() / largest).item()
    if not 0 < change <= bound:  # NaN passes no comparison
        allowed = f"the bound is {bound:.0e}" if bound else "they have to be equal"
        raise GateError(
            f"the logits differ from those of {whom} by {change:.3g} of the largest, {allowed}",
            where=where,
        )
    return change


def default_kernels_agree(program: Program, model: PreTrainedModel) -> float:
    """Largest relative difference of a graph from its model by the kernels that a device chooses.

    That both compute the same is for `captured_equals_eager`, which has one kernel for attention.
    A device chooses one by whether there is a mask, and the choice may be another in the graph.
    """
    worst, family = 0.0, family_of(model)
    for batch in gate_batches(family, model):
        real = batch["attention_mask"].bool()
        with torch.no_grad():
            found = program(**family.prepare(model, batch))[0]
        expected, found = (one.cpu()[real] for one in (eager_logits(model, batch), found))
        bound, where = KERNEL_BOUND[found.dtype], type(model).__name__
        worst = max(worst, logits_are_those_of("the model", expected, found, bound, where))
    return worst


def frozen_equals_fake_quantized(
    fake_quantized: Sequence[Tensor], frozen: Program, inputs: Mapping[str, Tensor]
) -> None:
    """Frozen codes compute exactly every output of the fake-quantized graph, logits or others."""
    with torch.no_grad():
        outputs = frozen(**inputs)
    for name, expected, found in zip(frozen.output_names, fake_quantized, outputs, strict=True):
        if not torch.equal(expected, found):
            difference = (expected.double() - found.double()).abs().max().item()
            raise GateError(f"frozen and fake-quantized {name} differ by {difference:.3g}")


def matmul_error(packed: Mapping[str, PackedWeight], weights: Mapping[str, FrozenWeight]) -> float:
    """Largest relative error of a packed linear against float64, over all weights.

    Each is run on 8 random activations; the error is relative to the largest output.
    """
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    exact_weights = {
        name: one for fqn, weight in weights.items() for name, one in by_matrix(fqn, weight).items()
    }
    for fqn, weight in packed.items():
        dtype = weight.dtype
        x = torch.randn(8, weight.shape[1], generator=generator).to(weight.device, dtype)
        with torch.no_grad():
            result = functional.linear(x, weight).double()
        exact = x.double() @ exact_weights[fqn].dequantize().double().t()
        error = ((result - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()
        if not error <= MATMUL_BOUND[dtype]:
            raise GateError(
                f"INT4 matmul is off by {error:.3g} relative to float64, "
                f"the bound is {MATMUL_BOUND[dtype]:.0e}",
                where=fqn,
            )
        worst = max(worst, error)
    return worst


def int4_kernels_run(
    program: Program,
    inputs: Mapping[str, Tensor],
    model: nn.Module | None = None,
    model_inputs: Mapping[str, Tensor] | None = None,
) -> int:
    """Count of INT4 kernels that run in one forward; it must equal the planned count.

    Of experts, one kernel for each that a token is for.

    Args:
        model: that generates with the same packed weights, each of which has to run there too. It
            may run more often: some models project image by image what the graph does at once.
        model_inputs: those of the model, where they are not those of the program.
    """
    nodes = [node for node in program.graph.nodes if annotation(node).get("kernel") == "int4"]
    planned = len([node for node in nodes if node.target != packed_expert_linear])
    if planned != len(nodes):
        planned += _experts_asked(program, inputs)
    with torch.no_grad(), CountInt4Kernels() as kernels:
        program(**inputs)
    if kernels.count != planned:
        ran = f"{kernels.count} INT4 kernels ran in the lowered graph"
        raise GateError(f"{ran}, {planned} are planned")
    if model is not None:
        with torch.no_grad(), CountInt4Kernels() as generating:
            model(**(model_inputs or inputs))
        if generating.weights != kernels.weights:
            found = f"{len(generating.weights)} weights ran on INT4 kernels in the generating model"
            raise GateError(f"{found}, {len(kernels.weights)} in the graph")
    return planned


def _experts_asked(program: Program, inputs: Mapping[str, Tensor]) -> int:
    """How many experts some token is for, over all linears of experts that run on kernels."""
    asked = []

    class Watch(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target is packed_expert_linear:
                asked.append(len(torch.unique(args[2])))
            return super().call_function(target, args, kwargs)

    with torch.no_grad():
        Watch(program.graph_module).run(*(inputs[name] for name in program.example_inputs))
    return sum(asked)


@dataclass(frozen=True)
class LogitAgreement:
    """How far logits are from a reference.

    Attributes:
        kl: mean KL divergence from the reference per position, in nats.
        top1: share of positions with the same most likely token.
        top1_clear: the same, only where the reference is no near-tie.
    """

    kl: float
    top1: float
    top1_clear: float


def logit_agreement(reference: Tensor, logits: Tensor, mask: Tensor) -> LogitAgreement:
    """Compare logits [B, T, V] with a reference where mask [B, T] is set."""
    chosen = mask.bool()
    expected, found = reference.double()[chosen], logits.double()[chosen]
    expected_log, found_log = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (expected_log.exp() * (expected_log - found_log)).sum(-1).mean().item()
    same = expected.argmax(-1) == found.argmax(-1)
    top2 = expected.topk(2, dim=-1).values
    spread = expected.amax(-1) - expected.amin(-1)
    clear = (top2[:, 0] - top2[:, 1]) > NEAR_TIE * spread
    top1_clear = same[clear].double().mean().item() if clear.any() else 1.0
    return LogitAgreement(kl, same.double().mean().item(), top1_clear)


@torch.no_grad()
def agreement_on(
    reference: Program, program: Program, samples: Sequence[Mapping[str, Tensor]]
) -> LogitAgreement:
    """How far the logits of a program are from those of another, over all positions of samples.

    Args:
        samples: inputs, without padding; those that are missing are the example's.
    """
    found, positions = [], []
    for sample in samples:
        inputs = {**reference.example_inputs, **sample}
        expected, logits = reference(**inputs)[0], program(**inputs)[0]
        found.append(logit_agreement(expected, logits, torch.ones(logits.shape[:-1])))
        positions.append(logits[..., 0].numel())
    weights = [count / sum(positions) for count in positions]
    kl, top1, clear = (
        sum(weight * getattr(one, name) for weight, one in zip(weights, found, strict=True))
        for name in ("kl", "top1", "top1_clear")
    )
    return LogitAgreement(kl, top1, clear)


def accuracy_is_as_expected(accuracy: Mapping[str, Any], expect: Expectation) -> None:
    """A compiled model answers as well as its recipe expects.

    Args:
        accuracy: of a report, with the scores of "original" and "compiled".

    Raises:
        GateError: if it is too low.
    """
    compiled, original = (
        (scores["types"][expect.type] if expect.type else scores["overall"])["accuracy"]
        for scores in (accuracy["compiled"], accuracy["original"])
    )
    change = expect.metric == "accuracy_change"
    found = float(compiled - original if change else compiled)
    if not found >= expect.at_least:
        sign = "+" if change else ""
        what = expect.metric.replace("_", " ") + (f" on {expect.type}" if expect.type else "")
        raise GateError(
            f"{what} is {found:{sign}.2%} on {accuracy['data']}, the recipe expects at least "
            f"{expect.at_least:{sign}.2%}"
        )


def lowered_is_as_good_as_dense(
    lowered: LogitAgreement, dense: LogitAgreement, reference: torch.dtype = torch.float32
) -> float:
    """Lowered logits stay as close to the reference as dense weights of the same dtype do.

    A 16-bit reference has rounding noise of its own, which dense weights of the same dtype share
    and another order of summation does not, so it is allowed for. The dense weights have to be
    close themselves: they are put together as the lowered model is, and may share its fault.

    Returns:
        The largest KL divergence that passes.
    """
    if not dense.kl <= ROUNDING_KL:
        raise GateError(
            f"dense weights with the values of the codes are off by KL {dense.kl:.3g} from the "
            f"logits that were compiled, rounding costs {ROUNDING_KL} at most"
        )
    noise = 1e-4 if reference == torch.float32 else 1e-2
    bound = KL_FACTOR * dense.kl + noise
    if not lowered.kl <= bound:
        raise GateError(
            f"the lowered model's logits are off by KL {lowered.kl:.3g}, "
            f"dense weights with the same values by {dense.kl:.3g}"
        )
    return bound

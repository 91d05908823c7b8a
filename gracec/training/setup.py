"""What a recipe means for a run: which parameters learn, how fast, and against which objective."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from gracec.errors import GracecError, first_line
from gracec.ir.annotations import Part, part_of, planned_quant
from gracec.ir.program import Program, annotation
from gracec.ir.queries import VIEWS
from gracec.models.devices import has_bfloat16
from gracec.objective import (
    Controller,
    DualAscentController,
    EpochLagrangianController,
    FixedController,
    GraceObjective,
    code_entropy,
)
from gracec.passes.freeze import SCALE_CODES
from gracec.passes.insert_fake_quant import (
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_ACTIVATION,
    fake_quantized,
    reader,
)
from gracec.quant import quantize, read_codes
from gracec.recipe import Training

PART_OF = {"vision": Part.VISION, "fused": Part.DECODER, "text": Part.DECODER}
"""Part of what is no matmul, by its modality: norms, embeddings, biases."""


def objective_of(rule: Training, steps: int, vocabulary: int | None = None) -> GraceObjective:
    """The objective of a recipe; the warm-up of ω takes at most half of the run.

    Args:
        vocabulary: how many ids student and teacher are compared over; by default all.
    """
    d = rule.distillation
    return GraceObjective(
        ce=rule.cross_entropy,
        distillation=d.kind,
        temperature=d.temperature,
        alpha=d.alpha,
        beta_dkd=d.beta_dkd,
        gate=d.gate,
        omega=d.omega,
        omega_warmup=min(d.omega_warmup, steps // 2),
        vocabulary=vocabulary,
    )


def controller_of(rule: Training, steps: int) -> Controller:
    """The controller of β of a recipe."""
    d = rule.distillation
    if d.controller == "fixed" or d.kind == "none":
        return FixedController(d.beta)
    if d.controller == "epoch-lagrangian":
        return EpochLagrangianController(beta_cap=d.beta_cap, eta=d.eta)
    return DualAscentController(
        d.tau, d.eta, d.beta, d.beta_min, d.beta_max, d.ema_decay, steps=steps
    )


def steps_of(rule: Training, samples: int) -> int:
    """Optimizer steps of a run on so many samples."""
    return rule.steps or max(1, round(rule.epochs * math.ceil(samples / rule.batch_size)))


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate: a linear warm-up, then a cosine towards zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def precision_of(rule: Training, device: torch.device) -> torch.dtype:
    """What the matmuls of a training compute in on a device."""
    if rule.precision == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    return torch.bfloat16 if rule.precision == "bfloat16" else torch.float32


@contextmanager
def in_fixed_order(rule: Training, device: torch.device) -> Iterator[None]:
    """Have a device add up in a fixed order, where the recipe asks for it.

    Raises:
        GracecError: if an operator has none there.
    """
    if not rule.deterministic or device.type == "cpu":
        yield
        return
    before = torch.get_deterministic_debug_mode()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is refused
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise GracecError(
            first_line(error), where="training.deterministic", fix="leave it out on this device"
        ) from error
    finally:
        torch.set_deterministic_debug_mode(before)


def trainable(
    program: Program, frozen: Sequence[str], learns: str = "all"
) -> dict[str, nn.Parameter]:
    """FQN -> every parameter of the graph that learns, scales included.

    "vision" is all that depends on pixels alone, without the projector; "decoder" is also the
    embedding and the norms. A tied head learns if either of its two parts does.

    Args:
        learns: "scales" leaves out whatever is no scale.
    """
    scales = _scales(program) if learns == "scales" else None
    found: dict[str, nn.Parameter] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        parameter = program.tensor(target)
        if isinstance(parameter, nn.Parameter) and parameter.is_floating_point():
            parts = {_part(user) for user in _readers(node)}
            counts = scales is None or program.fqn(target) in scales
            if counts and parts - {*frozen, Part.UNUSED}:
                found[program.fqn(target)] = parameter
    return dict(sorted(found.items()))


def allow_mixed_precision(program: Program) -> Program:
    """The program with a cast where the visual tokens join the text, for autocast.

    Under autocast a matmul returns bfloat16, and the merge takes operands of one dtype only.
    """
    program = program.copy()
    merge = program.node(role="merge")
    for operand in merge.all_input_nodes:
        traced = operand.meta["val"]
        if traced.is_floating_point():
            with program.graph.inserting_before(merge):
                cast = program.graph.call_function(
                    torch.ops.aten.to.dtype, (operand, program.dtype)
                )
            cast.meta = dict(operand.meta)
            merge.replace_input_with(operand, cast)
    program.recompile()
    return program


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who computes with a parameter, behind its fake-quantization and views of it."""
    for user in node.users:
        view = user.target in VIEWS and "modality" not in annotation(user)
        if view or user.target in (FAKE_QUANTIZE, FAKE_QUANTIZE_ACTIVATION, SCALE_CODES):
            yield from _readers(user)
        else:
            yield user


def _part(node: fx.Node) -> Part:
    modality = str(annotation(node).get("modality"))
    return part_of(node) or PART_OF.get(modality, Part.UNUSED)


def _scales(program: Program) -> set[str]:
    """FQN of every scale parameter, of weights and of inputs."""
    operators = (FAKE_QUANTIZE, SCALE_CODES, FAKE_QUANTIZE_ACTIVATION)
    params = (node.args[1] for operator in operators for node in program.nodes(operator))
    return {program.fqn(str(param.target)) for param in params if isinstance(param, fx.Node)}


def parameter_groups(
    program: Program, parameters: Mapping[str, nn.Parameter], rule: Training
) -> list[dict[str, Any]]:
    """Groups of AdamW: matrices, vectors (without decay) and scales (without decay)."""
    scales = _scales(program)
    kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "scales": []}
    for name, parameter in parameters.items():
        kind = "matrices" if parameter.dim() > 1 else "vectors"
        kinds["scales" if name in scales else kind].append(parameter)
    options = {
        "matrices": (rule.lr, rule.weight_decay),
        "vectors": (rule.lr, 0.0),
        "scales": (rule.scale_lr, 0.0),
    }
    return [
        {"params": kinds[kind], "lr": lr, "highest_lr": lr, "weight_decay": decay}
        for kind, (lr, decay) in options.items()
        if kinds[kind]
    ]


def capacity(program: Program) -> float:
    """Entropy of all codes over their width, in [0, 1]; 1 where nothing is quantized."""
    by_bits: dict[int, list[Tensor]] = {}
    for fake in fake_quantized(program):
        codes = quantize(fake.weight, fake.scales, fake.bits, fake.group_size)
        by_bits.setdefault(fake.bits, []).append(codes)
    for node in program.nodes(SCALE_CODES):
        stored, bits = node.args[0], planned_quant(reader(node)).bits
        assert isinstance(stored, fx.Node)
        by_bits.setdefault(bits, []).append(read_codes(program.tensor(str(stored.target))))
    counts = {bits: sum(part.numel() for part in parts) for bits, parts in by_bits.items()}
    if not counts:
        return 1.0
    entropies = {bits: code_entropy(parts, bits) for bits, parts in by_bits.items()}
    return sum(entropies[bits] * count for bits, count in counts.items()) / sum(counts.values())

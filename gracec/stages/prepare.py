"""prepare: a model becomes a fake-quantized graph.

    capture -> analyze-modality, plan-quantization, [insert-observers,] insert-fake-quant

Whoever only looks at a model runs the same prefix on a model of stand-ins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gracec.backends.base import check_formats
from gracec.capture import capture, captured_equals_eager
from gracec.capture.hidden import blocks_equal_hidden_states
from gracec.frozen import Frozen
from gracec.ir.annotations import act_of
from gracec.ir.program import Program
from gracec.ir.queries import weight_of
from gracec.journal import Equal, Journal
from gracec.models.surgery import own_tensors, own_weights
from gracec.passes.base import PipelineResult, run_passes
from gracec.passes.plan_quantization import Plan, plan_of
from gracec.quant.frozen import FrozenWeight
from gracec.quant.observers import ActivationSpec
from gracec.recipe import Recipe
from gracec.request import Request
from gracec.stages.pipelines import ANALYSIS, lowering_passes, planning, preparing
from gracec.stages.source import Source
from gracec.training.calibration import calibration_data


@dataclass(frozen=True)
class Prepared:
    """A graph with fake-quantized weights, ready to be trained or frozen.

    Attributes:
        source: what it was made from.
        model: whose parameters are those of the graph; the source's own, or a copy in float32
            where they will be trained.
        program: the graph.
    """

    source: Source
    model: PreTrainedModel
    program: Program

    @property
    def plan(self) -> Plan:
        return plan_of(self.program)

    def owned(self) -> Prepared:
        """The same with tensors of its own, which may be changed."""
        model, copies = own_tensors(self.model)
        names: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        names |= dict(self.model.named_buffers(remove_duplicate=False))
        program = self.program.copy()
        for target, (fqn, *_) in program.fqns.items():
            own = copies[id(names[fqn])] if fqn in names else _own(program.tensor(target))
            program.set_tensor(target, own)
        return replace(self, model=model, program=program)

    def planned(self, dtype: torch.dtype, passes: tuple[str, ...] = ()) -> Frozen:
        """What freezing will give, with stand-ins without memory as codes and scales.

        Formats and targets say from it whether they can hold it, before anything is trained.
        """
        specs, inputs = self.plan.quantized, planned_activations(self.program)
        entries = {entry.fqn: entry for entry in self.plan.entries}
        weights = {
            fqn: FrozenWeight.planned(
                (entries[fqn].shape[0], entries[fqn].shape[1]),
                spec,
                inputs.get(fqn),
                entries[fqn].experts,
            )
            for fqn, spec in specs.items()
        }
        source = self.source
        return Frozen.of(
            self.model,
            weights,
            dtype,
            cast=False,
            processor=source.processor,
            name=source.name,
            passes=passes,
        )


def prepare(source: Source, request: Request, journal: Journal) -> Prepared:
    """Capture, plan, calibrate and fake-quantize a model.

    Raises:
        GracecError: if the model cannot be captured, or the recipe or the data does not fit.
        GateError: if the graph computes something else than the model.
    """
    model = source.model if request.training is None else own_weights(source.model)
    program = capture(model)
    equal = captured_equals_eager(program, model)
    journal.figures["captured_equals_eager"] = Equal(equal, "batches")
    blocks = blocks_equal_hidden_states(run_passes(program, ANALYSIS).program, model)
    journal.figures["blocks_equal_hidden_states"] = Equal(blocks, "blocks")
    samples: Sequence[Mapping[str, Tensor]] = ()
    if request.recipe.quantizes_activations:
        data = calibration_data(
            model,
            request.recipe,
            source.processor,
            request.train_data,
            request.held_out,
            request.strict,
        )
        samples = data.spaced()
        journal.note("calibration", *data.notes)
    pipeline = preparing(request.recipe, samples, strict=request.strict)
    result = run_passes(program, pipeline.placed(request.further)[0])
    journal.extend(result.notes)
    return Prepared(source, model, result.program)


def plan(program: Program, recipe: Recipe, *, strict: bool = False) -> PipelineResult:
    """A captured graph with a plan."""
    return run_passes(program, planning(recipe, strict=strict))


def planned_activations(program: Program) -> dict[str, ActivationSpec]:
    """FQN of a weight -> how the input of its linear will be quantized, where it will."""
    found: dict[str, ActivationSpec] = {}
    for node in program.graph.nodes:
        spec, weight = act_of(node), weight_of(node)
        if spec is not None and weight is not None:
            found[program.fqn(str(weight.target))] = spec
    return found


def accept(prepared: Prepared, request: Request) -> None:
    """Refuse formats and targets that cannot hold the plan, before hours of training.

    Where nothing is quantized, "hf" is an ordinary model, which needs no format.

    Raises:
        GracecError: with the first reason.
    """
    dtype: torch.dtype = getattr(torch, request.recipe.deploy.dtype)
    planned = prepared.planned(dtype, lowering_passes(request))
    if request.output_dir is not None:
        check_formats(request.formats, planned)
    if planned.weights:
        request.target.check(planned, strict=request.strict)


def _own(tensor: Tensor) -> Tensor:
    """A scale or a zero point, which the model does not have."""
    own = tensor.detach().clone()
    return nn.Parameter(own) if isinstance(tensor, nn.Parameter) else own

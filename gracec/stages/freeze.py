"""freeze: fake-quantized weights become integer codes; every float of them is left behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gracec import gates
from gracec._memory import trim
from gracec.frozen import Frozen, Reference
from gracec.ir.program import Program
from gracec.journal import Equal, Journal
from gracec.models.skeleton import stand_in
from gracec.passes.base import PipelineResult, run_passes
from gracec.passes.freeze import frozen_weights
from gracec.passes.pipeline import Placed
from gracec.quant.frozen import FrozenWeight
from gracec.report.report import sqnr_db, weight_bytes
from gracec.report.rows import plan_rows
from gracec.request import Request
from gracec.stages.pipelines import freezing, lowering_passes
from gracec.stages.prepare import Prepared
from gracec.stages.source import Source


def freeze(prepared: Prepared, request: Request, journal: Journal) -> Frozen:
    """The codes of a prepared model, and everything else in the dtype that it will run in.

    Raises:
        GateError: if the frozen graph computes something else than the fake-quantized one.
    """
    model, source = prepared.model, prepared.source
    noise = sqnr_db(prepared.program, source.model)
    journal.plan = plan_rows(
        prepared.plan, noise, journal.ptq_sqnr_db, journal.output_errors, journal.codes
    )
    batch = source.family.example_batch(model)
    inputs = source.family.prepare(model, batch)
    with torch.no_grad():
        fake_quantized = prepared.program(**inputs)
    weights: dict[str, FrozenWeight] = {}
    if prepared.plan.quantized:
        result = freeze_program(prepared.program, inputs, fake_quantized, request.further)
        equal = Equal(len(result.program.output_names), "outputs")
        journal.figures["frozen_equals_fake_quantized"] = equal
        journal.extend(result.notes)
        weights = frozen_weights(result.program)
    frozen = Frozen.of(
        model,
        weights,
        getattr(torch, request.recipe.deploy.dtype),
        processor=source.processor,
        name=source.name,
        revision=source.revision,
        passes=lowering_passes(request),
        onnx=request.recipe.deploy.onnx,
        reference=Reference(batch, fake_quantized[0]),
    )
    journal.sizes = weight_bytes(frozen, source.parameters)
    return frozen


def freeze_program(
    program: Program,
    inputs: Mapping[str, Tensor],
    fake_quantized: Sequence[Tensor],
    further: Iterable[Placed] = (),
) -> PipelineResult:
    """The program with codes in the place of float weights.

    Args:
        inputs, fake_quantized: of the program, and what it returns for them.
        further: passes of others, with their places.

    Raises:
        GateError: if it does not compute what the fake-quantized program does, bit for bit.
    """
    result = run_passes(program, freezing().placed(further)[0])
    gates.frozen_equals_fake_quantized(fake_quantized, result.program, inputs)
    return result


def release(source: Source, frozen: Frozen) -> None:
    """Take a model apart that its owner gave away: quantized weights give their memory back."""
    for fqn, weight in frozen.weights.items():
        parameter = source.model.get_parameter(fqn)
        parameter.data = stand_in(weight.held_shape, parameter.dtype, parameter.device).data
    trim()

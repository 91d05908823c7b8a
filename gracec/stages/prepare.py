"""prepare: a model becomes a fake-quantized graph.

    capture -> analyze-modality, plan-quantization, [insert-observers,] [observe-second-moments,]
               insert-fake-quant, [correct-codes]

Where training follows, it starts from the original weights on the scales that were found, and the
corrected codes are kept beside them: as what training has to be better than.

Whoever only looks at a model runs the same prefix on a model of stand-ins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from gracec import gates, quant
from gracec.backends.base import check_formats
from gracec.capture import capture, captured_equals_eager
from gracec.capture.hidden import blocks_equal_hidden_states
from gracec.errors import GateError
from gracec.frozen import Frozen
from gracec.ir.annotations import act_of
from gracec.ir.program import Program
from gracec.ir.queries import weight_of
from gracec.journal import Agreement, Equal, Error, Journal
from gracec.models.surgery import own_tensors, own_weights
from gracec.passes.base import Pass, PassResult, PipelineResult, run_passes
from gracec.passes.correct_codes import CorrectCodes, codes_taken, output_errors
from gracec.passes.freeze import frozen_weights
from gracec.passes.insert_fake_quant import fake_quantized
from gracec.passes.plan_quantization import Plan, PlanQuantization, plan_of
from gracec.quant.frozen import FrozenWeight
from gracec.quant.observers import ActivationSpec
from gracec.recipe import Recipe
from gracec.request import Request
from gracec.selectors import part_named
from gracec.stages.pipelines import (
    ANALYSIS,
    Observed,
    lowering_passes,
    planning,
    preparing,
    rounding,
)
from gracec.stages.source import Source
from gracec.training.calibration import calibration_data, synthetic_samples
from gracec.training.calibration_run import calibration_run
from gracec.training.checkpoints.fingerprint import (
    Fingerprint,
    describe_device,
    fingerprint_of_json,
    fingerprint_of_tensors,
)
from gracec.training.ranks import rank


@dataclass(frozen=True)
class Prepared:
    """A graph with fake-quantized weights, ready to be trained or frozen.

    Attributes:
        source: what it was made from.
        model: whose parameters are those of the graph; the source's own, or a copy in float32
            where they will be trained.
        program: the graph.
        candidate: FQN -> codes and scales of a post-training quantization with corrected weights,
            to be compared with what training reaches; the graph keeps the original weights.
    """

    source: Source
    model: PreTrainedModel
    program: Program
    candidate: Mapping[str, FrozenWeight] | None = None

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
    if model.device.type != "cpu":
        worst, bound = gates.default_kernels_agree(program, model), gates.KERNEL_BOUND[model.dtype]
        figure = Error(worst, bound, "of the largest logit, by the kernels that the device chooses")
        journal.figures["default_kernels_agree"] = figure
    blocks = blocks_equal_hidden_states(run_passes(program, ANALYSIS).program, model)
    journal.figures["blocks_equal_hidden_states"] = Equal(blocks, "blocks")
    observed, notes = observe(model, source, request)
    before_correction: list[Program] = []

    def watch(item: Pass, before: Program, result: PassResult) -> None:
        if item.name == PlanQuantization.name:
            # What nothing can hold is refused before it is calibrated, which may take long.
            accept(Prepared(source, model, result.program), request)
        if item.name == CorrectCodes.name:
            before_correction.append(before)

    kept = bool(observed.samples) and rank() == 0
    directory = request.training_dir if kept else None
    fingerprint = None if directory is None else _fingerprint(model, observed, request.recipe)
    shown = request.progress and rank() == 0
    with calibration_run(shown, directory, fingerprint) as progress:
        observed = replace(observed, progress=progress)
        pipeline = preparing(request.recipe, observed, strict=request.strict)
        result = run_passes(program, pipeline.placed(request.further)[0], watch)
    journal.note("calibration", *notes())
    journal.extend(result.notes)
    if not before_correction:
        return Prepared(source, model, result.program)
    _compare(program, result.program, observed, request, journal)
    if request.training is None:
        return Prepared(source, model, result.program)
    codes = frozen_weights(result.program)
    return Prepared(source, model, with_scales(before_correction[0], codes), codes)


def observe(
    model: PreTrainedModel, source: Source, request: Request
) -> tuple[Observed, Callable[[], list[str]]]:
    """What a model is calibrated on: the user's data, and synthetic samples.

    Returns:
        The inputs, and what gives a line for each thing to be known of the data once it was read.

    Raises:
        GracecError: if the data cannot be read or none of it can be used.
    """
    recipe, found = request.recipe, Observed()
    notes: Callable[[], list[str]] = list
    if recipe.quantizes_activations or request.calibrates_weights:
        data = calibration_data(
            model,
            recipe,
            source.processor,
            request.train_data,
            request.held_out,
            request.strict,
        )
        notes = lambda: data.notes  # noqa: E731  (some show only when samples are read)
        if recipe.quantizes_activations:
            found = replace(found, activations=data.spaced())
        if request.calibrates_weights:
            drawn = data.drawn()
            if recipe.calibration.method == "moments":
                found = replace(found, moments=(*drawn.samples, *drawn.held_out))
            else:
                found = replace(found, samples=drawn.samples, held_out=drawn.held_out)
    needed = recipe.calibration.method != "weights" and not found.moments
    if needed and recipe.rules() and not _reaches_all(recipe, found.samples):
        synthetic = synthetic_samples(model, seed=recipe.calibration.seed)
        found = replace(found, moments=synthetic)
    return found, notes


def _fingerprint(model: nn.Module, observed: Observed, recipe: Recipe) -> Fingerprint:
    """Of everything that decides corrected codes."""
    samples = [*observed.moments, *observed.samples, *observed.held_out]
    return Fingerprint(
        model=fingerprint_of_tensors(dict(model.named_parameters())),
        teacher="",
        data=fingerprint_of_json([len(observed.samples), *map(fingerprint_of_tensors, samples)]),
        processor="",
        recipe=fingerprint_of_json(recipe.deciding()),
        device=describe_device(next(model.parameters()).device),
    )


def _reaches_all(recipe: Recipe, samples: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether every scale will be searched for when codes are corrected on these samples."""
    pictures = any("pixel_values" in sample for sample in samples)
    named: set[str] = {part for part, rule in recipe.weights.items() if rule is not None}
    named |= {part_named(key) for key, rule in recipe.layers.items() if rule is not None}
    seen = pictures or named <= {"decoder", "head"}
    whole = any(rule.granularity == "per_tensor" for rule in recipe.rules())
    return bool(samples) and seen and not whole


def with_scales(program: Program, weights: Mapping[str, FrozenWeight]) -> Program:
    """The program with the scales of these weights, by FQN, and its own floats."""
    program = program.copy()
    for fake in fake_quantized(program):
        if fake.fqn in weights:
            scales, scale = weights[fake.fqn].scales, fake.node.args[1]
            spec = weights[fake.fqn].spec
            assert isinstance(scale, fx.Node)
            param = nn.Parameter(quant.scale_to_param(scales, spec.parametrization))
            program.set_tensor(str(scale.target), param)
            if spec.signed:
                program.set_tensor(f"{scale.target}_sign", quant.scale_signs(scales))
    return program


def _compare(
    program: Program,
    corrected: Program,
    observed: Observed,
    request: Request,
    journal: Journal,
) -> None:
    """Hold corrected codes beside plain rounding on samples that they were not corrected on.

    The journal takes the output errors of the corrected codes, which are those of the report unless
    training goes on to others. A weight that plain rounding does not change has none.

    Raises:
        GateError: in strict mode, if the logits are further from the original's.
    """
    journal.codes = codes_taken(corrected)
    journal.output_errors = {
        fqn: errors
        for fqn, errors in output_errors(corrected).items()
        if errors[0] > 0 and all(map(math.isfinite, errors))
    }
    worst = max((taken / plain for plain, _, taken in journal.output_errors.values()), default=0.0)
    where = "held-out inputs" if observed.held_out else "the inputs it was calibrated on"
    journal.figures["output_error"] = Error(worst, 1.0, f"of plain rounding's, on {where}")
    if not observed.held_out:
        journal.note("correct-codes", "one sample alone was given: nothing is compared on others")
        return
    plain = run_passes(program, rounding(request.recipe)).program
    agreement = {
        name: gates.agreement_on(program, other, observed.held_out)
        for name, other in (("rounded", plain), ("corrected", corrected))
    }
    rounded, found = agreement["rounded"], agreement["corrected"]
    journal.figures["rounded_logits"] = Agreement(rounded.kl, rounded.top1, rounded.top1_clear)
    figure = Agreement(found.kl, found.top1, found.top1_clear, rounded.kl)
    journal.figures["corrected_logits"] = figure
    if not found.kl <= rounded.kl:
        what = f"corrected codes are off by KL {found.kl:.4g}, plain rounding by {rounded.kl:.4g}"
        if request.strict:
            raise GateError(what, fix="give more samples, or drop strict")
        journal.note("correct-codes", what)


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

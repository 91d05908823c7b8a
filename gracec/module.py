"""Quantize a module that is no vision-language model: a classifier, a tower, a net of one's own.

    student = prepare_module(net, {"x": images}, recipe, dynamic_shapes={"x": {0: "batch_size"}})
    optimizer = torch.optim.Adam(student.graph_module.parameters())
    loss(student(x=images)[0], labels).backward()                  # any loss, any loop
    frozen = freeze_module(student)
    export_module(frozen, "net.onnx")

or, without training, from samples of its inputs:

    frozen = quantize_module(net, {"x": images}, recipe, [{"x": images}, {"x": others}, ...])

The recipe names one part, `module`: all linears, and all convolutions, whose weights are taken as
matrices [filters, the rest].
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracec.capture.module import capture_module, gate_inputs, with_shapes
from gracec.directories import cannot_write, replace_file, room_beside
from gracec.errors import GateError, GracecError
from gracec.ir.program import Program
from gracec.journal import Note
from gracec.passes import Pass, PassResult, run_passes
from gracec.passes.analyze_module import AnalyzeModule
from gracec.passes.correct_codes import CorrectCodes
from gracec.passes.flatten_convolutions import FlattenConvolutions
from gracec.passes.freeze import frozen_weights
from gracec.passes.pipeline import parse_placed
from gracec.recipe import Recipe
from gracec.stages.freeze import freeze_program
from gracec.stages.pipelines import Observed, preparing, rounding
from gracec.stages.prepare import with_scales

Samples = Sequence[Mapping[str, Tensor]]
ANALYSIS = (FlattenConvolutions(), AnalyzeModule())

OUTPUT_BOUND = {"faithful": 1e-4, "fast": 5e-2}
"""Of the largest output: float32 in another order, or inputs of matmuls rounded to 8 bits."""


def prepare_module(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    recipe: str | Path | Recipe,
    samples: Samples = (),
    *,
    held_out: Samples = (),
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    strict: bool = False,
) -> Program:
    """A graph of a copy of the module with fake-quantized weights, ready to be trained.

    The weights are those of the module. Their scales are found by looking at the weights alone, or,
    with samples, are those that `quantize_module` finds.

    Args:
        recipe: its `weights.module` says how; other parts, activations and training have to be
            missing.
        samples, held_out: as of `quantize_module`.
        strict: refuse what would otherwise be reported in `notes` of the program and keep its
            precision.

    Returns:
        A program: `program(**inputs)` gives the outputs as a tuple, `program.graph_module` has the
        float32 weights and the scales as parameters.

    Raises:
        GracecError: if the recipe asks for something else, the module cannot be captured, or the
            samples do not fit it.
    """
    recipe = _checked(recipe)
    captured = _captured(module, example_inputs, dynamic_shapes)
    observed = _observed(recipe, captured, samples, held_out)
    trainable, quantized = _quantized(captured, recipe, observed, strict)
    program = trainable
    if quantized is not trainable:
        program = with_scales(trainable, frozen_weights(quantized))
    program.notes = quantized.notes
    return program


def quantize_module(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    recipe: str | Path | Recipe,
    samples: Samples,
    *,
    held_out: Samples = (),
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    strict: bool = False,
) -> Program:
    """A graph of the module with codes in the place of float weights, found on samples.

    The codes of every linear and convolution are corrected one layer after the other, as
    `gracec.passes.correct_codes` says; with `calibration.method: moments` they are rounded, to
    scales that the samples weigh. There is nothing left to train: see `prepare_module` for that.

    Args:
        recipe: as of `prepare_module`.
        samples: inputs of the module, all of them, to calibrate on; every sample is looked at.
        held_out: others, that layers are compared with rounding on; without them, the same.
        strict: refuse what `notes` would say: weights that keep their precision, and outputs on
            `held_out` that are further from the module's than plain rounding would put them.

    Returns:
        A frozen program, for `export_module`.

    Raises:
        GracecError: if the recipe asks for something else, the module cannot be captured, or the
            samples do not fit it.
        GateError: in strict mode, if plain rounding would be better.
    """
    recipe = _checked(recipe)
    if not samples:
        raise GracecError("there are no samples", fix="give some, or use prepare_module")
    captured = _captured(module, example_inputs, dynamic_shapes)
    observed = _observed(recipe, captured, samples, held_out)
    _, quantized = _quantized(captured, recipe, observed, strict)
    program = freeze_module(quantized)
    plain = run_passes(captured, rounding(recipe, analysis=ANALYSIS)).program
    errors = [_error(one, captured, [*held_out] or [*samples]) for one in (program, plain)]
    what = f"outputs are off by {errors[0]:.3g} of their energy, plain rounding by {errors[1]:.3g}"
    if strict and not errors[0] <= errors[1]:
        raise GateError(what, fix="give more samples, or drop strict")
    program.notes = (*program.notes, Note("quantize-module", what))
    return program


def _checked(recipe: str | Path | Recipe) -> Recipe:
    """A recipe for a module.

    Raises:
        GracecError: if it asks for something that no module has.
    """
    recipe = Recipe.load(recipe)
    others: list[str] = [part for part, rule in recipe.weights.items() if rule and part != "module"]
    others += [name for name in ("training", "expect") if getattr(recipe, name) is not None]
    others += ["activations"] if recipe.quantizes_activations else []
    if others or not recipe.quantizes("module"):
        raise GracecError(
            f"{others[0]} says nothing about a module" if others else "weights.module is missing",
            where=f"recipe {recipe.name}",
            fix="give a recipe with weights.module alone",
        )
    return recipe


def _captured(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None,
) -> Program:
    student = copy.deepcopy(module).to(torch.float32)
    inputs = {name: _in_float32(value) for name, value in example_inputs.items()}
    return capture_module(student, inputs, dynamic_shapes)


def _observed(recipe: Recipe, program: Program, samples: Samples, held_out: Samples) -> Observed:
    """What the calibration of a recipe looks at.

    Raises:
        GracecError: if it needs samples and has none, would not look at them, or they do not fit.
    """
    method, where = recipe.calibration.method, f"recipe {recipe.name}"
    if not samples:
        if method in ("moments", "gptq") or held_out:
            fix = "pass samples=, inputs of the module"
            raise GracecError(f"calibration by {method} needs samples", where=where, fix=fix)
        return Observed()
    if method == "weights":
        what = "calibration by weights looks at no samples"
        raise GracecError(what, where=where, fix="use another method, or pass none")
    given = [_fitting(program, sample, n) for n, sample in enumerate([*samples, *held_out])]
    if method == "moments":
        return Observed(moments=given)
    # Those whose scale is not corrected.
    whole = any(rule.granularity == "per_tensor" for rule in recipe.rules())
    count = len(samples)
    return Observed(
        moments=given[:count] if whole else (), samples=given[:count], held_out=given[count:]
    )


def _fitting(program: Program, sample: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """A sample as the program takes it.

    Raises:
        GracecError: if it has other inputs, or an input has another shape.
    """
    where, example = f"sample {number}", program.example_inputs
    if sample.keys() != example.keys():
        found, needed = ", ".join(sample), ", ".join(example)
        raise GracecError(f"has inputs {found}, the module has {needed}", where=where)
    for name, value in sample.items():
        free = program.dynamic_shapes.get(name) or {}
        sizes = list(example[name].shape)
        fits = value.dim() == len(sizes) and all(
            axis in free or size == sizes[axis] for axis, size in enumerate(value.shape)
        )
        if not fits:
            raise GracecError(
                f"{name} has shape {list(value.shape)}, the example has {sizes}",
                where=where,
                fix="give the axes that change as dynamic_shapes",
            )
    return {name: _in_float32(value) for name, value in sample.items()}


def _quantized(
    captured: Program, recipe: Recipe, observed: Observed, strict: bool
) -> tuple[Program, Program]:
    """The program before codes were corrected, and after it, which may be the same."""
    pipeline = preparing(recipe, observed, strict=strict, analysis=ANALYSIS)
    pipeline, _ = pipeline.placed(parse_placed(text) for text in recipe.passes)
    before: list[Program] = []

    def watch(item: Pass, program: Program, result: PassResult) -> None:
        if isinstance(item, CorrectCodes):
            before.append(program)

    result = run_passes(captured, pipeline, watch)
    result.program.notes = result.notes
    return (*before, result.program)[0], result.program


def _error(program: Program, original: Program, samples: Samples) -> float:
    """How far the outputs are off, as a share of their energy."""
    off = energy = 0.0
    with torch.no_grad():
        for sample in samples:
            inputs = {name: _in_float32(value) for name, value in sample.items()}
            for found, expected in zip(program(**inputs), original(**inputs), strict=True):
                off += float((found.double() - expected.double()).square().sum())
                energy += float(expected.double().square().sum())
    return off / (energy or 1.0)


def freeze_module(program: Program) -> Program:
    """The program with codes in the place of float weights.

    Raises:
        GateError: if it does not compute what the fake-quantized program does, bit for bit.
    """
    inputs = program.example_inputs
    with torch.no_grad():
        fake_quantized = program(**inputs)
    result = freeze_program(program, inputs, fake_quantized)
    result.program.notes = (*program.notes, *result.notes)
    return result.program


def export_module(
    program: Program,
    path: str | Path,
    *,
    ops: str = "qdq",
    mode: str = "faithful",
    strict: bool = False,
) -> dict[str, Any]:
    """Write a frozen program as ONNX, and run it beside the program.

    Linears whose input features are a multiple of 16 run on the kernel of `ops` and `mode`, as
    those of a decoder do. The weight of a convolution is `DequantizeLinear` of its codes.

    Args:
        path: of the file; large tensors lie in `<path>_data`.
        strict: refuse linears that no kernel takes; otherwise they are dense, and in `notes`.

    Returns:
        Figures of the gates; `session_options`, which a runtime needs so that it computes what was
        checked; and `notes`.

    Raises:
        GateError: if what was written is not numerically what it should be. Nothing is left then.
    """
    # Imported where a graph is written: these packages take a second.
    from gracec.backends.onnx import gates as onnx_gates
    from gracec.backends.onnx.session import open_session, session_options
    from gracec.backends.onnx.write import write_graph

    path = Path(path)
    options = session_options(ops, mode)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    with room_beside(path) as folder:
        written = write_graph(
            with_shapes(program),
            path.stem,
            lambda kinds: folder / path.name,
            ops=ops,
            mode=mode,
            strict=strict,
            decompose=True,
        )
        figures: dict[str, Any] = {
            "kernels": written.kernels,
            "equal_weights": written.equal_weights,
            "matmul_error": onnx_gates.matmul_error(written.lowered, ops, mode),
        }
        session = open_session(written.files[0], options, threads=torch.get_num_threads())
        figures["output_error"] = _output_error(program, session, mode)
        del session
        if len(written.files) > 1:  # never an old graph with new tensors
            Path(os.path.realpath(path)).unlink(missing_ok=True)
        for file in reversed(written.files):
            replace_file(file, path.with_name(file.name))
    return {**figures, "session_options": options, "notes": list(map(str, written.notes))}


def _in_float32(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.float32) if floating else value


def _output_error(program: Program, session: Any, mode: str) -> float:
    """Largest difference of an output between ONNX Runtime and torch, relative to the largest."""
    from gracec.backends.onnx.gates import relative_error

    worst = 0.0
    for inputs in gate_inputs(program):
        with torch.no_grad():
            expected = program(**inputs)
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for name, one, other in zip(program.output_names, expected, found, strict=True):
            error = relative_error(other, one.double().numpy())
            if not error <= OUTPUT_BOUND[mode]:
                raise GateError(
                    f"{name} in ONNX Runtime is off by {error:.3g} of the largest value, the "
                    f"bound is {OUTPUT_BOUND[mode]:.0e}"
                )
            worst = max(worst, error)
    return worst

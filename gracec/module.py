"""Quantize a module that is no vision-language model: a classifier, a tower, a net of one's own.

    student = prepare_module(net, {"x": images}, recipe, dynamic_shapes={"x": {0: "batch_size"}})
    optimizer = torch.optim.Adam(student.graph_module.parameters())
    loss(student(x=images)[0], labels).backward()                  # any loss, any loop
    frozen = freeze_module(student)
    export_module(frozen, "net.onnx")

The recipe names one part, `module`: all linears, and all convolutions, whose weights are taken as
matrices [filters, the rest].
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracec.capture.module import capture_module, gate_inputs, with_shapes
from gracec.directories import cannot_write, replace_file, room_beside
from gracec.errors import GateError, GracecError
from gracec.ir.program import Program
from gracec.passes import run_passes
from gracec.passes.analyze_module import AnalyzeModule
from gracec.passes.flatten_convolutions import FlattenConvolutions
from gracec.passes.pipeline import parse_placed
from gracec.recipe import Recipe
from gracec.stages.freeze import freeze_program
from gracec.stages.pipelines import preparing

OUTPUT_BOUND = {"faithful": 1e-4, "fast": 5e-2}
"""Of the largest output: float32 in another order, or inputs of matmuls rounded to 8 bits."""


def prepare_module(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    recipe: str | Path | Recipe,
    *,
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
    strict: bool = False,
) -> Program:
    """A graph of a copy of the module with fake-quantized weights, ready to be trained.

    Args:
        recipe: its `weights.module` says how; other parts, activations and training have to be
            missing.
        strict: refuse what would otherwise be reported in `notes` of the program and keep its
            precision.

    Returns:
        A program: `program(**inputs)` gives the outputs as a tuple, `program.graph_module` has the
        float32 weights and the scales as parameters.

    Raises:
        GracecError: if the recipe asks for something else, or the module cannot be captured.
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
    student = copy.deepcopy(module).to(torch.float32)
    inputs = {name: _in_float32(value) for name, value in example_inputs.items()}
    analysis = (FlattenConvolutions(), AnalyzeModule())
    pipeline = preparing(recipe, strict=strict, analysis=analysis)
    pipeline, _ = pipeline.placed(parse_placed(text) for text in recipe.passes)
    result = run_passes(capture_module(student, inputs, dynamic_shapes), pipeline)
    result.program.notes = result.notes
    return result.program


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

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
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from gracec import gates
from gracec.capture.capture import trace
from gracec.capture.serving import ServingProgram
from gracec.capture.serving_graph import Shape
from gracec.errors import GateError, GracecError
from gracec.passes import run_passes
from gracec.passes.analyze_module import AnalyzeModule
from gracec.passes.flatten_convolutions import FlattenConvolutions
from gracec.passes.freeze import Freeze, frozen_weights
from gracec.passes.insert_fake_quant import InsertFakeQuant
from gracec.passes.lower_qdq import LowerQdq, lowered_weights
from gracec.passes.plan_quantization import PlanQuantization
from gracec.program import Program
from gracec.recipe import Recipe

OUTPUT_BOUND = {"faithful": 1e-4, "fast": 5e-2}
"""Of the largest output: float32 in another order, or inputs of matmuls rounded to 8 bits."""


def capture_module(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
) -> Program:
    """Capture a module as a graph that shares its parameters, in eval mode.

    Args:
        example_inputs: argument of `forward` -> tensor; scalars are tensors of no dimension.
        dynamic_shapes: argument -> {dimension: its name}; equal names are equal sizes. Every other
            dimension is fixed to that of the example.

    Raises:
        GracecError: if torch.export cannot trace the module, or an input is no tensor.
        GateError: if the graph computes something else than the module, for the example inputs or
            for inputs twice as large in every dynamic dimension.
    """
    for name, value in example_inputs.items():
        if not isinstance(value, Tensor):
            raise GracecError(
                f"the input is a {type(value).__name__}, not a tensor",
                where=f"example_inputs[{name!r}]",
                fix="a number that changes is torch.tensor(number); bind one that does not",
            )
    if not any(parameter.is_floating_point() for parameter in module.parameters()):
        raise GracecError("the module has no weights", where=type(module).__name__)
    named = {name: dict(sizes) for name, sizes in (dynamic_shapes or {}).items()}
    unknown = sorted(named.keys() - example_inputs.keys())
    if unknown:
        raise GracecError(
            f"no input is called {unknown[0]!r}",
            where="dynamic_shapes",
            fix=f"the inputs are {', '.join(example_inputs)}",
        )
    symbols = {size: Dim(size) for sizes in named.values() for size in sizes.values()}
    dynamic = {
        name: {axis: symbols[size] for axis, size in named.get(name, {}).items()}
        for name in example_inputs
    }
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            outputs = module(**example_inputs)
        program = trace(module, module, example_inputs, dynamic, _output_names(outputs))
        program.set_signature()
        program = program.copy()  # with one result an output, whatever they were packed in
        for inputs in _gate_inputs(program):
            _check_equal(program, module, inputs)
    finally:
        module.train(was_training)
    return program


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
    search = recipe.scale_search
    result = run_passes(
        capture_module(student, inputs, dynamic_shapes),
        [
            FlattenConvolutions(),
            AnalyzeModule(),
            PlanQuantization(recipe=recipe, strict=strict),
            InsertFakeQuant(search.candidates, search.lowest, search.highest),
        ],
    )
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
    result = run_passes(program, [Freeze()])
    gates.frozen_equals_fake_quantized(fake_quantized, result.program, inputs)
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
    from gracec.backends.onnx import graphs
    from gracec.backends.onnx.session import open_session, session_options

    path = Path(path)
    frozen = frozen_weights(program)
    result = run_passes(program, [LowerQdq(ops, mode, strict)])
    lowered = lowered_weights(result.program)
    model = graphs.to_onnx(_with_shapes(result.program), path.stem, decompose=True)
    options = session_options(ops, mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        files = graphs.write_model(model, Path(folder) / path.name)
        written = files[0]
        onnx_gates.file_is_valid(written)
        planned = Counter(weight.kernel for weight in lowered.values())
        figures: dict[str, Any] = {
            "kernels": onnx_gates.kernels_in_session(written, ops, mode, planned),
            "equal_weights": onnx_gates.stored_weights_are_exact(written, frozen),
            "matmul_error": onnx_gates.matmul_error(lowered, ops, mode),
        }
        session = open_session(written, options, threads=torch.get_num_threads())
        figures["output_error"] = _output_error(program, session, mode)
        del session
        for file in reversed(files):
            os.replace(file, path.with_name(file.name))
    return {**figures, "session_options": options, "notes": list(result.notes)}


def _in_float32(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.float32) if floating else value


def _output_names(outputs: Any) -> tuple[str, ...]:
    """Keys of a mapping, `output` or `output_0`, `output_1`, ..."""
    leaves = pytree.tree_leaves(outputs)
    tensors = all(isinstance(leaf, Tensor) for leaf in leaves)
    if not leaves or not tensors:
        raise GracecError("the module returns something else than tensors", where="forward")
    if isinstance(outputs, Mapping) and len(outputs) == len(leaves):
        return tuple(map(str, outputs))
    if len(leaves) == 1:
        return ("output",)
    return tuple(f"output_{number}" for number in range(len(leaves)))


def _gate_inputs(program: Program) -> Iterator[dict[str, Tensor]]:
    """The example inputs, and inputs twice as large in every dynamic dimension."""
    yield program.example_inputs
    larger = dict(program.example_inputs)
    for name in larger:
        for axis in program.dynamic_shapes.get(name) or {}:
            larger[name] = torch.cat([larger[name], larger[name].flip(axis)], dim=axis)
    yield larger


def _check_equal(program: Program, module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        expected, found = pytree.tree_leaves(module(**inputs)), program(**inputs)
    for name, one, other in zip(program.output_names, expected, found, strict=True):
        if not torch.equal(one, other):
            shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
            raise GateError(
                f"{name} of the captured graph differs from that of the module at {shapes}",
                where=type(module).__name__,
                fix="the module decides something by data or sizes, which a graph cannot",
            )


def _with_shapes(program: Program) -> ServingProgram:
    """The program with the names of its dimensions, as they were given."""
    names: dict[str, str] = {}
    inputs: dict[str, Shape] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        name = str(node.target)
        dynamic = program.dynamic_shapes.get(name) or {}
        shape: list[str | int] = list(node.meta["val"].shape)
        for axis, dim in dynamic.items():
            own = getattr(dim, "__name__", "")
            own = own if own.isidentifier() else f"{name}_{axis}"
            shape[axis] = names.setdefault(str(shape[axis]), own)
        inputs[name] = tuple(shape)
    outputs = {
        name: tuple(
            size if isinstance(size, int) else names.get(str(size), str(size))
            for size in node.meta["val"].shape
        )
        for name, node in program.outputs.items()
    }
    return ServingProgram(program, inputs, outputs)


def _output_error(program: Program, session: Any, mode: str) -> float:
    """Largest difference of an output between ONNX Runtime and torch, relative to the largest."""
    from gracec.backends.onnx.gates import relative_error

    worst = 0.0
    for inputs in _gate_inputs(program):
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

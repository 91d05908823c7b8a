"""Capture a module that is no vision-language model, and prove that the graph computes the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from gracec.capture.capture import trace
from gracec.capture.eager import no_fast_path
from gracec.capture.serving import ServingProgram
from gracec.capture.serving_graph import Shape
from gracec.errors import GateError, GracecError
from gracec.ir.program import Program


def capture_module(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor],
    dynamic_shapes: Mapping[str, Mapping[int, str]] | None = None,
) -> Program:
    """Capture a module as a graph that shares its parameters, in eval mode.

    `nn.TransformerEncoder` and `nn.MultiheadAttention` have a fast path that is one operator for
    all of a layer and rounds otherwise; module and graph compute without it.

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
        with no_fast_path():
            for inputs in gate_inputs(program):
                _check_equal(program, module, inputs)
    finally:
        module.train(was_training)
    return program


def gate_inputs(program: Program) -> Iterator[dict[str, Tensor]]:
    """The example inputs, and inputs twice as large in every dynamic dimension."""
    yield program.example_inputs
    larger = dict(program.example_inputs)
    for name in larger:
        for axis in program.dynamic_shapes.get(name) or {}:
            larger[name] = torch.cat([larger[name], larger[name].flip(axis)], dim=axis)
    yield larger


def with_shapes(program: Program) -> ServingProgram:
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

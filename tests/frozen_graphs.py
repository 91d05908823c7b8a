"""The smallest graphs with codes, and what may read them beside a linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from gracec.ir.program import Program, annotate
from gracec.module import freeze_module, prepare_module
from gracec.passes.freeze import DEQUANTIZE
from gracec.recipe import Recipe

aten = torch.ops.aten
X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))


def frozen_graph(net: nn.Module, x: torch.Tensor, **rule: Any) -> Program:
    """A net of one layer with codes; `rule` is that of the recipe."""
    recipe = Recipe.from_dict({"name": "net", "weights": {"module": rule}})
    program = freeze_module(prepare_module(net.eval(), {"input": x}, recipe))
    assert len(list(program.nodes(DEQUANTIZE))) == 1
    return program


def linear_graph(**rule: Any) -> Program:
    """One linear [16, 32] with 4-bit codes in groups of 32."""
    torch.manual_seed(0)
    return frozen_graph(nn.Linear(32, 16), X, **({"bits": 4, "group_size": 32} | rule))


def convolution_graph(**rule: Any) -> Program:
    """One convolution whose filters have 36 features."""
    torch.manual_seed(0)
    return frozen_graph(nn.Conv2d(4, 16, 3), IMAGES, **rule)


def read_by_another(program: Program, linear: fx.Node, weight: fx.Node) -> None:
    """linear(x, w) -> linear(x, w) * abs(w).mean()"""
    call = program.graph.call_function
    with program.graph.inserting_after(linear):
        absolute = call(aten.abs.default, (weight,))
        mean = call(aten.mean.default, (absolute,))
        product = call(aten.mul.Tensor, (linear, mean))
    absolute.append(mean)
    mean.append(product)
    for node, like in ((absolute, weight), (mean, linear), (product, linear)):
        node.meta = {"val": like.meta["val"]}
    linear.replace_all_uses_with(product, lambda user: user is not product)


def read_as_input(program: Program, linear: fx.Node, weight: fx.Node) -> None:
    """linear(x [16, 32], w [16, 32]) -> linear(w, x)"""
    linear.args = (weight, linear.args[0])


def read_twice(program: Program, linear: fx.Node, weight: fx.Node) -> None:
    """linear(x, w) -> linear(w, w)"""
    linear.args = (weight, weight)


def read_without_plan(program: Program, linear: fx.Node, weight: fx.Node) -> None:
    """What says how the codes came about is lost."""
    annotate(linear, quant=None)


def read_by_no_linear(program: Program, linear: fx.Node, weight: fx.Node) -> None:
    """linear(x, w) -> abs(w), which is annotated as the linear was"""
    linear.target, linear.args = aten.abs.default, (weight,)


Edit = Callable[[Program, fx.Node, fx.Node], None]
EDITS: list[tuple[Edit, str]] = [
    (read_by_another, "aten.abs reads it, for which there is no kernel"),
    (read_by_no_linear, "aten.abs reads it, for which there is no kernel"),
    (read_as_input, "aten.linear reads it, but not as its weight alone"),
    (read_twice, "aten.linear reads it, but not as its weight alone"),
    (read_without_plan, "nothing that reads it says how it was quantized"),
]


def edited(edit: Edit) -> Program:
    """`linear_graph` after a change."""
    program = linear_graph().copy()
    (weight,) = program.nodes(DEQUANTIZE)
    (linear,) = weight.users
    edit(program, linear, weight)
    program.recompile()
    return program

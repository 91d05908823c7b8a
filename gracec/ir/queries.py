"""Questions about nodes of a graph: which multiply with a weight, and with what."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


MATMULS: dict[Any, tuple[int, ...]] = {
    aten.linear.default: (1,),
    torch.ops.gracec.conv2d.default: (1,),
    aten.conv2d.default: (1,),
    aten.conv3d.default: (1,),
    aten.mm.default: (1, 0),
    aten.bmm.default: (1, 0),
    aten.matmul.default: (1, 0),
    aten.addmm.default: (2, 1),
    aten.baddbmm.default: (2, 1),
}
"""Op -> positions of the operands that may be a weight, the usual one first."""


VIEWS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.expand.default,
    aten.expand_as.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten.select.int,
    aten.chunk.default,
    aten.split.Tensor,
    aten._to_copy.default,
}


STAND_INS = {torch.ops.gracec.fake_quantize.default, torch.ops.gracec.dequantize.default}
"""What stands for a weight that is quantized."""


def value(node: fx.Node) -> torch.Tensor | None:
    """The example (fake) tensor of a node, if its value is one tensor."""
    found = node.meta.get("val")
    return found if isinstance(found, torch.Tensor) else None


def weight_of(node: fx.Node) -> fx.Node | None:
    """The parameter that a matmul-like node multiplies with, seen through views and fake-quant."""
    for position in MATMULS.get(node.target, ()):
        operand = node.args[position]
        assert isinstance(operand, fx.Node)
        while operand.op == "call_function" and (
            operand.target in VIEWS or operand.target in STAND_INS
        ):
            operand = operand.all_input_nodes[0]
        if operand.op == "get_attr":
            return operand
    return None


def activation_of(node: fx.Node) -> fx.Node:
    """The other operand of a matmul-like node that has a weight."""
    positions = MATMULS[node.target]
    bias = {0} if len(positions) == 2 and 0 not in positions else set()
    operands = [
        operand
        for position, operand in enumerate(node.args[:3])
        if isinstance(operand, fx.Node) and position not in bias
    ]
    weight = weight_of(node)
    return next((n for n in operands if n is not weight and not _holds(n, weight)), operands[0])


def _holds(node: fx.Node, weight: fx.Node | None) -> bool:
    """Whether a node is a view of the weight."""
    while node.op == "call_function" and node.all_input_nodes:
        if node.target not in VIEWS and node.target not in STAND_INS:
            return False
        node = node.all_input_nodes[0]
    return node is weight

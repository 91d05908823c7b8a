"""Questions about nodes of a graph: which multiply with a weight, and with what."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


MATMULS: dict[Any, tuple[int, ...]] = {
    aten.linear.default: (1,),
    torch.ops.gracec.conv2d.default: (1,),
    torch.ops.gracec.expert_linear.default: (1,),
    aten.conv2d.default: (1,),
    aten.conv3d.default: (1,),
    aten.mm.default: (1, 0),
    aten.bmm.default: (1, 0),
    aten.matmul.default: (1, 0),
    aten.addmm.default: (2, 1),
    aten.baddbmm.default: (2, 1),
}
"""Op -> positions of the operands that may be a weight, the usual one first."""


ATTENTION = {
    aten.scaled_dot_product_attention.default,
    torch.ops.gracec.segment_attention.default,
    torch.ops.gracec.gated_delta_rule.default,
}
CONVOLUTIONS = {aten.conv1d.default, aten.conv1d.padding}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
DROPOUT = {aten.dropout.default, aten.native_dropout.default}
EXPERT_LINEAR = torch.ops.gracec.expert_linear.default
PICKS = {aten.topk.default}
"""What picks the largest of some values, and says which they are."""


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


STAND_INS = {
    torch.ops.gracec.fake_quantize.default,
    torch.ops.gracec.scale_codes.default,
    torch.ops.gracec.dequantize.default,
}
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
        operand = seen_through(operand)
        if operand.op == "get_attr":
            return operand
    return None


def seen_through(node: fx.Node) -> fx.Node:
    """What a node is views of, or stands for quantized."""
    while node.op == "call_function" and (node.target in VIEWS or node.target in STAND_INS):
        node = node.all_input_nodes[0]
    return node


def nearest_matmuls(nodes: Iterable[fx.Node], ends: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The matmuls that some values are computed from with no other matmul in between.

    Args:
        ends: other nodes that count like them.
    """
    found, seen, left = set(), set(), list(nodes)
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in MATMULS or node in ends:
            found.add(node)
        else:
            left += node.all_input_nodes
    return found


def attends(node: fx.Node) -> bool:
    """Whether a node computes positions from others: attention, the softmax of one that is written
    out, or a convolution along the sequence.

    A softmax alone is none: a router has one too. Attention multiplies two activations with each
    other before it, and the result with a third one after it.
    """
    if node.target in CONVOLUTIONS:
        weight = value(node.args[1])  # type: ignore[arg-type]
        return weight is not None and weight.shape[-1] > 1
    if node.target not in SOFTMAX:
        return node.target in ATTENTION
    scores = nearest_matmuls(node.all_input_nodes)
    if not any(weight_of(matmul) is None for matmul in scores):
        return False
    left = list(node.users)
    while left:
        user = left.pop()
        if user.target in MATMULS and weight_of(user) is None:
            return True
        if user.target in VIEWS or user.target in DROPOUT:
            left += user.users
    return False


def _goes_on(node: fx.Node) -> bool:
    """Whether some matmul depends on a node."""
    seen, left = set(), list(node.users)
    while left:
        user = left.pop()
        if user.target in MATMULS:
            return True
        if user not in seen:
            seen.add(user)
            left += user.users
    return False


def chooses_experts(graph: fx.Graph) -> set[fx.Node]:
    """The routers: linears by whose result it is decided which expert a token is for.

    What makes one is what becomes of its result, with no other matmul in between: it says which
    weight each row of an expert's linear is multiplied by, or the largest of its values are picked
    and the model goes on to multiply. A head whose largest values are returned is none.
    """
    decisions: list[fx.Node] = []
    for node in graph.nodes:
        if node.target == EXPERT_LINEAR:
            decisions.append(node.args[2])
        elif node.target in PICKS and _goes_on(node):
            decisions.append(node.args[0])
    return {matmul for matmul in nearest_matmuls(decisions) if weight_of(matmul) is not None}


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

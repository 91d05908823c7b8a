"""What the rules of a decoder ask of nodes, and how they put one in the place of another."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
RESHAPES = (aten.view.default, aten.reshape.default)


def operands_in_both_orders(node: Any, target: Any) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of the operands of a commutative operator, if both are nodes."""
    if not isinstance(node, fx.Node) or node.target != target or len(node.args) != 2:
        return []
    first, second = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return []
    return [(first, second), (second, first)]


def operand_of(node: Any, target: Any) -> Any:
    """The first operand of a node, if the node is of this operator."""
    if not isinstance(node, fx.Node) or node.target != target:
        return None
    first = node.args[0]
    return first if isinstance(first, fx.Node) else None


def projection_of(heads: Any) -> fx.Node | None:
    """transpose(view(x [B, S, N * D])) [B, N, S, D] -> x"""
    view = operand_of(heads, aten.transpose.int)
    if view is None or heads.args[1:] != (1, 2) or view.target not in RESHAPES:
        return None
    x = view.args[0]
    if not isinstance(x, fx.Node):
        return None
    narrow, wide = x.meta["val"].shape, view.meta["val"].shape
    fits = len(narrow) == 3 and len(wide) == 4 and narrow[:2] == wide[:2]
    return x if fits else None


def replace(node: fx.Node, target: Any, arguments: tuple[Any, ...]) -> None:
    """Put an operator in the place of a node, which stays behind unused."""
    with node.graph.inserting_before(node):
        fused = node.graph.call_function(target, tuple(arguments))
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)


def metadata(shaped: fx.Node, placed: fx.Node) -> dict[str, Any]:
    """Metadata of a node that has the value of one node and the place of another."""
    return {"val": shaped.meta["val"]} | {
        key: placed.meta[key] for key in ("nn_module_stack",) if key in placed.meta
    }

"""The rotary embedding of a projection that is seen as heads is one operator on the projection.

    x * cos + cat(-x[h:], x[:h]) * sin, x = heads(p)  ->  heads(rotary_embedding(p, cos, sin))

with cos and sin [B, S, D] of angles that come twice, of which the operator takes one half.
"""

from __future__ import annotations

from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import fx

from gracec.ir.program import Program
from gracec.ir.queries import VIEWS
from gracec.passes.fusions.nodes import (
    metadata,
    operand_of,
    operands_in_both_orders,
    projection_of,
    replace,
)
from gracec.passes.rewrite import Mismatch, Rewrite, described

aten = torch.ops.aten
ROTARY_EMBEDDING = torch.ops.gracec.rotary_embedding.default
MOVES = VIEWS | {
    getitem,
    aten.cat.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.split_with_sizes.default,
}
"""What takes values from one place to another and computes none."""


class Rotary(NamedTuple):
    """x * cos + cat(-x[h:], x[:h]) * sin, with x [B, N, S, D] a projection seen as heads."""

    x: fx.Node
    projection: fx.Node
    cos: fx.Node
    sin: fx.Node


class Turn(NamedTuple):
    """x * cos + crossed * sin"""

    x: fx.Node
    cos: fx.Node
    crossed: fx.Node
    sin: fx.Node


def _is_rotary(node: fx.Node) -> bool:
    return _turn(node) is not None


def _match_rotary(node: fx.Node) -> Rotary:
    turn = _turn(node)
    assert turn is not None
    if node.kwargs:
        raise Mismatch("one of the products is scaled when they are added")
    projection = projection_of(turn.x)
    if projection is None:
        raise Mismatch(f"what is turned is no projection seen as heads, but {described(turn.x)}")
    cos = _table(turn.cos, aten.cos.default, "cosine")
    sin = _table(turn.sin, aten.sin.default, "sine")
    if not _is_rotated(turn.crossed, turn.x):
        raise Mismatch("what the sine multiplies is not cat(-x[h:], x[:h])")
    return Rotary(turn.x, projection, cos, sin)


def _fuse_rotary(program: Program, node: fx.Node, rotary: Rotary) -> None:
    """The projection is turned before it is seen as heads."""
    graph, (x, projection, *tables) = program.graph, rotary
    view: Any = x.args[0]
    _, heads, _, size = x.meta["val"].shape
    with graph.inserting_before(node):
        halves = [_first_half(table, size // 2, node) for table in tables]
        turned = graph.call_function(ROTARY_EMBEDDING, (projection, *halves, heads))
        turned.meta = metadata(projection, node)
        seen = graph.call_function(view.target, (turned, *view.args[1:]))
        seen.meta = metadata(view, node)
    replace(node, aten.transpose.int, (seen, 1, 2))


def _first_half(table: fx.Node, size: int, place: fx.Node) -> fx.Node:
    """table [B, S, D] -> table[..., :D / 2], the same node for all that read it."""
    arguments = (table, 2, 0, size)
    for user in table.users:
        if user.target == aten.slice.Tensor and user.args == arguments and user < place:
            return user
    half = place.graph.call_function(aten.slice.Tensor, arguments)
    half.meta = {"val": table.meta["val"][..., :size]}
    return half


def _turn(node: fx.Node) -> Turn | None:
    for straight, crossed in operands_in_both_orders(node, aten.add.Tensor):
        first = _times(straight, aten.cos.default)
        second = _times(crossed, aten.sin.default)
        if first and second:
            return Turn(*first, *second)
    return None


def _times(node: fx.Node, function: Any) -> tuple[fx.Node, fx.Node] | None:
    """x * table -> x, table, if the table is values of the function, wherever they were moved."""
    for x, table in operands_in_both_orders(node, aten.mul.Tensor):
        if _holds(table, function):
            return x, table
    return None


def _holds(node: fx.Node, function: Any) -> bool:
    """Whether a node holds values of a function, moved and multiplied with numbers alone."""
    pending = [node]
    while pending:
        found = pending.pop()
        if found.target == function:
            return True
        by_number = found.target == aten.mul.Tensor and len(found.all_input_nodes) == 1
        if found.target in MOVES or by_number:
            pending += found.all_input_nodes
    return False


def _table(node: fx.Node, function: Any, name: str) -> fx.Node:
    """unsqueeze(t, 1) -> t [B, S, D], if t is the function of angles that come twice."""
    table: fx.Node | None = operand_of(node, aten.unsqueeze.default)
    if table is None or node.args[1:] != (1,) or table.meta["val"].dim() != 3:
        raise Mismatch(f"the {name} is not [B, S, D], seen as [B, 1, S, D]")
    angles: Any = table
    while angles.target == aten.mul.Tensor and isinstance(angles.args[1], float):
        angles = angles.args[0]
    twice = operand_of(angles, function)
    if twice is None:
        raise Mismatch(f"the {name} is changed after it is taken, by {described(angles)}")
    parts: Any = twice.args[0] if twice.target == aten.cat.default else ()
    if len(parts) != 2 or parts[0] is not parts[1] or twice.args[1:] not in ((-1,), (2,)):
        raise Mismatch(f"the {name} is not of angles that come twice")
    return table


def _is_rotated(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is cat(-x[..., h:], x[..., :h]), where h is half the size of x."""
    if node.target != aten.cat.default or node.args[1:] not in ((-1,), (3,)):
        return False
    parts: Any = node.args[0]
    half = x.meta["val"].shape[3] // 2
    return (
        len(parts) == 2
        and _is_slice(operand_of(parts[0], aten.neg.default), x, half, 2 * half)
        and _is_slice(parts[1], x, 0, half)
    )


def _is_slice(node: Any, x: fx.Node, start: int, end: int) -> bool:
    """Whether a node is x[..., start:end]."""
    if not isinstance(node, fx.Node) or node.target != aten.slice.Tensor:
        return False
    defaults = (0, None, None, 1)  # as the operator declares them
    given: tuple[Any, ...] = (*node.args[1:], *defaults[len(node.args) - 1 :])
    size = x.meta["val"].shape[3]
    first, last, step = slice(*given[1:]).indices(size)
    return node.args[0] is x and given[0] in (3, -1) and (first, last, step) == (start, end, 1)


ROTARY = Rewrite("rotary embedding", _is_rotary, _match_rotary, _fuse_rotary)

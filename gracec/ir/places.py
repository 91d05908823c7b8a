"""Where a matmul stands in a model: its part, its block of the decoder, and what it does there.

    attention(q(x), k(x), v(x)) -> out      down(act(gate(x)) * up(x))      down(act(up(x)))

All by dataflow, and no name of a module is looked at. A matmul is of the first block whose output
depends on it. `out` is what reads attention, or a convolution along the sequence, which has no q, k
and v; in what is neither of a block, `down` is what computes from other matmuls of it alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from gracec.ir.annotations import Part, part_of
from gracec.ir.program import Program, annotation
from gracec.ir.queries import (
    CONVOLUTIONS,
    MATMULS,
    SOFTMAX,
    VIEWS,
    activation_of,
    attends,
    nearest_matmuls,
    weight_of,
)
from gracec.selectors import Place

aten = torch.ops.aten

PRODUCTS = {aten.mul.Tensor}


def places_of(program: Program) -> dict[fx.Node, Place]:
    """Every matmul-like node of an analysed program -> its place."""
    blocks = _blocks(program)
    roles = _roles(program, blocks)
    return {
        node: Place(part, blocks.get(node) if part == Part.DECODER else None, roles.get(node, ""))
        for node in program.graph.nodes
        if (part := part_of(node)) is not None
    }


def block_count(program: Program) -> int:
    """Blocks of the decoder; 0 of a module that is no vision-language model."""
    return sum(1 for _ in program.nodes(role="block_output"))


def _blocks(program: Program) -> dict[fx.Node, int]:
    """Node -> the first block whose output depends on it."""
    found: dict[fx.Node, int] = {}
    for node in reversed(program.graph.nodes):
        numbers = [found[user] for user in node.users if user in found]
        if annotation(node).get("role") == "block_output":
            numbers.append(int(annotation(node)["block"]))
        if numbers:
            found[node] = min(numbers)
    return found


def _roles(program: Program, blocks: Mapping[fx.Node, int]) -> dict[fx.Node, str]:
    """Matmuls with a weight -> what each does, as far as dataflow says."""
    found: dict[fx.Node, str] = {}
    mixing = [node for node in program.graph.nodes if attends(node)]
    ends = set(mixing)
    for node in [one for one in mixing if one.target not in CONVOLUTIONS]:
        operands, products = _operands(node)
        ends.update(products)
        for role, operand in operands.items():
            for matmul in nearest_matmuls(operand):
                if weight_of(matmul) is not None:
                    known = found.setdefault(matmul, role)
                    found[matmul] = role if known == role else "qkv"
    linears = [node for node in program.graph.nodes if _is_plain(node)]
    for node in linears:
        if node not in found and ends & nearest_matmuls([activation_of(node)], ends):
            found[node] = "out"
    for node in linears:
        before = nearest_matmuls([activation_of(node)], ends)
        inner = {one for one in before if _is_plain(one) and one not in found}
        if node in found or not before or inner != before:
            continue
        if {blocks.get(one) for one in inner} == {blocks.get(node)}:
            found[node] = "down"
            gates = {one for one in inner if len(inner) > 1 and not _goes_straight(one)}
            found |= {one: "gate" if one in gates else "up" for one in inner}
    return found


def _is_plain(node: fx.Node) -> bool:
    """Whether a node multiplies with a weight, and is no router and no adapter."""
    notes = annotation(node)
    routes = notes.get("role") == "router" or "adapter" in notes
    return node.target in MATMULS and weight_of(node) is not None and not routes


def _operands(attention: fx.Node) -> tuple[dict[str, list[fx.Node]], list[fx.Node]]:
    """Query, key and value of attention, and, where it is written out, the products that end it."""
    if attention.target not in SOFTMAX:
        names = zip("qkv", attention.args, strict=False)
        return {name: [arg] for name, arg in names if isinstance(arg, fx.Node)}, []
    scores = [one for one in nearest_matmuls([attention]) if weight_of(one) is None]
    left, products = list(attention.users), list[fx.Node]()
    while left:
        user = left.pop()
        if user.target in MATMULS:
            products.append(user)
        else:
            left += user.users
    places = {"q": (scores, 0), "k": (scores, 1), "v": (products, 1)}
    return {role: _arguments(matmuls, place) for role, (matmuls, place) in places.items()}, products


def _arguments(nodes: list[fx.Node], place: int) -> list[fx.Node]:
    return [arg for node in nodes if isinstance(arg := node.args[place], fx.Node)]


def _goes_straight(matmul: fx.Node) -> bool:
    """Whether nothing but views comes between a matmul and the product that it goes into."""
    left = list(matmul.users)
    while left:
        user = left.pop()
        if user.target in VIEWS:
            left += user.users
        elif user.target not in PRODUCTS:
            return False
    return True

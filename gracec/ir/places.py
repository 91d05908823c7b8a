"""Where a matmul stands in a model: its part, its block of the decoder, and what it does there.

    attention(q(x), k(x), v(x)) -> out      down(act(gate(x)) * up(x))      down(act(up(x)))

All by dataflow, and no name of a module is looked at. A matmul is of the first block whose output
depends on it; in what is no attention of a block, `down` is what computes from other matmuls of it
alone.
"""

from __future__ import annotations

import torch
from torch import fx

from gracec.ir.annotations import Part, part_of
from gracec.ir.program import Program, annotation
from gracec.ir.queries import MATMULS, VIEWS, activation_of, attends, nearest_matmuls, weight_of
from gracec.selectors import Place

aten = torch.ops.aten

PRODUCTS = {aten.mul.Tensor}


def places_of(program: Program) -> dict[fx.Node, Place]:
    """Every matmul-like node of an analysed program -> its place."""
    blocks, roles = _blocks(program), _roles(program)
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


def _roles(program: Program) -> dict[fx.Node, str]:
    """Matmuls with a weight -> what each does, as far as dataflow says."""
    found: dict[fx.Node, str] = {}
    attention = [node for node in program.graph.nodes if attends(node)]
    ends = set(attention)
    for node in attention:
        operands = _operands(node)
        ends |= set(operands.pop("ends", ()))
        for role, operand in operands.items():
            for matmul in nearest_matmuls(operand):
                if weight_of(matmul) is not None:
                    known = found.setdefault(matmul, role)
                    found[matmul] = role if known == role else "qkv"
    linears = [node for node in program.graph.nodes if _is_plain(node)]
    for node in linears:
        if node not in found and ends & _nearest(activation_of(node), ends):
            found[node] = "out"
    blocks = _blocks(program)
    for node in linears:
        before = _nearest(activation_of(node), ends)
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


def _operands(attention: fx.Node) -> dict[str, list[fx.Node]]:
    """Query, key and value of attention, and, where it is written out, the product that ends it."""
    if attention.target == aten.scaled_dot_product_attention.default or len(attention.args) > 2:
        names = zip("qkv", attention.args, strict=False)
        operands = {name: [arg] for name, arg in names if isinstance(arg, fx.Node)}
        if len(operands) == 3:
            return operands
    scores = [one for one in nearest_matmuls([attention]) if weight_of(one) is None]
    left, products = list(attention.users), list[fx.Node]()
    while left:
        user = left.pop()
        if user.target in MATMULS:
            products.append(user)
        else:
            left += user.users
    return {
        "q": [one.args[0] for one in scores if isinstance(one.args[0], fx.Node)],
        "k": [one.args[1] for one in scores if isinstance(one.args[1], fx.Node)],
        "v": [one.args[1] for one in products if isinstance(one.args[1], fx.Node)],
        "ends": products,
    }


def _nearest(node: fx.Node, ends: set[fx.Node]) -> set[fx.Node]:
    """The matmuls and attentions that a value is computed from, with none of them in between."""
    found, seen, left = set(), set(), [node]
    while left:
        one = left.pop()
        if one in seen:
            continue
        seen.add(one)
        if one in ends or one.target in MATMULS:
            found.add(one)
        else:
            left += one.all_input_nodes
    return found


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

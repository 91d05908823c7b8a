"""A graph as a module with a submodule for each decoder block.

    graph(ids, pixels)  ->  ids, pixels, what comes before    in the module itself
                            block 0, block 1, ...             a submodule each
                            norm, head                        in the module itself

so that a block's parameters can be gathered, and its activations computed again, one block at a
time. A block begins where the one before ends, in the order of the graph; what others need of it,
beside the hidden states, it returns too. A parameter that is read outside its block as well stays
outside and is an argument of the block. Every operator runs as before, in the same order.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from gracec.errors import GracecError
from gracec.ir.program import Program


class Block(nn.Module):
    """Some nodes of a graph.

    Args:
        checkpointed: whether activations inside are not kept for backward but computed again.
    """

    def __init__(self, graph: fx.GraphModule, *, checkpointed: bool) -> None:
        super().__init__()
        self.graph, self.checkpointed = graph, checkpointed

    def forward(self, *values: Any) -> Any:
        if not self.checkpointed or not torch.is_grad_enabled():
            return self.graph(*values)
        return checkpoint(self.graph, *values, use_reentrant=False)


def in_blocks(program: Program, *, checkpointed: bool = False) -> fx.GraphModule:
    """The graph of a program as a module with a `Block` for each decoder block, `block_0` and so
    on. Parameters keep their attribute paths, and are those of the program.

    Raises:
        GracecError: if no decoder block is known.
    """
    number_of = _numbers(program)
    homes = _homes(program, number_of)
    root, nodes_of = fx.Graph(), _by_number(number_of)
    attributes: dict[str, Any] = {}
    env: dict[fx.Node, Any] = {}

    def read(node: fx.Node) -> Any:
        if node not in env and node.op == "get_attr":
            attributes[str(node.target)] = program.tensor(str(node.target))
            env[node] = root.get_attr(str(node.target))
        return env[node]

    for node in program.graph.nodes:
        number = number_of.get(node)
        if node.op == "get_attr" or (number is not None and node is not nodes_of[number][-1]):
            continue
        if number is None:
            env[node] = root.node_copy(node, read)
            continue
        graph, taken, returned = _graph_of(nodes_of[number], number, homes)
        tensors = {
            str(one.target): program.tensor(str(one.target))
            for one in graph.find_nodes(op="get_attr")
        }
        block = Block(fx.GraphModule(tensors, graph), checkpointed=checkpointed)
        attributes[f"block_{number}"] = block
        call = root.call_module(f"block_{number}", tuple(read(one) for one in taken))
        for position, one in enumerate(returned):
            env[one] = root.call_function(operator.getitem, (call, position))
    root.set_codegen(copy.copy(program.graph._codegen))
    return fx.GraphModule(attributes, root)


def blocks_of(module: nn.Module) -> Iterator[Block]:
    """The blocks of what `in_blocks` made, in order."""
    return (child for child in module.children() if isinstance(child, Block))


def by_path(module: nn.Module) -> dict[str, nn.Parameter]:
    """Attribute path in the program -> each parameter of what `in_blocks` made."""
    every = module.named_parameters(remove_duplicate=False)
    return {name.partition(".graph.")[2] or name: parameter for name, parameter in every}


def _graph_of(
    nodes: Sequence[fx.Node], number: int, homes: Mapping[str, set[int | None]]
) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """The graph of a block, what it takes and what it returns."""
    graph, inside = fx.Graph(), set(nodes)
    env: dict[fx.Node, fx.Node] = {}
    taken: list[fx.Node] = []
    own = {
        one
        for node in nodes
        for one in node.all_input_nodes
        if one.op == "get_attr" and homes[str(one.target)] == {number}
    }
    for node in nodes:
        for one in node.all_input_nodes:
            if one not in inside | own and one not in env:
                taken.append(one)
                env[one] = graph.placeholder(one.name)
    for node in nodes:
        for one in node.all_input_nodes:
            if one in own and one not in env:
                env[one] = graph.get_attr(str(one.target))
        env[node] = graph.node_copy(node, lambda one: env[one])
    returned = [node for node in nodes if node.users.keys() - inside]
    graph.output(tuple(env[node] for node in returned))
    return graph, taken, returned


def _numbers(program: Program) -> dict[fx.Node, int]:
    """What computes in a decoder block -> its number."""
    ends = {node: number for number, node in enumerate(program.nodes(role="block_output"))}
    if not ends:
        raise GracecError("no decoder block is known", fix="run analyze-modality first")
    found: dict[fx.Node, int] = {}
    number, merge = -1, program.node(role="merge")
    for node in program.graph.nodes:
        if number >= 0 and node.op not in ("get_attr", "placeholder"):
            found[node] = number
        if node is merge:
            number = 0
        elif node in ends:
            number = ends[node] + 1
            if number == len(ends):
                break
    return found


def _by_number(number_of: Mapping[fx.Node, int]) -> dict[int, list[fx.Node]]:
    found: dict[int, list[fx.Node]] = {}
    for node, number in number_of.items():
        found.setdefault(number, []).append(node)
    return found


def _homes(program: Program, number_of: Mapping[fx.Node, int]) -> dict[str, set[int | None]]:
    """Attribute path of each tensor -> the blocks that read it; None for what is outside."""
    found: dict[str, set[int | None]] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        found.setdefault(str(node.target), set()).update(number_of.get(user) for user in node.users)
    return found

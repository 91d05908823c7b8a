"""Samples on their way through a graph, some nodes at a time, with what is live between them alone.

To look at the inputs of a layer that other samples have decided on the weights of, all samples have
to come to the layer before any goes on. A `Stream` takes them from one place of the graph to the
next, each sample by itself, and keeps a value until the last node that reads it has run. What does
not depend on a sample, or is the same for several, is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gracec.ir.program import Program

Names = tuple[str, ...]
ALONE = ("",)
"""Of a value that no two samples share."""
Key = tuple[int, ...]


class Stream:
    """Samples in the middle of a graph.

    Args:
        samples: inputs of the program; those that are missing are the example's.
        until: nodes that are looked at; nothing else is computed than what they depend on, and they
            stay until they are released.
        stand_ins: what makes the value of a node in the place of its operator.
    """

    def __init__(
        self,
        program: Program,
        samples: Sequence[Mapping[str, Tensor]],
        until: Collection[fx.Node],
        stand_ins: Mapping[fx.Node, Callable[[], Tensor]] | None = None,
    ) -> None:
        self.program, self.stand_ins = program, stand_ins or {}
        self.samples = [{**program.example_inputs, **sample} for sample in samples]
        nodes = list(program.graph.nodes)
        # What is written into may be read under another name: a view of it.
        needed = _needed([*until, *filter(_writes, nodes)], self.stand_ins)
        self.nodes = [node for node in nodes if node in needed]
        self.at = 0
        self._watched = set(until)
        self._inputs = self._inputs_of_nodes()
        if any(map(_writes, self.nodes)):  # into something that then belongs to one sample
            self._inputs = {
                node: names if node.op == "get_attr" or node in self.stand_ins else ALONE
                for node, names in self._inputs.items()
            }
        self._last_reader: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for operand in self._operands(node):
                self._last_reader[operand] = node
        self._position = {node: place for place, node in enumerate(self.nodes)}
        self._last_sample: dict[tuple[Names, Key], int] = {}
        for names in set(self._inputs.values()):
            for sample in range(len(self.samples)):
                self._last_sample[names, self._key(names, sample)] = sample
        self._values: dict[tuple[fx.Node, Key], Any] = {}

    @torch.no_grad()
    def advance(self, node: fx.Node) -> None:
        """Compute a node that is looked at, and everything in front of it."""
        end = self._position[node] + 1
        segment, self.at = self.nodes[self.at : end], max(self.at, end)
        for sample in range(len(self.samples)):
            for each in segment:
                place = each, self._key(self._inputs[each], sample)
                if place not in self._values:
                    self._values[place] = self._compute(each, sample)
                for operand in self._operands(each):
                    if self._last_reader[operand] is each and operand not in self._watched:
                        self._drop(operand, sample)

    def value(self, node: fx.Node, sample: int) -> Any:
        """The value of a node for a sample."""
        return self._values[node, self._key(self._inputs[node], sample)]

    def release(self, node: fx.Node) -> None:
        """Say that a node is not looked at any more."""
        self._watched.discard(node)
        reader = self._last_reader.get(node)
        if reader is None or self._position[reader] < self.at:
            for sample in range(len(self.samples)):
                self._drop(node, sample)

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        return [] if node in self.stand_ins else node.all_input_nodes

    def _inputs_of_nodes(self) -> dict[fx.Node, Names]:
        """Names of the inputs that each node depends on."""
        found: dict[fx.Node, Names] = {}
        for node in self.nodes:
            names = {name for operand in self._operands(node) for name in found[operand]}
            found[node] = (str(node.target),) if node.op == "placeholder" else tuple(sorted(names))
        return found

    def _drop(self, node: fx.Node, sample: int) -> None:
        """Let go of a value if no later sample has the same."""
        names = self._inputs[node]
        key = self._key(names, sample)
        if self._last_sample[names, key] == sample:
            self._values.pop((node, key), None)

    def _key(self, names: Names, sample: int) -> Key:
        """Equal for samples for which a value that depends on these inputs is the same."""
        if names == ALONE:
            return (sample,)
        return tuple(id(self.samples[sample][name]) for name in names)

    def _compute(self, node: fx.Node, sample: int) -> Any:
        if node in self.stand_ins:
            return self.stand_ins[node]()
        if node.op == "placeholder":
            return self.samples[sample][str(node.target)]
        if node.op == "get_attr":
            return self.program.tensor(str(node.target))

        def value(operand: fx.Node) -> Any:
            return self.value(operand, sample)

        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if node.op == "call_module":
            module = self.program.graph_module.get_submodule(str(node.target))
            return module(*args, **kwargs)
        function: Any = node.target
        if node.op == "call_method":
            return getattr(args[0], str(function))(*args[1:], **kwargs)
        return function(*args, **kwargs)


def _writes(node: fx.Node) -> bool:
    """Whether a node changes one of its operands."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _needed(until: Collection[fx.Node], stand_ins: Collection[fx.Node]) -> set[fx.Node]:
    """What some nodes depend on, themselves included."""
    found, left = set[fx.Node](), list(until)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += [] if node in stand_ins else node.all_input_nodes
    return found

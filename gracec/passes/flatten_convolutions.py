"""flatten-convolutions: let the weight of a convolution be a matrix, as that of a linear is.

    conv2d(x, w [O, I, kh, kw], b, ...)  ->  gracec::conv2d(x, w [O, I * kh * kw], b, ...)

The matrix shares the memory of the weight. Whatever plans, trains and freezes matrices then does so
with convolutions too; one scale for each output is one for each filter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from gracec.passes.base import Pass, PassResult
from gracec.program import Program

CONVOLUTION = torch.ops.aten.conv2d.default
FLAT_CONVOLUTION = torch.ops.gracec.conv2d.default
_DEFAULTS: tuple[Any, ...] = (None, (1, 1), (0, 0), (1, 1), 1)
"""What a graph leaves out: bias, stride, padding, dilation, groups."""


@dataclass(frozen=True)
class FlattenConvolutions(Pass):
    """No options."""

    name: ClassVar[str] = "flatten-convolutions"
    keeps_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> PassResult:
        weights = {
            str(node.args[1].target)
            for node in program.nodes(CONVOLUTION)
            if isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr"
        }
        flattened = 0
        for target in sorted(weights):
            weight = program.tensor(target)
            readers = [n for n in program.graph.find_nodes(op="get_attr") if n.target == target]
            users = [user for reader in readers for user in reader.users]
            if any(user.target != CONVOLUTION for user in users):
                continue  # something else reads it as it is
            kernel = list(weight.shape[2:])
            matrix = weight.detach().view(len(weight), -1)
            program.set_tensor(target, nn.Parameter(matrix, requires_grad=weight.requires_grad))
            for reader in readers:
                traced = reader.meta["val"]
                reader.meta["val"] = traced.new_empty(matrix.shape)
            for node in users:
                self._flatten(program.graph, node, kernel)
                flattened += 1
        return PassResult(program, bool(flattened), (f"{flattened} convolutions",))

    @staticmethod
    def _flatten(graph: fx.Graph, node: fx.Node, kernel: list[int]) -> None:
        assert not node.kwargs
        given: tuple[Any, ...] = node.args
        x, weight, *rest = given
        bias, *sizes, groups = (*rest, *_DEFAULTS[len(rest) :])
        pairs = [list(size) if isinstance(size, (list, tuple)) else size for size in sizes]
        with graph.inserting_before(node):
            flat = graph.call_function(FLAT_CONVOLUTION, (x, weight, bias, kernel, *pairs, groups))
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat)
        graph.erase_node(node)

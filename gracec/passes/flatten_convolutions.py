"""flatten-convolutions: let the weight of a convolution be a matrix, as that of a linear is.

    conv2d(x, w [O, I, kh, kw], b, ...)  ->  gracec::conv2d(x, w [O, I * kh * kw], b, ...)

The matrix shares the memory of the weight. Whatever plans, trains and freezes matrices then does so
with convolutions too; one scale for each output is one for each filter. The notes say why any other
convolution stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx, nn

from gracec.ir.program import Program
from gracec.passes.base import Pass, PassResult
from gracec.passes.rewrite import Mismatch, Rewrite, described, rewrite

aten = torch.ops.aten
CONVOLUTION = aten.conv2d.default
FLAT_CONVOLUTION = torch.ops.gracec.conv2d.default
BY_NAME = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
OTHERS = (
    aten.conv1d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)
DEFAULTS = {"bias": None, "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
"""What a graph may leave out, in the order of the arguments."""


@dataclass(frozen=True)
class FlattenConvolutions(Pass):
    """No options."""

    name: ClassVar[str] = "flatten-convolutions"
    keeps_numerics: ClassVar[bool] = True

    def apply(self, program: Program) -> PassResult:
        done = rewrite(program, [CONVOLUTIONS])
        return PassResult(program, done.modified, (*done.refusals, done.summary))


class Convolution(NamedTuple):
    """Operands of gracec::conv2d, but for the weight, which may have to become a matrix first.

    Attributes:
        readers: every get_attr node of the weight; there may be one for each convolution.
        options: stride, padding, dilation, groups.
    """

    x: fx.Node
    weight: fx.Node
    readers: list[fx.Node]
    bias: fx.Node | None
    kernel: list[int]
    options: list[Any]


def _is_convolution(node: fx.Node) -> bool:
    return node.target in (CONVOLUTION, *BY_NAME, *OTHERS)


def _match(node: fx.Node) -> Convolution:
    if node.target in BY_NAME:
        raise Mismatch(f"the padding is given as text, {_given(node)['padding']!r}")
    if node.target != CONVOLUTION:
        raise Mismatch(f"{described(node)} has no form with a matrix, aten.conv2d has")
    given = DEFAULTS | _given(node)
    weight = given["weight"]
    if weight.op != "get_attr":
        raise Mismatch(f"the weight is no parameter, but {described(weight)}")
    every = node.graph.find_nodes(op="get_attr")
    readers = [reader for reader in every if reader.target == weight.target]
    users = [user for reader in readers for user in reader.users]
    for user in users:
        if user.target not in (CONVOLUTION, FLAT_CONVOLUTION) or user.args[1] not in readers:
            raise Mismatch(f"{described(user)} reads the weight as well")
    options = [given[name] for name in ("stride", "padding", "dilation")]
    pairs = [list(sizes) if isinstance(sizes, (list, tuple)) else sizes for sizes in options]
    return Convolution(
        given["input"],
        weight,
        readers,
        given["bias"],
        _kernel(weight, users),
        [*pairs, given["groups"]],
    )


def _given(node: fx.Node) -> dict[str, Any]:
    """The arguments of a convolution by name."""
    target: Any = node.target
    names = (argument.name for argument in target._schema.arguments)
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _kernel(weight: fx.Node, users: list[fx.Node]) -> list[int]:
    """kh and kw, which only other convolutions know when they have made the weight a matrix."""
    flat: list[Any] = [user.args[3] for user in users if user.target == FLAT_CONVOLUTION]
    return list(flat[0] if flat else weight.meta["val"].shape[2:])


def _flatten(program: Program, node: fx.Node, found: Convolution) -> None:
    target = str(found.weight.target)
    weight = program.tensor(target)
    if weight.dim() != 2:
        matrix = weight.detach().view(len(weight), -1)
        program.set_tensor(target, nn.Parameter(matrix, requires_grad=weight.requires_grad))
        for reader in found.readers:
            reader.meta["val"] = reader.meta["val"].new_empty(matrix.shape)
    x, weight_node, _, bias, kernel, options = found
    with program.graph.inserting_before(node):
        arguments = (x, weight_node, bias, kernel, *options)
        flat = program.graph.call_function(FLAT_CONVOLUTION, arguments)
    flat.meta = dict(node.meta)
    node.replace_all_uses_with(flat)
    program.graph.erase_node(node)


CONVOLUTIONS = Rewrite("convolution", _is_convolution, _match, _flatten)

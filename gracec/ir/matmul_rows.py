"""What a weight is multiplied with: rows [n, K] of each of the matrices that it consists of.

A linear has one. A convolution has one for each of its groups, and its rows are the patches that
the filters see. Routed experts have one each, and its rows are the tokens that it was chosen for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from gracec.ir.queries import EXPERT_LINEAR
from gracec.quant.ops_experts import rows_of_experts

CONVOLUTION = torch.ops.gracec.conv2d.default


def matmul_rows(target: Any, x: Tensor, how: tuple[Any, ...]) -> Iterator[tuple[int, Tensor]]:
    """The rows [n, K] that each matrix of a weight multiplies.

    Args:
        target: the operator: a linear, gracec::conv2d or gracec::expert_linear.
        x: its first operand.
        how: what `rows_operands` gave for the node.
    """
    if target == EXPERT_LINEAR:
        for expert, rows in rows_of_experts(how[0]):
            yield expert, x[rows]
    elif target == CONVOLUTION:
        kernel, stride, padding, dilation, groups = how
        # [B, C * kh * kw, L], of one picture without B.
        columns = nn.functional.unfold(x, kernel, dilation, padding, stride)
        rows = columns.mT.reshape(-1, groups, columns.shape[-2] // groups)
        for group in range(groups):
            yield group, rows[:, group]
    else:
        yield 0, x.reshape(-1, x.shape[-1])


def rows_operands(node: fx.Node) -> tuple[Any, ...]:
    """The operands of a matmul, beside its first, that decide on its rows."""
    if node.target == EXPERT_LINEAR:
        return (node.args[2],)
    return node.args[3:] if node.target == CONVOLUTION else ()


def matmul_shape(node: fx.Node) -> tuple[int, int]:
    """Of the weight of a matmul: how many matrices it consists of, and the columns of each."""
    arguments: Any = node.args
    columns = int(arguments[1].meta["val"].shape[-1])
    if node.target == EXPERT_LINEAR:
        return arguments[3], columns
    return (arguments[7] if node.target == CONVOLUTION else 1), columns

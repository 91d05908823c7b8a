"""The operator of routed experts: a linear whose weight is another one for each row.

    y[s] = x[s] @ weight[experts[s]].T

The rows of one expert are multiplied in one matmul, in the order in which they come, by the very
call that the loop of transformers makes, so that both round alike. Which rows an expert gets
depends on data, so the loop is inside one operator, whose result has as many rows as `x`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rows_of_experts(experts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert that is asked, and its rows int64 [n] in order.

    Args:
        experts: int64 [S].
    """
    for expert in torch.unique(experts).tolist():
        yield expert, torch.where(experts == expert)[0]


def multiply_by_expert(
    x: Tensor, experts: Tensor, features: int, multiply: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Rows [S, N] in the dtype of `x` [S, K], each multiplied by its expert.

    Args:
        experts: int64 [S].
        features: N.
        multiply: number of an expert and its rows [n, K] -> [n, N].
    """
    result = x.new_zeros(len(x), features)
    for expert, rows in rows_of_experts(experts):
        result[rows] = multiply(expert, x[rows]).to(x.dtype)
    return result


def _each(weight: Tensor, count: int) -> Tensor:
    """[E, N, K] of a weight that may be a matrix."""
    return weight if weight.dim() == 3 else weight.unflatten(0, (count, -1))


@torch.library.custom_op("gracec::expert_linear", mutates_args=())
def expert_linear(x: Tensor, weight: Tensor, experts: Tensor, count: int) -> Tensor:
    """Multiply each row by the weight of its expert.

    Args:
        x: [S, K].
        weight: [E, N, K], or the matrix [E * N, K] of all experts one after the other, which is
            quantized as that of a linear is.
        experts: int64 [S], the number of the expert of each row.
        count: E.

    Returns:
        [S, N] in the dtype of `x`.
    """
    each = _each(weight, count)
    return multiply_by_expert(
        x, experts, each.shape[1], lambda expert, rows: functional.linear(rows, each[expert])
    )


@expert_linear.register_fake
def _(x: Tensor, weight: Tensor, experts: Tensor, count: int) -> Tensor:
    return x.new_empty((x.shape[0], _each(weight, count).shape[1]))


@torch.library.custom_op("gracec::expert_linear_backward", mutates_args=())
def expert_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, experts: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, in their dtypes, from that of the result [S, N]."""
    each = _each(weight, count)
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(each)
    for expert, rows in rows_of_experts(experts):
        part = grad[rows]
        grad_x[rows] = (part @ each[expert].to(part.dtype)).to(x.dtype)
        grad_weight[expert] = (part.t() @ x[rows].to(part.dtype)).to(weight.dtype)
    return grad_x, grad_weight.reshape(weight.shape)


@expert_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, experts: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, experts, ctx.count = inputs
    ctx.save_for_backward(x, weight, experts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight = expert_linear_backward(grad, *ctx.saved_tensors, ctx.count)
    return grad_x, grad_weight, None, None


expert_linear.register_autograd(_backward, setup_context=_save)

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gracec.passes.fusions.norm import NORM
from tests.rewrites import fused, graph_of, reasons

X, W = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)), torch.linspace(1, 2, 8)


def root(x: Tensor, **options: Any) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), in other forms as options say."""
    power, axis = options.get("power", 2), options.get("axis", -1)
    mean = x.pow(power).mean(axis, keepdim=axis == -1)
    return torch.rsqrt(mean + options.get("epsilon", 1e-6))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, weight: weight * (x * root(x)),
        lambda x, weight: (x * root(x)) * weight,
        lambda x, weight: (root(x) * x) * weight,
    ],
)
def test_a_norm_in_any_order(compute: Callable[..., Tensor]) -> None:
    assert fused(graph_of(compute, W, {"x": X}), NORM) == 1


def test_a_norm_of_a_norm() -> None:
    def compute(x: Tensor, weight: Tensor) -> Tensor:
        inner = weight * (x * root(x))
        return weight * (inner * root(inner))

    assert fused(graph_of(compute, W, {"x": X}), NORM) == 2


REFUSED: list[tuple[Callable[..., Tensor], str]] = [
    (
        lambda x, weight: (1 + weight) * (x * root(x)),
        "the weight is computed by aten.add.Tensor",
    ),
    (
        lambda x, weight: weight.double() * (x * root(x)).to(torch.float64),
        "the weight is computed by aten.to.dtype",
    ),
    (
        lambda x, weight: weight * (x * root(x)).to(torch.float64),
        "the scaled input is cast by aten.to.dtype",
    ),
    (lambda x, weight: weight * (x * root(x).to(torch.float64)), "the root is cast"),
    (
        lambda x, weight: x * (weight * root(x)),
        "the weight scales the root, not the scaled input",
    ),
    (
        lambda x, weight: weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))),
        "the root is of aten.mean.dim, not of a mean plus a number",
    ),
    (
        lambda x, weight: weight * (x * root(x, epsilon=weight.mean())),
        "the root is of aten.add.Tensor, not of a mean plus a number",
    ),
    (
        lambda x, weight: weight * (x * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6)),
        "the root is of aten.var.dim, not of a mean",
    ),
    (
        lambda x, weight: weight * (x * root(x, axis=(0, 1, 2))),
        "the mean is over [0, 1, 2], not over the last dimension, kept",
    ),
    (
        lambda x, weight: weight * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6)),
        "the mean is of aten.abs, not of squares",
    ),
    (
        lambda x, weight: weight * (x * root(x, power=4)),
        "the mean is of aten.pow.Tensor_Scalar, not of squares",
    ),
    (lambda x, weight: weight * (x * root(x + 1)), "what is squared is not what is scaled"),
    (
        lambda x, weight: weight.mean(0) * (x * root(x)),
        "the weight is computed by aten.mean.dim",
    ),
]


@pytest.mark.parametrize(("compute", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_is_another_norm_stays(compute: Callable[..., Tensor], reason: str) -> None:
    assert reasons(graph_of(compute, W, {"x": X}), NORM) == [reason]


@pytest.mark.parametrize("shape", [(), (1,), (3, 8)])
def test_a_weight_of_another_shape(shape: tuple[int, ...]) -> None:
    graph = graph_of(lambda x, weight: weight * (x * root(x)), torch.ones(shape), {"x": X})
    reason = f"the weight has the shape {list(shape)}, the input has 8 features"
    assert reasons(graph, NORM) == [reason]


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, weight: weight * x.softmax(-1),
        lambda x, weight: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True)),
        lambda x, weight: weight * torch.nn.functional.layer_norm(x, (8,)),
        lambda x, weight: weight * (x + x * root(x)),
    ],
)
def test_what_is_no_norm_is_no_candidate(compute: Callable[..., Tensor]) -> None:
    assert reasons(graph_of(compute, W, {"x": X}), NORM) == []

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gracec.passes.fusions.rotary import ROTARY
from tests.rewrites import fused, graph_of, reasons

RANDOM = torch.Generator().manual_seed(0)
X = torch.randn(1, 3, 16, generator=RANDOM)
ANGLES = torch.randn(1, 3, 4, generator=RANDOM)
W = torch.ones(1)


def heads(x: Tensor) -> Tensor:
    return x.view(1, 3, 2, 8).transpose(1, 2)


def twice(angles: Tensor) -> Tensor:
    return torch.cat((angles, angles), -1)


def turned(x: Tensor, at: int = 4) -> Tensor:
    return torch.cat((-x[..., at:], x[..., :at]), -1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + turned(x) * sin


def table(values: Tensor) -> Tensor:
    return values.unsqueeze(1)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, cos, sin: x * cos + turned(x) * sin,
        lambda x, cos, sin: sin * turned(x) + cos * x,
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_projection_is_turned(compute: Callable[..., Tensor], scale: float) -> None:
    def forward(x: Tensor, angles: Tensor, weight: Tensor) -> Tensor:
        cos, sin = (twice(angles).cos() * scale, twice(angles).sin() * scale)
        found: Tensor = compute(heads(x), table(cos), table(sin)) * weight
        return found

    assert fused(graph_of(forward, W, {"x": X, "angles": ANGLES}), ROTARY) == 1


def of(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """A function of heads and the tables, as a function of the inputs."""

    def compute(x: Tensor, angles: Tensor, weight: Tensor) -> Tensor:
        both = twice(angles)
        return change(heads(x), table(both.cos()), table(both.sin())) * weight

    return compute


def with_tables(change: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """A rotary embedding by tables that are computed otherwise."""

    def compute(x: Tensor, angles: Tensor, weight: Tensor) -> Tensor:
        return rotary(heads(x), *change(angles)) * weight

    return compute


REFUSED: list[tuple[Callable[..., Tensor], str]] = [
    (
        of(lambda x, cos, sin: torch.add(x * cos, turned(x) * sin, alpha=2)),
        "one of the products is scaled when they are added",
    ),
    (
        of(lambda x, cos, sin: rotary(x.abs(), cos, sin)),
        "what is turned is no projection seen as heads, but aten.abs",
    ),
    (
        lambda x, angles, weight: (
            weight
            * rotary(x.view(1, 2, 3, 8), table(twice(angles).cos()), table(twice(angles).sin()))
        ),
        "what is turned is no projection seen as heads, but aten.view",
    ),
    (
        with_tables(lambda a: (twice(a).cos(), table(twice(a).sin()))),
        "the cosine is not [B, S, D], seen as [B, 1, S, D]",
    ),
    (
        with_tables(lambda a: (table(twice(a).cos()), twice(a).sin())),
        "the sine is not [B, S, D], seen as [B, 1, S, D]",
    ),
    (
        with_tables(lambda a: (table(twice(a.cos())), table(twice(a).sin()))),
        "the cosine is changed after it is taken, by aten.cat",
    ),
    (
        with_tables(lambda a: (table(twice(a).cos()), table(twice(a.sin())))),
        "the sine is changed after it is taken, by aten.cat",
    ),
    (
        with_tables(lambda a: (table(torch.cat((a, a + 1), -1).cos()), table(twice(a).sin()))),
        "the cosine is not of angles that come twice",
    ),
    (
        with_tables(lambda a: (table(twice(a).cos()), table(a.repeat(1, 1, 2).sin()))),
        "the sine is not of angles that come twice",
    ),
    (
        of(lambda x, cos, sin: x * cos + x * sin),
        "what the sine multiplies is not cat(-x[h:], x[:h])",
    ),
    (
        of(lambda x, cos, sin: x * cos + torch.cat((x[..., 4:], x[..., :4]), -1) * sin),
        "what the sine multiplies is not cat(-x[h:], x[:h])",
    ),
    (
        of(lambda x, cos, sin: x * cos + torch.cat((x[..., :4], -x[..., 4:]), -1) * sin),
        "what the sine multiplies is not cat(-x[h:], x[:h])",
    ),
    (
        of(lambda x, cos, sin: x * cos + turned(x, at=2) * sin),
        "what the sine multiplies is not cat(-x[h:], x[:h])",
    ),
    (
        of(lambda x, cos, sin: x * cos + torch.cat((-x[..., 1::2], x[..., ::2]), -1) * sin),
        "what the sine multiplies is not cat(-x[h:], x[:h])",
    ),
]


@pytest.mark.parametrize(("compute", "reason"), REFUSED)
def test_what_is_turned_otherwise_stays(compute: Callable[..., Tensor], reason: str) -> None:
    assert reasons(graph_of(compute, W, {"x": X, "angles": ANGLES}), ROTARY) == [reason]


@pytest.mark.parametrize(
    "compute",
    [
        of(lambda x, cos, sin: x * cos + x),
        of(lambda x, cos, sin: x * cos - turned(x) * sin),
        of(lambda x, cos, sin: x * cos + turned(x) * cos),
        of(lambda x, cos, sin: x * x + turned(x) * x),
    ],
)
def test_what_has_no_cosine_and_sine_is_no_candidate(compute: Callable[..., Tensor]) -> None:
    assert reasons(graph_of(compute, W, {"x": X, "angles": ANGLES}), ROTARY) == []

"""The rows are what a weight multiplies: rows times the matrix are what the operator gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gracec.ir.matmul_rows import CONVOLUTION, matmul_rows, matmul_shape, rows_operands
from gracec.ir.queries import EXPERT_LINEAR
from gracec.module import capture_module
from gracec.passes import parse_pipeline, run_passes
from gracec.passes.flatten_convolutions import FlattenConvolutions

LINEAR = torch.ops.aten.linear.default


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_a_linear() -> None:
    x, weight = random(2, 3, 5, 8), random(6, 8)
    ((part, rows),) = matmul_rows(LINEAR, x, ())
    assert part == 0 and rows.shape == (30, 8)
    expected = torch.nn.functional.linear(x, weight).reshape(30, 6)
    torch.testing.assert_close(rows @ weight.T, expected)


CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": (1, 2)},
    "dilation": {"dilation": (2, 1), "padding": 1},
    "one by three": {"kernel_size": (1, 3), "padding": (0, 1)},
    "groups": {"groups": 2, "stride": (2, 1), "padding": 1},
    "depthwise": {"groups": 4, "out_channels": 8, "dilation": 2},
}


@pytest.mark.parametrize("batch", [(2,), ()], ids=["pictures", "one picture"])
@pytest.mark.parametrize("options", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution(options: dict[str, Any], batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    given = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "bias": False} | options
    net, x = nn.Conv2d(**given), random(*batch, 4, 9, 10)
    program = capture_module(nn.Sequential(net), {"input": x})
    program = FlattenConvolutions().run(program).program
    (node,) = program.nodes(CONVOLUTION)
    parts, features = matmul_shape(node)
    assert (parts, features) == (net.groups, net.weight[0].numel())
    matrices = net.weight.detach().flatten(1).chunk(parts)
    found = dict(matmul_rows(CONVOLUTION, x, rows_operands(node)))
    assert list(found) == list(range(parts))
    outputs = [found[part] @ matrix.T for part, matrix in enumerate(matrices)]
    expected = net(x).detach().flatten(-2).mT.reshape(-1, net.out_channels)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-4, atol=1e-5)


def test_routed_experts() -> None:
    """Each has its own rows; one that nobody asks has none."""
    x, weight = random(9, 8), random(4, 6, 8)
    experts = torch.tensor([2, 0, 2, 3, 3, 0, 2, 2, 0])
    expected = EXPERT_LINEAR(x, weight, experts, 4)
    found, seen = torch.full((9, 6), float("nan")), []
    for expert, rows in matmul_rows(EXPERT_LINEAR, x, (experts,)):
        seen.append(expert)
        found[experts == expert] = rows @ weight[expert].T
    assert seen == [0, 2, 3]
    torch.testing.assert_close(found, expected)


def test_operands_and_shapes_of_what_is_no_convolution() -> None:
    program = run_passes(
        capture_module(nn.Linear(8, 6), {"input": random(2, 8)}), parse_pipeline("analyze-module")
    ).program
    (node,) = program.nodes(LINEAR)
    assert rows_operands(node) == () and matmul_shape(node) == (1, 8)

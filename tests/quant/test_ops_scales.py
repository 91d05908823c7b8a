"""Codes times trainable scales: the product of `dequantize`, and a gradient for scales alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gracec import quant
from gracec.quant.codes import SCALE_MAX, SCALE_MIN
from gracec.quant.ops_scales import scale_codes

ROWS, COLUMNS, GROUP = 6, 32, 16


def operands(bits: int = 4, shape: tuple[int, int] = (ROWS, COLUMNS // GROUP)) -> Any:
    """Codes as stored, scales on their grid, and signs of which half are negative."""
    generator = torch.Generator().manual_seed(bits)
    low, high = quant.code_range(bits)
    codes = torch.randint(low, high + 1, (ROWS, COLUMNS), generator=generator, dtype=torch.int8)
    scales = quant.round_scale(torch.rand(shape, generator=generator) + 0.1, "bf16")
    signs = (2 * torch.randint(0, 2, shape, generator=generator) - 1).to(torch.int8)
    return quant.store_codes(codes, bits), scales, signs


def test_every_scale_of_the_grid_comes_back_from_its_logarithm() -> None:
    bits = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    grid = bits[(bits >= SCALE_MIN) & (bits <= SCALE_MAX)]
    assert len(grid) == 33 * 128, "all significands between 2^-17 and 65280"
    for parametrization in ("log", "lsq"):
        param = quant.scale_to_param(grid, parametrization)
        assert torch.equal(quant.scale_from_param(param, parametrization, "bf16"), grid)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("parametrization", ["log", "lsq"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_dequantize_gives(bits: int, parametrization: str, dtype: str) -> None:
    codes, scales, signs = operands(bits)
    param = quant.scale_to_param(scales, parametrization)
    found = scale_codes(codes, param, signs, GROUP, parametrization, "bf16", dtype)
    expected = quant.dequantize(codes, scales * signs, GROUP, getattr(torch, dtype))
    assert torch.equal(found, expected)
    positive = scale_codes(codes, param, None, GROUP, parametrization, "bf16", dtype)
    assert torch.equal(positive, quant.dequantize(codes, scales, GROUP, getattr(torch, dtype)))


def by_autograd(
    codes: Tensor, param: Tensor, signs: Tensor | None, group: int, parametrization: str
) -> Tensor:
    """The same product of ATen operators, without the rounding to the grid."""
    magnitude = param.exp() if parametrization == "log" else param.abs()
    scales = magnitude if signs is None else magnitude * signs
    spread = scales.expand(ROWS, -1).repeat_interleave(group, 1)
    return quant.read_codes(codes).float() * spread


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("parametrization", ["log", "lsq"])
@pytest.mark.parametrize(
    ("shape", "group"), [((ROWS, 2), GROUP), ((ROWS, 1), COLUMNS), ((1, 1), COLUMNS)]
)
def test_the_gradient_is_that_of_the_product(
    signed: bool, parametrization: str, shape: tuple[int, int], group: int
) -> None:
    codes, scales, signs = operands(shape=shape)
    weights = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))
    found = []
    for run in (scale_codes, by_autograd):
        param = quant.scale_to_param(scales, parametrization).requires_grad_()
        options = ("bf16", "float32") if run is scale_codes else ()
        product = run(codes, param, signs if signed else None, group, parametrization, *options)  # type: ignore[operator]
        (product * weights).sum().backward()
        found.append(param.grad)
    torch.testing.assert_close(*found)
    assert found[0].abs().min() > 0


def test_the_rounding_to_the_grid_is_passed_straight_through() -> None:
    """The slope is that at the scale of the grid, wherever the parameter is beside it."""
    codes, scales, _ = operands()
    found = []
    for offset in (0.0, 1e-4):
        param = (scales.log() + offset).requires_grad_()
        scale_codes(codes, param, None, GROUP, "log", "bf16", "float32").sum().backward()
        found.append(param.grad)
    assert torch.equal(*found)


def test_the_matrix_of_experts_is_a_weight_like_any_other() -> None:
    codes, scales, signs = operands()
    one = scale_codes(codes[:3], scales[:3].log(), signs[:3], GROUP, "log", "bf16", "float32")
    all_of_them = scale_codes(codes, scales.log(), signs, GROUP, "log", "bf16", "float32")
    assert torch.equal(all_of_them[:3], one)


def test_the_operator_keeps_the_rules_of_torch() -> None:
    codes, scales, signs = operands()
    for given in (None, signs):
        arguments = (codes, scales.log().requires_grad_(), given, GROUP, "log", "bf16", "float32")
        torch.library.opcheck(torch.ops.gracec.scale_codes.default, arguments)

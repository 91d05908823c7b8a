"""Codes and scales found again from floats, and nothing found where there are none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gracec import quant
from gracec.quant import QuantSpec
from gracec.quant.lattice import find_lattice, other_grid
from tests.backends.artifacts import random_weight


def with_lowest_code(spec: QuantSpec, seed: int = 0) -> quant.FrozenWeight:
    """Random codes with the lowest one in each group: which sign the scale has is certain then."""
    weight = random_weight((24, 256), spec, seed)
    codes = weight.codes
    codes[:, :: spec.group_of(256)] = quant.code_range(spec.bits)[0]
    return quant.FrozenWeight.from_codes(codes, weight.scales, spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_codes_and_values_are_found_again(group: int, signed: bool, dtype: torch.dtype) -> None:
    spec = QuantSpec(4, group, signed=signed)
    weight = with_lowest_code(spec)
    dense = weight.dequantize(dtype)
    for given in (dense, dense.float()):  # widened when a model is loaded
        found = find_lattice(given, spec)
        assert found is not None and found.changed == 0
        codes = quant.quantize(given, found.scales, 4, group)
        assert torch.equal(codes, weight.codes)
        assert torch.equal(quant.dequantize(codes, found.scales, group, dtype), dense)


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(2, 64),
        QuantSpec(3, 32, signed=True),
        QuantSpec(4, granularity="per_channel"),
        QuantSpec(4, granularity="per_tensor"),
    ],
    ids=str,
)
def test_other_widths_and_granularities(spec: QuantSpec) -> None:
    weight = random_weight((24, 256), spec, 1)
    dense = weight.dequantize(torch.bfloat16)
    found = find_lattice(dense, spec)
    assert found is not None and found.changed == 0 and found.scales.shape == weight.scales.shape
    group = weight.group_size
    flat = dense.reshape(1, -1) if spec.granularity == "per_tensor" else dense
    group = flat.shape[1] if spec.granularity == "per_tensor" else group
    codes = quant.quantize(flat, found.scales, spec.bits, group)
    assert torch.equal(quant.dequantize(codes, found.scales, group, torch.bfloat16), flat)


def q4_0(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales [N, K / 32] in float16 with 11 bits, and what they stand for: as
    llama.cpp rounds, the largest weight of a block becomes -8."""
    blocks = torch.randn(rows, columns // 32, 32, generator=torch.Generator().manual_seed(seed))
    largest = blocks.gather(2, blocks.abs().argmax(2, keepdim=True))
    scales = (largest / -8).half().float()
    codes = (blocks / scales).round().clamp(-8, 7)
    return codes.view(rows, -1), scales.squeeze(2), (codes * scales).view(rows, -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_blocks_of_llama_cpp_keep_their_codes(dtype: torch.dtype) -> None:
    """With a grid of scales of 8 bits the scale is rounded, and how much that changes is known."""
    codes, scales, dense = q4_0(16, 128)
    dense = dense.to(dtype)
    spec = QuantSpec(4, 32, signed=True)
    found = find_lattice(dense, spec)
    assert found is not None and 0 < found.changed < 0.9
    assert torch.equal(quant.quantize(dense, found.scales, 4, 32).float(), codes)
    assert ((found.scales / scales - 1).abs() < 2**-7).all()
    exact = find_lattice(dense, replace(spec, scale_grid="fp32"))
    assert exact is not None and exact.changed == 0
    assert torch.equal(quant.quantize(dense, exact.scales, 4, 32).float(), codes)


def test_what_lies_on_no_grid_is_left_alone() -> None:
    spec = QuantSpec(4, 32)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(32, 256, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert find_lattice(normal.to(dtype), spec) is None
        assert other_grid(normal.to(dtype), spec) == ""
    dense = with_lowest_code(spec).dequantize(torch.bfloat16)
    dense[20, 40] *= 1.05  # one weight, beyond the rows that are looked at first
    assert find_lattice(dense, spec) is None
    assert find_lattice(torch.zeros(4, 64), spec) is None
    assert find_lattice(torch.full((4, 64), torch.inf), spec) is None
    wide = random_weight((8, 64), QuantSpec(8, 32), 0).dequantize(torch.bfloat16)
    assert find_lattice(wide, QuantSpec(8, 32)) is None  # bfloat16 cannot tell 127 from 128


def test_a_grid_that_the_spec_cannot_hold_is_named() -> None:
    spec = QuantSpec(4, 128)
    dense = with_lowest_code(QuantSpec(4, 32)).dequantize(torch.bfloat16)
    assert find_lattice(dense, spec) is None and other_grid(dense, spec) == "g32"
    signed = with_lowest_code(replace(spec, signed=True)).dequantize(torch.bfloat16)
    assert find_lattice(signed, spec) is None
    assert other_grid(signed, spec) == "g128 with signed scales"
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 4, 64), generator=generator)
    codes[:, :, 0], codes[:, :, 1] = 0, 15
    zeros = torch.randint(2, 6, (8, 4, 1), generator=generator)
    asymmetric = ((codes - zeros) * 0.03125).view(8, 256)
    assert find_lattice(asymmetric, QuantSpec(4, 64, signed=True)) is None
    assert other_grid(asymmetric, QuantSpec(4, 64)) == "g256 with zero points"

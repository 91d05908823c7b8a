import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gracec import quant
from gracec.backends import torchao
from gracec.quant import QuantSpec

CPU = torch.device("cpu")


def random_codes(rows: int, columns: int, group_size: int, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    scales = torch.rand(rows, columns // group_size, generator=generator) + 0.01
    return codes, quant.round_scale(scales, "bf16")


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([16, 32, 48, 80]),
    groups=st.integers(1, 3),
    group_size=st.sampled_from(torchao.GROUP_SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_what_is_packed_reads_back_exactly(
    rows: int, groups: int, group_size: int, dtype: torch.dtype, seed: int
) -> None:
    codes, scales = random_codes(rows, groups * group_size, group_size, seed)
    packed = torchao.pack(codes, scales, group_size, dtype)
    assert torch.equal(torchao.unpack(packed), quant.dequantize(codes, scales, group_size, dtype))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_kernels_agree_with_float64(dtype: torch.dtype, bound: float, batch: int) -> None:
    codes, scales = random_codes(96, 256, 64, 0)
    packed = torchao.pack(codes, scales, 64, dtype)
    x = torch.randn(batch, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = x.double() @ quant.dequantize(codes, scales, 64).double().t()
    found = torch.nn.functional.linear(x, packed).double()
    assert (found - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize(
    ("shape", "spec", "dtype", "reason"),
    [
        ((24, 64), QuantSpec(4, 64), torch.bfloat16, "multiples of 16 output features"),
        ((32, 64), QuantSpec(8, 64), torch.bfloat16, "takes 4-bit codes"),
        ((32, 64), QuantSpec(4, 16), torch.bfloat16, "takes groups of"),
        ((32, 96), QuantSpec(4, 64), torch.bfloat16, "does not divide 96"),
        ((32, 64), QuantSpec(4, 64), torch.float64, "does not take torch.float64"),
        ((32, 64), QuantSpec(4, 64), torch.bfloat16, ""),
    ],
)
def test_refusals(shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype, reason: str) -> None:
    found = torchao.refusal(shape, spec, dtype, CPU)
    assert reason in found
    assert bool(found) == bool(reason)


def test_another_device_is_refused() -> None:
    assert "for meta" in torchao.refusal(
        (32, 64), QuantSpec(4, 64), torch.float32, torch.device("meta")
    )


def test_kernels_are_counted_only_when_they_run() -> None:
    codes, scales = random_codes(32, 64, 32, 0)
    packed = torchao.pack(codes, scales, 32, torch.float32)
    with torch.no_grad(), torchao.CountInt4Kernels() as kernels:
        torch.nn.functional.linear(torch.ones(2, 64), packed)
        torch.nn.functional.linear(torch.ones(2, 64), torch.ones(32, 64))
    assert kernels.count == 1

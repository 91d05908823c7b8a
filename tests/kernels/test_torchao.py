import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gracec import quant
from gracec.kernels import torchao
from gracec.quant import QuantSpec

CPU = torch.device("cpu")


def random_codes(rows: int, columns: int, group_size: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Codes int8 [rows, columns] and scales on the grid, half of which are negative."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (rows, columns), generator=generator).to(torch.int8)
    scales = torch.rand(rows, columns // group_size, generator=generator) + 0.01
    scales = torch.where(torch.rand(scales.shape, generator=generator) < 0.5, -scales, scales)
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


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([16, 32, 48, 80]),
    groups=st.integers(1, 3),
    group_size=st.sampled_from(torchao.GROUP_SIZES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_the_read_back_finds_one_changed_code_and_one_changed_scale(
    rows: int, groups: int, group_size: int, dtype: torch.dtype, seed: int
) -> None:
    codes, scales = random_codes(rows, groups * group_size, group_size, seed)
    packed = torchao.pack(codes, scales, group_size, dtype)
    stored = quant.store_codes(codes, 4)
    assert torchao.read_back_difference(packed, stored, scales, group_size) == ""
    row, column = seed % rows, seed % (groups * group_size)
    changed = codes.clone()
    changed[row, column] ^= 1  # the lowest bit of the code
    wrong = torchao.read_back_difference(packed, changed, scales, group_size)
    assert wrong == "its codes are different"
    moved = scales.clone()
    moved[row, column // group_size] *= 2
    wrong = torchao.read_back_difference(packed, codes, moved, group_size)
    assert wrong == "its scales are different"


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 5),
    group_size=st.sampled_from(torchao.GROUP_SIZES),
    seed=st.integers(0, 1000),
)
def test_operands_of_the_cuda_packing_hold_the_codes_and_pad_with_nothing(
    rows: int, groups: int, group_size: int, seed: int
) -> None:
    codes, scales = random_codes(rows, groups * group_size, group_size, seed)
    nibbles, scale_and_zero = torchao.tile_packed_operands(codes, scales, group_size)
    high, low = (nibbles >> 4).int() - 8, (nibbles & 0xF).int() - 8
    unpacked = torch.stack([high, low], -1).flatten(1)
    assert unpacked.shape[0] % 8 == 0 and unpacked.shape[1] % 1024 == 0
    scale, zero = scale_and_zero.unbind(-1)
    assert not zero.any()
    weight = unpacked.view(len(unpacked), -1, group_size) * scale.t().float().unsqueeze(-1)
    weight = weight.flatten(1)
    expected = quant.dequantize(codes, scales, group_size)
    assert torch.equal(weight[:rows, : expected.shape[1]], expected)
    assert not weight[rows:].any() and not weight[:, expected.shape[1] :].any()


def test_the_cuda_packing_op_takes_these_operands() -> None:
    """Shapes only, by the op's own meta kernel: no GPU is needed, and none computes."""
    codes, scales = random_codes(20, 192, 64, 0)
    nibbles, scale_and_zero = torchao.tile_packed_operands(codes, scales, 64)
    with FakeTensorMode():

        def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

        tiles = torch.ops.aten._convert_weight_to_int4pack(on_cuda(nibbles), torchao.CUDA_TILES_K)
        assert tiles.shape == (3, 8, 32, 4)
        x = torch.empty(2, 1024, dtype=torch.bfloat16, device="cuda")
        found = torch.ops.aten._weight_int4pack_mm(x, tiles, 64, on_cuda(scale_and_zero))
    assert found.shape == (2, 24)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("shape", [(64, 256), (40, 1024), (24, 2048)])
def test_cuda_kernels_read_back_exactly(shape: tuple[int, int]) -> None:
    codes, scales = random_codes(*shape, 64, 0)
    packed = torchao.pack(codes.cuda(), scales.cuda(), 64, torch.bfloat16)
    dense = quant.dequantize(codes, scales, 64, torch.bfloat16)
    assert torch.equal(torchao.unpack(packed).cpu(), dense)
    assert torchao.read_back_difference(packed, codes.cuda(), scales.cuda(), 64) == ""


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
        (
            (24, 64),
            QuantSpec(4, 64),
            torch.bfloat16,
            "the kernel takes multiples of 16 output features, there are 24",
        ),
        (
            (32, 64),
            QuantSpec(8, 64),
            torch.bfloat16,
            "the kernel takes codes of up to 4 bits, these have 8",
        ),
        (
            (32, 64),
            QuantSpec(4, granularity="per_channel"),
            torch.bfloat16,
            "the kernel takes one scale per group, these are per_channel",
        ),
        (
            (32, 64),
            QuantSpec(4, 16),
            torch.bfloat16,
            "the kernel takes groups of (32, 64, 128, 256), these have 16",
        ),
        (
            (32, 96),
            QuantSpec(4, 64),
            torch.bfloat16,
            "group 64 does not divide 96 input features",
        ),
        (
            (32, 64),
            QuantSpec(4, 64),
            torch.float64,
            "the kernel does not take torch.float64",
        ),
        ((32, 64), QuantSpec(4, 64), torch.bfloat16, ""),
    ],
)
def test_refusals(shape: tuple[int, int], spec: QuantSpec, dtype: torch.dtype, reason: str) -> None:
    assert torchao.refusal(shape, spec, dtype, CPU) == reason


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "reason"),
    [
        ("cuda", (8, 0), torch.float32, "the CUDA kernel takes bfloat16, not torch.float32"),
        ("cuda", (7, 5), torch.bfloat16, "the CUDA kernel needs compute capability 8.0"),
        ("cuda", (8, 0), torch.bfloat16, ""),
        ("meta", (8, 0), torch.bfloat16, "there is no INT4 kernel for meta"),
    ],
)
def test_refusals_of_devices(
    device: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert torchao.refusal((24, 64), QuantSpec(4, 64), dtype, torch.device(device)) == reason


def test_kernels_are_counted_only_when_they_run() -> None:
    codes, scales = random_codes(32, 64, 32, 0)
    packed = torchao.pack(codes, scales, 32, torch.float32)
    with torch.no_grad(), torchao.CountInt4Kernels() as kernels:
        torch.nn.functional.linear(torch.ones(2, 64), packed)
        torch.nn.functional.linear(torch.ones(2, 64), torch.ones(32, 64))
    assert kernels.count == 1

"""Codes and scales as torchao INT4 tensors, packed exactly and never quantized again.

Both kernels compute (u - 8) * scale + zero on unsigned 4-bit values u. With u = code + 8 and zero
= 0 that is code * scale, so packing is a mere change of layout.

    processor   Int4OpaqueTensor           aten::_weight_int4pack_mm_for_cpu
                bfloat16 has a vector kernel; float32 is slow and used to verify
    CUDA        Int4TilePackedTo4dTensor   aten::_weight_int4pack_mm, bfloat16, sm80 or newer
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
from torchao.quantization import Int4TilePackedTo4dTensor
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

from gracec.quant import QuantSpec, dequantize, row_chunks
from gracec.quant.ops_experts import multiply_by_expert

PackedWeight: TypeAlias = Int4OpaqueTensor | Int4TilePackedTo4dTensor
INT4_KERNELS = {
    torch.ops.aten._weight_int4pack_mm_for_cpu.default,
    torch.ops.aten._weight_int4pack_mm.default,
}
GROUP_SIZES = (32, 64, 128, 256)
CUDA_TILES_K, CUDA_PADDED_K, CUDA_PADDED_N = 8, 1024, 8
BLOCK = 32
"""Weights that are read back in one sum; it divides every group."""


def refusal(
    shape: tuple[int, ...], spec: QuantSpec, dtype: torch.dtype, device: torch.device
) -> str:
    """Why no INT4 kernel can run a weight [N, K], or an empty string."""
    rows, columns = shape
    if spec.bits > 4:
        return f"the kernel takes codes of up to 4 bits, these have {spec.bits}"
    if spec.granularity != "per_group":
        return f"the kernel takes one scale per group, these are {spec.granularity}"
    if spec.group_size not in GROUP_SIZES:
        return f"the kernel takes groups of {GROUP_SIZES}, these have {spec.group_size}"
    if columns % spec.group_size:
        return f"group {spec.group_size} does not divide {columns} input features"
    if device.type == "cpu":
        if rows % 16:
            return f"the kernel takes multiples of 16 output features, there are {rows}"
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"the kernel does not take {dtype}"
        return ""
    if device.type == "cuda":
        if dtype != torch.bfloat16:
            return f"the CUDA kernel takes bfloat16, not {dtype}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the CUDA kernel needs compute capability 8.0"
        return ""
    return f"there is no INT4 kernel for {device.type}"


def pack(codes: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> PackedWeight:
    """Pack codes for the kernel of the device that they are on.

    Args:
        codes: int8 [N, K] in [-8, 7].
        scales: [N, K / group_size].
        dtype: of the activations; the scales must be exact in it.
    """
    block = [1, group_size]
    if codes.device.type != "cpu":
        unsigned, scale_and_zero = tile_packed_operands(codes, scales, group_size)
        tiles = torch.ops.aten._convert_weight_to_int4pack(unsigned, CUDA_TILES_K)
        return Int4TilePackedTo4dTensor(tiles, scale_and_zero, block, codes.shape)
    unsigned = codes.to(torch.int32) + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    return Int4OpaqueTensor(packed, _scales_and_zeros(scales, dtype), block, codes.shape)


def tile_packed_operands(codes: Tensor, scales: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """What the CUDA packing op and kernel take.

    Returns:
        uint8 [N', K' / 2], the even code in the high nibble, and bfloat16 [K' / group_size, N', 2],
        scale and zero; N' and K' are padded with codes and scales of zero.
    """
    rows, columns = codes.shape
    more_rows, more_columns = -rows % CUDA_PADDED_N, -columns % CUDA_PADDED_K
    unsigned = functional.pad(codes + 8, (0, more_columns, 0, more_rows), value=8)
    unsigned = unsigned.to(torch.uint8)
    nibbles = (unsigned[:, 0::2] << 4) | unsigned[:, 1::2]
    padded = functional.pad(scales, (0, more_columns // group_size, 0, more_rows))
    return nibbles.contiguous(), _scales_and_zeros(padded, torch.bfloat16)


def _scales_and_zeros(scales: Tensor, dtype: torch.dtype) -> Tensor:
    scales = scales.to(dtype)
    packed: Tensor = pack_tinygemm_scales_and_zeros(scales, torch.zeros_like(scales), dtype)
    return packed


def unpack(packed: PackedWeight) -> Tensor:
    """The weight [N, K] that the kernel multiplies with, read back by multiplying the identity.

    Each product has one term that is not zero, so no rounding is hidden in a sum. Exact, and as
    slow as K forward passes: `read_back_difference` checks a large weight 16 times faster.
    """
    identity = torch.eye(packed.shape[1], dtype=packed.dtype, device=packed.device)
    return functional.linear(identity, packed).t().contiguous()


def read_back_difference(
    packed: PackedWeight, codes: Tensor, scales: Tensor, group_size: int
) -> str:
    """What is different between a packed weight and what was packed, or "".

    The scales are compared as they are. The codes are read through the kernel as sums of 32
    weights with random signs, twice: a code that is off by one shifts its sums by a whole scale,
    and rounding the sums to bfloat16 by much less.

    Args:
        codes: int8 [N, K], or uint8 [N, K / 2] with two in a byte.
        scales: float32 [N, K / group_size].
    """
    rows, columns = packed.shape
    kept = packed.scale_and_zero[: scales.shape[1], :rows]
    if not torch.equal(kept[..., 0].t().float(), scales) or kept[..., 1].any():
        return "its scales are different"
    signs = torch.randint(0, 2, (2, columns), generator=torch.Generator().manual_seed(columns))
    signs = (signs * 2.0 - 1).to(packed.device)
    blocks = columns // BLOCK
    probe = torch.zeros(2, blocks, blocks, BLOCK, dtype=packed.dtype, device=packed.device)
    probe[:, range(blocks), range(blocks)] = signs.view(2, blocks, BLOCK).to(packed.dtype)
    found = functional.linear(probe.view(2 * blocks, columns), packed).t()
    rounding = torch.finfo(packed.dtype).eps
    # The kernel for processors multiplies in float32 whatever the dtype, the other in bfloat16.
    dtype = torch.float32 if packed.device.type == "cpu" else packed.dtype
    for part, scale, read in row_chunks(codes, scales, found):
        weight = dequantize(part, scale, group_size, dtype).float()
        terms = (weight.unsqueeze(1) * signs).view(-1, 2 * blocks, BLOCK)
        sums = terms.sum(-1)
        bound = rounding * sums.abs() + 2.0**-20 * terms.abs().sum(-1)
        if not ((read.float() - sums).abs() <= bound).all():
            return "its codes are different"
    return ""


def packed_expert_linear(x: Tensor, weights: Sequence[PackedWeight], experts: Tensor) -> Tensor:
    """`gracec::expert_linear` with the weight of each expert packed: the kernels take matrices.

    Args:
        x: [S, K].
        weights: E of [N, K]. Those that no row asks for are not touched.
        experts: int64 [S].

    Returns:
        [S, N] in the dtype of `x`.
    """
    return multiply_by_expert(
        x,
        experts,
        weights[0].shape[0],
        lambda expert, rows: functional.linear(rows, weights[expert]),
    )


class CountInt4Kernels(TorchDispatchMode):
    """Counts the INT4 kernels that really run inside the context.

    Attributes:
        count: how often one ran.
        weights: where the packed weights lie that one ran with.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.weights: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in INT4_KERNELS:
            self.count += 1
            self.weights.add(args[1].data_ptr())
        return func(*args, **(kwargs or {}))

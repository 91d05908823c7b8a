"""Codes and scales as torchao INT4 tensors, packed exactly and never quantized again.

The CPU kernel (`aten::_weight_int4pack_mm_for_cpu`) computes (u - 8) * scale + zero on unsigned
4-bit values u. With u = code + 8 and zero = 0 that is code * scale, so packing is a mere change of
layout. bfloat16 has a vector kernel; float32 is slow and used to verify.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
from torchao.quantization.utils import pack_tinygemm_scales_and_zeros

from gracec.quant import QuantSpec

INT4_KERNELS = {torch.ops.aten._weight_int4pack_mm_for_cpu.default}
__all__ = ["CountInt4Kernels", "Int4OpaqueTensor", "pack", "refusal", "unpack"]

GROUP_SIZES = (32, 64, 128, 256)


def refusal(
    shape: tuple[int, ...], spec: QuantSpec, dtype: torch.dtype, device: torch.device
) -> str:
    """Why no INT4 kernel can run a weight [N, K], or an empty string."""
    rows, columns = shape
    if device.type != "cpu":
        return f"INT4 packing for {device.type} is not available"
    if spec.bits != 4:
        return f"the kernel takes 4-bit codes, these have {spec.bits} bits"
    if spec.granularity != "per_group":
        return f"the kernel takes one scale per group, these are {spec.granularity}"
    if spec.group_size not in GROUP_SIZES:
        return f"the kernel takes groups of {GROUP_SIZES}, these have {spec.group_size}"
    if rows % 16:
        return f"the kernel takes multiples of 16 output features, there are {rows}"
    if columns % spec.group_size:
        return f"group {spec.group_size} does not divide {columns} input features"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel does not take {dtype}"
    return ""


def pack(codes: Tensor, scales: Tensor, group_size: int, dtype: torch.dtype) -> Int4OpaqueTensor:
    """Pack codes int8 [N, K] and scales [N, K / group_size] for the CPU kernel.

    Args:
        dtype: of the activations; the scales must be exact in it.
    """
    rows, columns = codes.shape
    unsigned = codes.to(torch.int32) + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    scales = scales.to(dtype)
    scale_and_zero = pack_tinygemm_scales_and_zeros(scales, torch.zeros_like(scales), dtype)
    return Int4OpaqueTensor(packed, scale_and_zero, [1, group_size], torch.Size((rows, columns)))


def unpack(packed: Int4OpaqueTensor) -> Tensor:
    """The weight [N, K] that the kernel multiplies with, read back by multiplying the identity.

    Each product has one term that is not zero, so no rounding is hidden in a sum.
    """
    _, columns = packed.shape
    identity = torch.eye(columns, dtype=packed.dtype)
    return torch.nn.functional.linear(identity, packed).t().contiguous()


class CountInt4Kernels(TorchDispatchMode):
    """Counts the INT4 kernels that really run inside the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in INT4_KERNELS
        return func(*args, **(kwargs or {}))

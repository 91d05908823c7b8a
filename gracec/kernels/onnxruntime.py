"""Codes and scales as ONNX Runtime's kernels take them, exactly.

MatMulNBits takes a floating-point input, which may have been put on an 8-bit grid before:

    qdq          codes [K, N] -> DequantizeLinear(axis 0, block_size) -> MatMul, which the runtime
                 fuses into MatMulNBits; standard ONNX
    matmulnbits  codes [N, K / block_size, block_size * bits / 8], com.microsoft

A block is a power of two from 16 to 256. A larger or odd group is written as several blocks with
the same scale, which changes no value.

A weight with one scale for each output and an 8-bit input runs on the int8 kernel instead:

    int8         codes [K, N] -> DequantizeLinear(axis 1) -> MatMul, both of whose operands are
                 dequantized, which the runtime fuses into MatMulIntegerToFloat

On x86 without VNNI that kernel adds two products of unsigned inputs and SIGNED weights in 16 bits,
which saturates: 2 * 255 * 127 is out of range. It does not with weights of 7 bits, nor with
unsigned ones, which it multiplies otherwise and slower; so codes that need 8 bits are written
unsigned, with the zero point 128.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gracec import quant
from gracec.errors import GracecError
from gracec.quant.frozen import FrozenActivation, FrozenWeight

OPS = ("qdq", "matmulnbits")
FAITHFUL, FAST, AUTO = "faithful", "fast", "auto"
MODES = (AUTO, FAST, FAITHFUL)
"""What can be asked for: auto is one of the others, whichever fits."""
ACCURACY_LEVEL = {FAITHFUL: 1, FAST: 4}
"""Mode -> accuracy level of the kernel: 1 computes in float32, 4 rounds activations to int8."""
MATMUL_NBITS, MATMUL_INT8 = "MatMulNBits", "MatMulIntegerToFloat"
"""The operators of the runtime that are the INT4 kernel and the int8 kernel."""
BLOCK_SIZES = (256, 128, 64, 32, 16)
OPSET = 23


def check_options(ops: str, mode: str, modes: Iterable[str] = tuple(ACCURACY_LEVEL)) -> None:
    """Refuse what is neither a set of operators nor one of the modes."""
    if ops not in OPS:
        raise GracecError(f"unknown ops {ops!r}", fix=f"use {' or '.join(OPS)}")
    if mode not in modes:
        raise GracecError(f"unknown mode {mode!r}", fix=f"use {' or '.join(modes)}")


def block_size(weight: FrozenWeight) -> int:
    """The largest block that the groups of a weight consist of, or 0."""
    return next((size for size in BLOCK_SIZES if weight.group_size % size == 0), 0)


def runs_int8(weight: FrozenWeight) -> bool:
    """Whether a weight is multiplied with its input in integers."""
    wide = weight.spec.bits > 4 and weight.scales.shape[1] == 1
    return wide and weight.activation is not None


def refusal(weight: FrozenWeight) -> str:
    """Why no kernel can run a weight, or an empty string."""
    if weight.activation is not None:
        spec = weight.activation.spec
        if spec.bits != 8 or spec.granularity != "per_tensor":
            return f"the kernels take inputs in int8/tensor, its input is in {spec}"
    if weight.experts is not None and runs_int8(weight):
        return "experts are not multiplied with their input in integers"
    if block_size(weight) or runs_int8(weight):
        return ""
    return f"the kernel takes blocks of {BLOCK_SIZES[-1]}, a scale has {weight.group_size} features"


def filter_refusal(weight: FrozenWeight) -> str:
    """Why the codes of filters cannot be dequantized by standard ONNX, or an empty string."""
    if block_size(weight) or weight.scales.shape[1] == 1:
        return ""
    return f"a scale has {weight.group_size} features, which is neither a filter nor a block"


def kernel_bits(weight: FrozenWeight, ops: str) -> int:
    """Bits that a code takes: 4 or 8, and 2 where MatMulNBits is written directly."""
    if weight.spec.bits > 4 or (ops == "qdq" and weight.shape[0] % 2):  # no half bytes in a row
        return 8
    return 2 if ops == "matmulnbits" and weight.spec.bits == 2 else 4


def block_scales(weight: FrozenWeight) -> Tensor:
    """float32 [N, K / block_size], one scale a block."""
    repeats = weight.group_size // block_size(weight)
    scales = weight.scales.expand(weight.shape[0], -1)
    return scales.repeat_interleave(repeats, dim=1).to(torch.float32)


def qdq_operands(weight: FrozenWeight) -> tuple[Tensor, Tensor]:
    """Codes [K, N], two a byte where they are narrow and N is even, and scales [K / block, N]."""
    codes = quant.store_codes(weight.codes.t().contiguous(), weight.spec.bits)
    return codes, block_scales(weight).t().contiguous()


def int8_operands(weight: FrozenWeight) -> tuple[Tensor, Tensor]:
    """Codes int8 [K, N] and one scale for each output, float32 [N]."""
    scales = weight.scales.expand(weight.shape[0], 1).reshape(-1).to(torch.float32)
    return weight.codes.t().contiguous(), scales.contiguous()


def filter_operands(weight: FrozenWeight) -> tuple[Tensor, Tensor]:
    """Codes [K, N], two a byte where they are narrow and N is even, and one scale for each output.

    Only for a weight whose scales are of outputs.
    """
    codes, scales = int8_operands(weight)
    return quant.store_codes(codes, weight.spec.bits), scales


def activation_operands(activation: FrozenActivation) -> tuple[Tensor, Tensor]:
    """Scale float32 [] and zero point uint8 [] of unsigned codes, which stand for the same values.

    The kernel takes signed ones too, and turns them into unsigned ones first.
    """
    zero_point = activation.zero_points + 128
    return activation.scales.reshape(()).clone(), zero_point.to(torch.uint8).reshape(()).clone()


def matmulnbits_operands(weight: FrozenWeight) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N, K / block, block * bits / 8], the first lowest, and scales [N, K / block]."""
    bits = kernel_bits(weight, "matmulnbits")
    block = block_size(weight)
    unsigned = (weight.codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    per_byte = 8 // bits
    packed = torch.zeros_like(unsigned[:, ::per_byte])
    for place in range(per_byte):
        packed |= unsigned[:, place::per_byte] << (bits * place)
    rows, columns = weight.shape
    packed = packed.reshape(rows, columns // block, block * bits // 8)
    return packed.contiguous(), block_scales(weight).contiguous()

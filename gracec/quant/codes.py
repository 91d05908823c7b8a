"""Group-wise symmetric weight quantization: the one definition of codes and scales.

    q = clip(round(w / s), -2^(b-1), 2^(b-1) - 1)        w_hat = q * s

One scale `s` per `group_size` consecutive input features, no zero point. Scales live on a grid that
both bfloat16 and float16 hold exactly (an 8-bit significand between 2^-17 and 65280), so one set of
codes and scales means the same weight in every format that gracec writes. Codes are always computed
against the rounded scale.

Two's complement has one code more below zero than above. Where a spec is `signed` a scale may be
negative, which gives that code to whichever side of a group needs it, and costs no bit. The sign
is found with the scale and never trained; what is trained is the magnitude.

Where scales come from: `gracec.quant.scale_search`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gracec.errors import GracecError

SCALE_MIN = 2.0**-17
SCALE_MAX = 65280.0  # the largest bfloat16 value that float16 can hold
SUPPORTED_BITS = (2, 3, 4, 7, 8)
SUPPORTED_GROUP_SIZES = (16, 32, 64, 128, 256)
CHUNK_ELEMENTS = 1 << 18
"""Weights that are looked at in one go on a processor; bounds the temporary memory."""

GRANULARITIES = ("per_group", "per_channel", "per_tensor")


@dataclass(frozen=True)
class QuantSpec:
    """How one weight [N, K] is quantized.

    Attributes:
        bits: width of the signed integer codes; 7 are stored in 8, and leave the int8 kernels of
            processors without VNNI, which saturate in 16 bits, room for a sum of two products.
        group_size: consecutive input features (along K) that share one scale, if `per_group`.
        granularity: what has a scale of its own: a group (scales [N, K / group_size]), an output
            channel ([N, 1]) or the whole weight ([1, 1]).
        parametrization: what is trained: the logarithm of the scale ("log") or the scale with the
            LSQ gradient scale 1/sqrt(N_group * q_max) ("lsq").
        scale_grid: values a scale may take: "bf16" (exact in bfloat16 and float16) or "fp32".
        signed: whether a scale may be negative; codes are in the same range either way.
    """

    bits: int = 4
    group_size: int = 128
    parametrization: str = "log"
    scale_grid: str = "bf16"
    granularity: str = "per_group"
    signed: bool = False

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise GracecError(f"{self.bits} bits are not supported", fix=f"use {SUPPORTED_BITS}")
        if self.group_size not in SUPPORTED_GROUP_SIZES:
            raise GracecError(
                f"group_size {self.group_size} is not supported", fix=f"use {SUPPORTED_GROUP_SIZES}"
            )
        if self.parametrization not in ("log", "lsq"):
            raise GracecError(f"unknown parametrization {self.parametrization!r}", fix="log or lsq")
        if self.scale_grid not in ("bf16", "fp32"):
            raise GracecError(f"unknown scale_grid {self.scale_grid!r}", fix="use bf16 or fp32")

        check_granularity(self.granularity)

    def __str__(self) -> str:
        sign = "/signed" if self.signed else ""
        return f"int{self.bits}/{granularity_text(self.granularity, self.group_size)}{sign}"

    def __repr__(self) -> str:
        """Of the fields of `to_dict`: what is hashed of an unsigned spec is what always was."""
        return f"QuantSpec({', '.join(f'{key}={one!r}' for key, one in self.to_dict().items())})"

    @property
    def storage_bits(self) -> int:
        """Bits that a code takes on disk: narrow codes are stored in four."""
        return 4 if self.bits <= 4 else 8

    def group_of(self, columns: int) -> int:
        """Input features that share one scale in a row of this width."""
        return self.group_size if self.granularity == "per_group" else columns

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales of a weight [rows, columns]."""
        if self.granularity == "per_tensor":
            return 1, 1
        return rows, columns // self.group_of(columns)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, `signed` only where it is; `QuantSpec(**d)` reads them back."""
        return {key: one for key, one in asdict(self).items() if key != "signed" or one}


def check_granularity(granularity: str) -> None:
    """Raise `GracecError` for a granularity that does not exist."""
    if granularity not in GRANULARITIES:
        raise GracecError(f"unknown granularity {granularity!r}", fix=f"use {GRANULARITIES}")


def granularity_text(granularity: str, group_size: int) -> str:
    """ "g128", "channel" or "tensor": how a granularity is written in graphs and tables."""
    return f"g{group_size}" if granularity == "per_group" else granularity.removeprefix("per_")


def code_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code of a width."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def round_scale(scale: Tensor, scale_grid: str) -> Tensor:
    """Round the magnitude of float32 scales to the grid of the target; what is below zero stays
    below. Shape and dtype are kept."""
    if scale_grid == "bf16":
        scale = scale.to(torch.bfloat16).to(torch.float32)
    magnitude = scale.abs().clamp(SCALE_MIN, SCALE_MAX)
    return torch.where(scale < 0, -magnitude, magnitude)


def scale_from_param(
    scale_param: Tensor, parametrization: str, scale_grid: str, signs: Tensor | None = None
) -> Tensor:
    """The scale that a trained scale parameter stands for, on its grid (float32).

    Args:
        signs: int8, of the shape of the parameter, 1 or -1; None where every scale is positive.
    """
    scale_param = scale_param.to(torch.float32)
    scale = scale_param.exp() if parametrization == "log" else scale_param.abs()
    return round_scale(scale if signs is None else scale * signs, scale_grid)


def scale_to_param(scales: Tensor, parametrization: str) -> Tensor:
    """Inverse of `scale_from_param` for scales that are on the grid, whose sign is left out."""
    return scales.abs().log() if parametrization == "log" else scales.abs()


def scale_signs(scales: Tensor) -> Tensor:
    """What `scale_to_param` leaves out: int8, 1 or -1, of the shape of the scales."""
    return torch.where(scales < 0, -1, 1).to(torch.int8)


def quantize(weight: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """Integer codes of a weight.

    Args:
        weight: [N, K], any float dtype.
        scales: [N, K / group_size] (or [1, 1] for the whole), float32, already on their grid.

    Returns:
        int8 [N, K] in [-2^(b-1), 2^(b-1) - 1].
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    parts = row_chunks(weight, scales, codes)
    for part, scale, target in parts:
        target.copy_(_rounded(part, scale, bits, group_size).reshape(target.shape))
    return codes


def dequantize(
    codes: Tensor,
    scales: Tensor,
    group_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The weight that codes and scales stand for: the product in float32, then cast to `dtype`.

    Args:
        codes: int8 [N, K], or as stored: uint8 [N, K / 2].
        scales: [N, K / group_size].
        out: [N, K] to write into, of any float dtype; by default a new tensor of `dtype`.

    Returns:
        [N, K].
    """
    weight = out
    if weight is None:
        weight = torch.empty(codes_shape(codes), dtype=dtype, device=codes.device)
    for part, scale, target in row_chunks(codes, scales, weight):
        groups = grouped(read_codes(part), group_size)
        # The product is computed in float32, whatever `out` is.
        torch.mul(groups, scale.to(torch.float32).unsqueeze(-1), out=target.view(groups.shape))
    return weight


def fake_quantize(
    weight: Tensor,
    scales: Tensor,
    bits: int,
    group_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`dequantize(quantize(weight, ...), ...)` in one go, without the codes in between.

    Args:
        out: [N, K] to write into, of any float dtype; by default a new tensor of `dtype`.
    """
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device) if out is None else out
    for part, scale, target in row_chunks(weight, scales, result):
        rounded = _rounded(part, scale, bits, group_size)
        rounded *= scale.to(torch.float32).unsqueeze(-1)
        target.copy_(rounded.reshape(target.shape))
    return result


def _rounded(weight: Tensor, scales: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes as float32 [N, K / group_size, group_size]."""
    lowest, highest = code_range(bits)
    groups = grouped(weight.to(torch.float32), group_size)
    return (groups / scales.to(torch.float32).unsqueeze(-1)).round_().clamp_(lowest, highest)


def is_packed(bits: int, columns: int) -> bool:
    """Whether codes of a row of this width are kept two in a byte."""
    return bits <= 4 and columns % 2 == 0


def store_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes int8 [N, K] as they are kept: uint8 [N, K / 2] where two fit in a byte."""
    return pack_nibbles(codes) if is_packed(bits, codes.shape[1]) else codes


def read_codes(stored: Tensor) -> Tensor:
    """Inverse of `store_codes`: int8 [N, K]."""
    return unpack_nibbles(stored) if stored.dtype == torch.uint8 else stored


def codes_shape(stored: Tensor) -> torch.Size:
    """[N, K] of codes that may be stored two in a byte."""
    rows, columns = stored.shape
    return torch.Size((rows, 2 * columns if stored.dtype == torch.uint8 else columns))


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes [N, K] in [-8, 7] -> uint8 [N, K / 2], low nibble first, two's complement."""
    packed = codes[:, 1::2].to(torch.uint8)
    packed <<= 4
    packed |= codes[:, 0::2].to(torch.uint8) & 0xF
    return packed


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 [N, K / 2] -> int8 [N, K]."""
    # In place on pairs of bytes, low one first: writing to every other byte is four times slower.
    pairs = packed.view(torch.int8).to(torch.int16, memory_format=torch.contiguous_format)
    low = pairs << 12
    low >>= 12  # an arithmetic shift extends the sign
    low &= 0xFF
    pairs >>= 4
    pairs <<= 8
    pairs |= low
    return pairs.view(torch.int8)


def row_chunks(*matrices: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each matrix, so many at a time that temporaries stay small.

    The first matrix decides how many; one with a single row goes with every part. A processor
    works from its caches; an accelerator needs larger parts to be busy.
    """
    rows, columns = matrices[0].shape
    elements = CHUNK_ELEMENTS if matrices[0].device.type == "cpu" else CHUNK_ELEMENTS << 7
    step = max(1, elements // columns)
    for start in range(0, rows, step):
        yield tuple(m if len(m) == 1 else m[start : start + step] for m in matrices)


def spread(per_group: Tensor, features: int) -> Tensor:
    """[1], [K / group_size] or [K] -> [K]: the value that each feature uses."""
    return per_group.repeat_interleave(features // per_group.numel())


def quantize_dequantize_activation(
    x: Tensor, scales: Tensor, zero_points: Tensor, bits: int
) -> Tensor:
    """(clip(round(x / s) + z) - z) * s in float32, returned in the dtype of `x` [..., K].

    Args:
        scales: float32 [1], [K / group_size] or [K], on their grid.
        zero_points: of the same shape; 0 when symmetric.
    """
    lowest, highest = code_range(bits)
    s = spread(scales.to(torch.float32), x.shape[-1])
    offset = spread(zero_points.to(torch.float32), x.shape[-1])
    codes = (torch.round(x.to(torch.float32) / s) + offset).clamp(lowest, highest)
    return ((codes - offset) * s).to(x.dtype)


def signal_to_noise_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal to quantization noise ratio in decibel (infinite when both are equal)."""
    reference = reference.to(torch.float64)
    noise = (reference - approximation.to(torch.float64)).square().sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(reference.square().sum() / noise))


def grouped(matrix: Tensor, group_size: int) -> Tensor:
    """[N, K] -> [N, K / group_size, group_size]."""
    rows, columns = matrix.shape
    if columns % group_size:
        raise GracecError(
            f"group_size {group_size} does not divide the {columns} input features",
            fix="choose a group that divides the width",
        )
    return matrix.reshape(rows, columns // group_size, group_size)

"""Weights that lie on a grid already: their codes and scales, found again from the floats.

What was quantized before and is given as floats, as checkpoints of quantization-aware training are,
has in each group a scale s of which every weight is a whole multiple, up to the rounding of the
dtype that it is stored in. A grid search finds another scale, and rounds what was on the grid.

The largest weight of a group is a whole multiple of s too, so s is among its few fractions. Each
weight then bounds s by what rounds to it, and any scale within all of these bounds gives all of
them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gracec.quant.codes import (
    SCALE_MIN,
    SUPPORTED_GROUP_SIZES,
    QuantSpec,
    code_range,
    dequantize,
    grouped,
    quantize,
    round_scale,
    row_chunks,
)

SIGNIFICANDS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
"""Bits of what a weight may be stored in, the narrowest first."""
PROBED_ROWS, PROBED_COLUMNS = 8, 8


@dataclass(frozen=True)
class Lattice:
    """The grid that a weight lies on.

    Attributes:
        scales: float32, of the shape that the spec gives them and on its grid of scales.
        changed: share of the weights that codes times scales are not equal to in the dtype that
            holds them; 0 unless the scales need more bits than their grid has.
    """

    scales: Tensor
    changed: float


def find_lattice(weight: Tensor, spec: QuantSpec) -> Lattice | None:
    """The scales of a weight [N, K] that lies on a grid of these bits and groups; None if none.

    A look at a few rows is enough for most weights that do not.
    """
    rows, columns = weight.shape
    whole = spec.granularity == "per_tensor"
    flat = weight.detach().reshape(1, -1) if whole else weight.detach()
    group = flat.shape[1] if whole else spec.group_of(columns)
    if flat.shape[1] % group:
        return None
    kind, probe = _Kind.of(spec), flat[:PROBED_ROWS]
    if not probe.any() or _scales(probe, group, kind, _stored_in(probe)) is None:
        return None
    dtype, parts = _stored_in(flat), []
    for (part,) in row_chunks(flat):
        found = _scales(part, group, kind, dtype)
        if found is None:
            return None
        parts.append(round_scale(found, spec.scale_grid))
    scales = torch.cat(parts)
    codes = quantize(flat, scales, spec.bits, group)
    changed = 0
    for part, code, scale in row_chunks(flat, codes, scales):
        again = dequantize(code, scale, group, dtype)
        changed += int((again.float() != part.float()).sum())
    return Lattice(scales.reshape(spec.scale_shape(rows, columns)), changed / flat.numel())


def other_grid(weight: Tensor, spec: QuantSpec) -> str:
    """The grid of as many bits, 4 at most, that a weight [N, K] lies on and the spec cannot hold:
    "g32", "g128 with zero points", an empty string if there is none."""
    probe = weight.detach()[:PROBED_ROWS]
    if spec.bits > 4 or not probe.any():  # of wider codes nothing is released so
        return ""
    dtype, levels = _stored_in(probe), 2**spec.bits - 1
    signed = _Kind(-(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1, True)
    for kind, what in ((signed, ""), (_Kind(-levels, levels, False), " with zero points")):
        for group in reversed(
            SUPPORTED_GROUP_SIZES
        ):  # what is a grid in larger groups is in smaller
            if probe.shape[1] % group == 0 and _scales(probe, group, kind, dtype) is not None:
                negative = not what and group == spec.group_size and not spec.signed
                return f"g{group}{what}{' with signed scales' if negative else ''}"
    return ""


class _Kind(NamedTuple):
    """Lowest and highest code, and whether they may change places."""

    lowest: int
    highest: int
    signed: bool

    @classmethod
    def of(cls, spec: QuantSpec) -> _Kind:
        return cls(*code_range(spec.bits), spec.signed)


def _stored_in(weight: Tensor) -> torch.dtype:
    """The narrowest dtype that holds every value."""
    for dtype in SIGNIFICANDS:
        if all(torch.equal(part.to(dtype).to(part.dtype), part) for (part,) in row_chunks(weight)):
            return dtype
    return torch.float32


def _scales(weight: Tensor, group: int, kind: _Kind, dtype: torch.dtype) -> Tensor | None:
    """float32 [N, K / group] of rows all of whose groups lie on a grid."""
    most = max(-kind.lowest, kind.highest)
    if 4 * most * 2.0 ** -SIGNIFICANDS[dtype] > 1:  # roundings are as far apart as codes
        return None
    groups = grouped(weight, group).reshape(-1, group).double()
    largest = groups.abs().amax(1)
    if not torch.isfinite(largest).all():
        return None
    found = torch.where(largest == 0, SCALE_MIN, 0.0).double()
    for multiple in range(1, most + 1):
        left = (found == 0).nonzero().squeeze(1)
        for columns in (PROBED_COLUMNS, group):  # most are told from the first few
            if not len(left):
                break
            candidate = largest[left] / multiple
            some = groups[left, :columns]
            codes = (some / candidate.unsqueeze(1)).round()
            scales = _within_roundings(some, codes, dtype)
            low, high = codes.aminmax(dim=1)
            positive = (low >= kind.lowest) & (high <= kind.highest)
            negative = (low >= -kind.highest) & (high <= -kind.lowest) & kind.signed
            fits = ~scales.isnan() & (positive | negative)
            left, scales, positive = left[fits], scales[fits], positive[fits]
        else:
            found[left] = torch.where(positive, scales, -scales)
    if (found == 0).any():
        return None
    return found.float().view(len(weight), -1)


def _within_roundings(groups: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """[G], the middle of the scales with which codes give every weight; NaN where none do."""
    magnitude, count = groups.abs(), codes.abs()
    smallest = math.frexp(torch.finfo(dtype).smallest_normal)[1] - 1
    power = torch.exp2(magnitude.log2().floor().clamp_min(smallest))
    above = power * 2.0 ** -SIGNIFICANDS[dtype]
    below = torch.where(magnitude == power, above / 2, above)  # finer below a power of two
    used = count > 0
    low = torch.where(used, (magnitude - below) / count, 0.0).amax(1)
    high = torch.where(used, (magnitude + above) / count, torch.inf).amin(1)
    whole = (used | (magnitude == 0)).all(1) & used.any(1)
    middle = torch.where(high.isinf(), low, (low + high) / 2)
    return torch.where(whole & (low <= high), middle, torch.nan)

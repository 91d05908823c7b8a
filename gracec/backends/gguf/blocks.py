"""Codes and scales in the blocks of GGUF, and the layout of everything else.

    Q4_0  32 weights in 18 bytes: d as float16, then 16 bytes of code + 8; the low nibbles are the
          first 16 codes, the high ones the others
    Q8_0  32 weights in 34 bytes: d as float16, then a byte for each code

A weight is d times its code in both. One scale of a larger group is that of each of its blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gracec.backends.huggingface import per_channel_scales
from gracec.quant.frozen import FrozenWeight

BLOCK = 32
Q4_0, Q8_0 = "Q4_0", "Q8_0"
WHOLE = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
"""Types of what is not quantized, in the order in which they are tried."""


@dataclass(frozen=True)
class Codes:
    """Some rows of a quantized weight.

    Attributes:
        codes: int8 [N, K].
        scales: float32 [N, K / group_size].
        type: of the blocks.
    """

    codes: Tensor
    scales: Tensor
    type: str

    @classmethod
    def of(cls, weight: FrozenWeight) -> Codes:
        return cls(weight.codes, per_channel_scales(weight), block_type(weight))

    def __getitem__(self, rows: slice | Tensor) -> Codes:
        return Codes(self.codes[rows], self.scales[rows], self.type)


Rows: TypeAlias = Codes | Tensor
"""What has rows: of a weight, quantized or not."""


def block_type(weight: FrozenWeight) -> str:
    return Q4_0 if weight.spec.storage_bits == 4 else Q8_0


def refusal(weight: FrozenWeight) -> str:
    """Why blocks cannot hold a weight, or an empty string."""
    columns = weight.shape[1]
    if weight.group_size % BLOCK:
        if columns % BLOCK:
            return f"GGUF has blocks of {BLOCK} weights, which do not divide the {columns} columns"
        return f"GGUF has one scale for {BLOCK} weights, this has {weight.spec}"
    if not torch.equal(weight.scales.half().float(), weight.scales):
        return "its scales are not exact in float16, which GGUF holds them in"
    return ""


def pack(part: Codes) -> np.ndarray[Any, Any]:
    """uint8 [N, bytes of a row]."""
    rows, columns = part.codes.shape
    count = columns // BLOCK
    scales = part.scales.repeat_interleave(count // part.scales.shape[1], dim=1)
    ends = scales.half().contiguous().view(torch.uint8).view(rows, count, 2)
    if part.type == Q4_0:
        nibbles = (part.codes + 8).view(torch.uint8).view(rows, count, 2, BLOCK // 2)
        codes = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    else:
        codes = part.codes.contiguous().view(torch.uint8).view(rows, count, BLOCK)
    packed: np.ndarray[Any, Any] = torch.cat([ends, codes], dim=2).view(rows, -1).numpy()
    return packed


def whole_type(tensor: Tensor, types: tuple[str, ...]) -> str:
    """The first of these types that holds every value exactly; the last one is float32."""
    for name in types[:-1]:
        if torch.equal(tensor.to(WHOLE[name]).to(tensor.dtype), tensor):
            return name
    return types[-1]


def whole(tensor: Tensor, name: str) -> np.ndarray[Any, Any]:
    """The tensor in a type of `WHOLE`; bfloat16, which numpy does not have, as bytes."""
    cast = tensor.detach().to(WHOLE[name]).contiguous()
    if cast.dtype == torch.bfloat16:
        cast = cast.view(torch.uint8)
    found: np.ndarray[Any, Any] = cast.numpy()
    return found

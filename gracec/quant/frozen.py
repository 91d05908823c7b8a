"""The canonical form of what is quantized: codes and scales of weights, grids of activations.

Every backend packs from this and quantizes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from gracec.quant import codes as quant
from gracec.quant.observers import ActivationSpec


@dataclass(frozen=True)
class FrozenActivation:
    """The static grid of the input [..., K] of a linear.

    Attributes:
        scales: float32 [1], [K / group_size] or [K], on the bf16 grid.
        zero_points: int32, of the same shape.
    """

    scales: Tensor
    zero_points: Tensor
    spec: ActivationSpec

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] on its grid, in its own dtype."""
        scales, zero_points = self.scales.to(x.device), self.zero_points.to(x.device)
        return quant.quantize_dequantize_activation(x, scales, zero_points, self.spec.bits)

    def equals(self, other: FrozenActivation) -> bool:
        """Whether both are the same grid."""
        return (
            self.spec == other.spec
            and torch.equal(self.scales, other.scales)
            and torch.equal(self.zero_points, other.zero_points)
        )


@dataclass(frozen=True)
class FrozenWeight:
    """The canonical form of a quantized weight; every backend packs from this.

    Attributes:
        activation: the grid that the input of its linear is put on, or None. Linears that share an
            input have equal ones.
        stored: the codes as they lie in graphs and files: uint8 [N, K / 2], two a byte, low nibble
            first, or int8 [N, K] (wider codes, odd widths).
        scales: float32 [N, K / group_size], on the grid of the spec.
    """

    stored: Tensor
    scales: Tensor
    spec: quant.QuantSpec
    activation: FrozenActivation | None = None

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, spec: quant.QuantSpec) -> FrozenWeight:
        """From codes int8 [N, K]."""
        return cls(quant.store_codes(codes, spec.bits), scales, spec)

    @classmethod
    def planned(
        cls, shape: tuple[int, int], spec: quant.QuantSpec, activation: ActivationSpec | None = None
    ) -> FrozenWeight:
        """What a weight [N, K] will be: codes and scales have shapes and occupy no memory.

        Whoever packs weights can say from it whether it could, before anything is trained.
        """
        rows, columns = shape
        codes = torch.zeros((), dtype=torch.int8).expand(rows, columns)
        if quant.is_packed(spec.bits, columns):
            codes = torch.zeros((), dtype=torch.uint8).expand(rows, columns // 2)
        scales = torch.ones(()).expand(spec.scale_shape(rows, columns))
        grid = None
        if activation is not None:
            groups = (activation.groups(columns),)
            zeros = torch.zeros((), dtype=torch.int32).expand(groups)
            grid = FrozenActivation(torch.ones(()).expand(groups), zeros, activation)
        return cls(codes, scales, spec, grid)

    @property
    def codes(self) -> Tensor:
        """int8 [N, K]; unpacked anew at each call."""
        return quant.read_codes(self.stored)

    @property
    def shape(self) -> torch.Size:
        """[N, K] of the weight."""
        return quant.codes_shape(self.stored)

    @property
    def group_size(self) -> int:
        """Input features that share one scale."""
        return self.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes stand for."""
        return quant.dequantize(self.stored, self.scales, self.group_size, dtype)


def code_hash(weight: FrozenWeight) -> str:
    """SHA-256 of codes, scales and how they are to be read, and of the grid of the input."""
    digest = hashlib.sha256(repr(weight.spec).encode())
    tensors = [weight.stored, weight.scales]
    if weight.activation is not None:
        digest.update(repr(weight.activation.spec).encode())
        tensors += [weight.activation.scales, weight.activation.zero_points]
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

"""The canonical form of what is quantized: codes and scales of weights, grids of activations.

Every backend packs from this and quantizes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gracec.errors import GracecError
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
class Experts:
    """How a model holds the weights of routed experts, which are one matrix [E * N, K] here.

    Attributes:
        count: E.
        transposed: whether it holds [E, K, N] and not [E, N, K].
    """

    count: int
    transposed: bool = False

    def matrix(self, weight: Tensor) -> Tensor:
        """[E * N, K] of what the model holds; its memory, unless it is transposed."""
        each = weight.transpose(1, 2) if self.transposed else weight
        return each.reshape(-1, each.shape[2])

    def held(self, matrix: Tensor) -> Tensor:
        """Inverse of `matrix`, in the same memory."""
        each: Tensor = matrix.unflatten(0, (self.count, -1))
        return each.transpose(1, 2) if self.transposed else each


@dataclass(frozen=True)
class FrozenWeight:
    """The canonical form of a quantized weight; every backend packs from this.

    Attributes:
        activation: the grid that the input of its linear is put on, or None. Linears that share an
            input have equal ones.
        stored: the codes as they lie in graphs and files: uint8 [N, K / 2], two a byte, low nibble
            first, or int8 [N, K] (wider codes, odd widths).
        scales: float32 [N, K / group_size], on the grid of the spec; negative ones only where it is
            signed.
        experts: of the weight of routed experts, one after the other, how the model holds it.
    """

    stored: Tensor
    scales: Tensor
    spec: quant.QuantSpec
    activation: FrozenActivation | None = None
    experts: Experts | None = None

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        spec: quant.QuantSpec,
        experts: Experts | None = None,
    ) -> FrozenWeight:
        """From codes int8 [N, K]."""
        return cls(quant.store_codes(codes, spec.bits), scales, spec, experts=experts)

    @classmethod
    def planned(
        cls,
        shape: tuple[int, int],
        spec: quant.QuantSpec,
        activation: ActivationSpec | None = None,
        experts: Experts | None = None,
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
        return cls(codes, scales, spec, grid, experts)

    def to(self, device: torch.device) -> FrozenWeight:
        """The same on a device; the grid of the input goes where the input is by itself."""
        return replace(self, stored=self.stored.to(device), scales=self.scales.to(device))

    @property
    def codes(self) -> Tensor:
        """int8 [N, K]; unpacked anew at each call."""
        return quant.read_codes(self.stored)

    @property
    def shape(self) -> torch.Size:
        """[N, K] of the weight, [E * N, K] of that of experts."""
        return quant.codes_shape(self.stored)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[N, K] of what a row is multiplied with: the weight, or that of one expert."""
        rows, columns = self.shape
        return rows // (1 if self.experts is None else self.experts.count), columns

    @property
    def held_shape(self) -> torch.Size:
        """Of the parameter that the model holds."""
        if self.experts is None:
            return self.shape
        return self.experts.held(torch.empty(self.shape, device="meta")).shape

    @property
    def group_size(self) -> int:
        """Input features that share one scale."""
        return self.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, as the model holds it."""
        matrix = quant.dequantize(self.stored, self.scales, self.group_size, dtype)
        return matrix if self.experts is None else self.experts.held(matrix)

    def matrices(self) -> tuple[FrozenWeight, ...]:
        """The weight of each expert [N, K], or the weight itself."""
        if self.experts is None:
            return (self,)
        count = self.experts.count
        stored = self.stored.unflatten(0, (count, -1))
        # One scale of the whole weight is that of every expert.
        scales = self.scales.expand(max(len(self.scales), count), -1).unflatten(0, (count, -1))
        return tuple(
            FrozenWeight(stored[n], scales[n], self.spec, self.activation) for n in range(count)
        )


def by_matrix(fqn: str, weight: FrozenWeight) -> dict[str, FrozenWeight]:
    """Name -> matrix [N, K] of a weight: its own, or `<fqn>.<number>` of each of its experts."""
    if weight.experts is None:
        return {fqn: weight}
    return {f"{fqn}.{number}": one for number, one in enumerate(weight.matrices())}


def check_frozen(weight: FrozenWeight, fqn: str, *, where: str) -> None:
    """Refuse codes and scales, read from a file, that their spec cannot mean.

    Shape and dtype of the codes follow from the spec, those of the scales from both; the magnitude
    of a scale is in the range of its grid, and only scales of a signed spec are negative; codes and
    zero points are in the range of their width.

    Raises:
        GracecError: naming the first tensor that does not fit.
    """
    spec, stored, grid = weight.spec, weight.stored, weight.activation
    packed = stored.dtype == torch.uint8
    if stored.ndim != 2 or stored.dtype not in (torch.uint8, torch.int8) or not stored.numel():
        raise _bad(fqn, "codes", f"are {_described(stored)}", where)
    rows, columns = weight.shape
    if packed != quant.is_packed(spec.bits, columns):
        raise _bad(fqn, "codes", f"are {_described(stored)}, which is not how {spec} lies", where)
    if columns % spec.group_of(columns):
        raise _bad(fqn, "codes", f"have {columns} columns, which {spec} does not divide", where)
    if weight.experts is not None and rows % weight.experts.count:
        raise _bad(fqn, "codes", f"have {rows} rows for {weight.experts.count} experts", where)
    _check_scales(
        weight.scales, spec.scale_shape(rows, columns), fqn, "scales", where, signed=spec.signed
    )
    if spec.bits != spec.storage_bits:
        _check_range(weight.codes, spec.bits, fqn, "codes", where)
    if grid is not None:
        groups = (grid.spec.groups(columns),)
        _check_scales(grid.scales, groups, fqn, "input_scales", where)
        if grid.zero_points.shape != groups or grid.zero_points.dtype != torch.int32:
            found = _described(grid.zero_points)
            raise _bad(fqn, "input_zero_points", f"are {found}, not {list(groups)}", where)
        _check_range(grid.zero_points, grid.spec.bits, fqn, "input_zero_points", where)
        if grid.spec.symmetric and grid.zero_points.any():
            raise _bad(fqn, "input_zero_points", "are not 0, and the grid is symmetric", where)


def _check_scales(
    scales: Tensor,
    shape: tuple[int, ...],
    fqn: str,
    name: str,
    where: str,
    *,
    signed: bool = False,
) -> None:
    if scales.shape != shape or not scales.is_floating_point():
        raise _bad(fqn, name, f"are {_described(scales)}, not {list(shape)}", where)
    scales = scales.float()
    low, high = (value.item() for value in (scales.abs() if signed else scales).aminmax())
    if not quant.SCALE_MIN <= low <= high <= quant.SCALE_MAX:  # nor with NaN
        lie = "have magnitudes" if signed else "lie"
        raise _bad(fqn, name, f"{lie} between {low:g} and {high:g}, which no scale does", where)


def _check_range(values: Tensor, bits: int, fqn: str, name: str, where: str) -> None:
    lowest, highest = quant.code_range(bits)
    low, high = (value.item() for value in values.aminmax())
    if low < lowest or high > highest:
        raise _bad(fqn, name, f"lie between {low} and {high}, out of {bits} bits", where)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _bad(fqn: str, name: str, what: str, where: str) -> GracecError:
    return GracecError(f"{fqn}.{name} {what}", where=where, fix="compile the model again")


def code_hash(weight: FrozenWeight) -> str:
    """SHA-256 of codes, scales and how they are to be read, and of the grid of the input."""
    digest = hashlib.sha256(repr(weight.spec).encode())
    if weight.experts is not None:
        digest.update(repr(weight.experts).encode())
    tensors = [weight.stored, weight.scales]
    if weight.activation is not None:
        digest.update(repr(weight.activation.spec).encode())
        tensors += [weight.activation.scales, weight.activation.zero_points]
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()

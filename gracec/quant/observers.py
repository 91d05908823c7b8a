"""Observers: watch values, then choose the scales and zero points of an integer grid.

    min_max          the whole range seen
    moving_average   an exponential average of each batch's range
    percentile       the range without the tails
    mse              the range of least squared error, by grid search

Values are looked at in groups, one scale each: the whole tensor, every feature (channel), or
`group_size` consecutive features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gracec.errors import GracecError
from gracec.quant import codes as quant
from gracec.quant.scale_search import search_scales

SAMPLE_VALUES = 1 << 18
"""Values that an observer keeps which needs more than the extremes."""


@dataclass(frozen=True)
class ActivationSpec:
    """How an activation [..., K] is quantized.

    Attributes:
        bits: width of the signed integer codes.
        granularity: per_tensor (scales [1]), per_channel ([K]) or per_group ([K / group_size]).
        observer: a name in `OBSERVERS`.
        percentile: share of the values, in per cent, that the percentile observer keeps.
        symmetric: whether the zero point is 0.
    """

    bits: int = 8
    granularity: str = "per_tensor"
    group_size: int = 128
    observer: str = "mse"
    percentile: float = 99.99
    symmetric: bool = False

    def __post_init__(self) -> None:
        quant.check_granularity(self.granularity)
        if self.observer not in OBSERVERS:
            raise GracecError(f"unknown observer {self.observer!r}", fix=f"use {list(OBSERVERS)}")

    def __str__(self) -> str:
        return f"int{self.bits}/{quant.granularity_text(self.granularity, self.group_size)}"

    def groups(self, features: int) -> int:
        """Number of scales for this many features."""
        if self.granularity == "per_tensor":
            return 1
        if self.granularity == "per_channel":
            return features
        if features % self.group_size:
            raise GracecError(
                f"group_size {self.group_size} does not divide the {features} features",
                fix="choose a group that divides the width",
            )
        return features // self.group_size

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields; `ActivationSpec(**d)` reads them back."""
        return asdict(self)


class Observer(nn.Module, ABC):
    """Returns what it is given, and remembers what it needs until calibration is over."""

    kind: ClassVar[str]

    def __init__(self, spec: ActivationSpec, features: int) -> None:
        super().__init__()
        self.spec = spec
        self.features = features
        self.seen = 0
        self.watching = True

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K], unchanged."""
        if not self.watching:
            return x
        with torch.no_grad():
            groups = self.spec.groups(self.features)
            rows = x.detach().to(torch.float32).reshape(-1, groups, self.features // groups)
            self.watch(rows.transpose(0, 1).reshape(groups, -1))
        self.seen += 1
        return x

    @abstractmethod
    def watch(self, values: Tensor) -> None:
        """Look at one batch of values [groups, n], float32."""

    @abstractmethod
    def value_range(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value to represent, [groups] each."""

    def scales_and_zero_points(self) -> tuple[Tensor, Tensor]:
        """float32 scales on their grid and int32 zero points, [groups] each.

        Raises:
            GracecError: if nothing was observed.
        """
        if not self.seen:
            raise GracecError("nothing was observed", fix="give calibration data")
        return grid_of_range(*self.value_range(), self.spec.bits, self.spec.symmetric)


class MinMax(Observer):
    kind = "min_max"
    low: Tensor
    high: Tensor

    def watch(self, values: Tensor) -> None:
        low, high = values.aminmax(dim=1)
        if self.seen:
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        self.low, self.high = low, high

    def value_range(self) -> tuple[Tensor, Tensor]:
        return self.low, self.high


class MovingAverage(MinMax):
    kind = "moving_average"
    momentum: ClassVar[float] = 0.1

    def watch(self, values: Tensor) -> None:
        low, high = values.aminmax(dim=1)
        if self.seen:
            low = self.low.lerp(low, self.momentum)
            high = self.high.lerp(high, self.momentum)
        self.low, self.high = low, high


class _Sampling(Observer):
    """Keeps a random sample of all values; each has the same chance, whatever its batch.

    Evenly spaced values would not do: a spacing that divides the width sees a few channels only.
    """

    sample: Tensor

    def __init__(self, spec: ActivationSpec, features: int) -> None:
        super().__init__(spec, features)
        self.one_in = 1
        self.random = torch.Generator().manual_seed(0)

    def watch(self, values: Tensor) -> None:
        chosen = self._draw(values, self.one_in)
        self.sample = torch.cat([self.sample, chosen], dim=1) if self.seen else chosen.clone()
        keep = max(64, SAMPLE_VALUES // values.shape[0])
        while self.sample.shape[1] > keep:
            self.sample = self._draw(self.sample, 2)
            self.one_in *= 2

    def _draw(self, values: Tensor, one_in: int) -> Tensor:
        """[groups, n] -> [groups, n / one_in]"""
        if one_in == 1:
            return values
        count = values.shape[1]
        order = torch.randperm(count, generator=self.random)[: max(1, count // one_in)]
        return values[:, order.to(values.device)]


class Percentile(_Sampling):
    kind = "percentile"

    def value_range(self) -> tuple[Tensor, Tensor]:
        ordered = self.sample.sort(dim=1).values
        last = ordered.shape[1] - 1
        tail = round(last * (1 - self.spec.percentile / 100) / 2)
        return ordered[:, tail], ordered[:, last - tail]


class Mse(_Sampling):
    kind = "mse"
    candidates: ClassVar[int] = 64

    def value_range(self) -> tuple[Tensor, Tensor]:
        low, high = self.sample.aminmax(dim=1)
        best_low, best_high = low, high
        best_error = torch.full_like(low, torch.inf)
        q_min, q_max = quant.code_range(self.spec.bits)
        for factor in torch.linspace(0.2, 1.0, self.candidates):
            scales, zeros = grid_of_range(
                low * factor, high * factor, self.spec.bits, self.spec.symmetric
            )
            s, z = scales.unsqueeze(1), zeros.unsqueeze(1)
            restored = ((self.sample / s).round() + z).clamp(q_min, q_max).sub(z) * s
            error = (restored - self.sample).square().sum(1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_low = torch.where(better, low * factor, best_low)
            best_high = torch.where(better, high * factor, best_high)
        return best_low, best_high


OBSERVERS: dict[str, type[Observer]] = {
    cls.kind: cls for cls in (MinMax, MovingAverage, Percentile, Mse)
}


def grid_of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points of signed codes that cover [low, high]; zero is always on the grid."""
    q_min, q_max = quant.code_range(bits)
    low, high = low.clamp_max(0), high.clamp_min(0)
    if symmetric:
        scales = quant.round_scale(torch.maximum(-low, high) / q_max, "bf16")
        return scales, torch.zeros_like(scales, dtype=torch.int32)
    scales = quant.round_scale((high - low) / (q_max - q_min), "bf16")
    zeros = torch.round(q_min - low / scales).clamp(q_min, q_max)
    return scales, zeros.to(torch.int32)


def weight_scales(
    weight: Tensor,
    spec: quant.QuantSpec,
    observer: str = "mse",
    *,
    candidates: int = 64,
    lowest: float = 0.3,
    highest: float = 1.2,
    percentile: float = 99.9,
    importance: Tensor | None = None,
) -> Tensor:
    """Symmetric scales of a weight [N, K] by one of the observers.

    Args:
        importance: float32 [K], what an error of each input feature counts to "mse"; the others
            look at the weight alone.

    Returns:
        float32 [N, K / group_size], [N, 1] or [1, 1], on the grid of the spec.

    Raises:
        GracecError: if the group does not divide K or the weight is not finite.
    """
    rows, columns = weight.shape
    flat = weight.detach().reshape(1, -1) if spec.granularity == "per_tensor" else weight.detach()
    group = flat.shape[1] if spec.granularity == "per_tensor" else spec.group_of(columns)
    if observer == "mse":
        if importance is not None and len(flat) < rows:
            importance = importance.repeat(rows)
        return search_scales(
            flat,
            spec.bits,
            group,
            scale_grid=spec.scale_grid,
            candidates=candidates,
            lowest=lowest,
            highest=highest,
            signed=spec.signed,
            importance=importance,
        )
    magnitudes = quant.grouped(flat.to(torch.float32), group).abs()
    if not torch.isfinite(magnitudes).all():
        raise GracecError("the weight holds NaN or infinity", fix="check the checkpoint")
    if observer == "min_max":
        largest = magnitudes.amax(-1)
    elif observer == "percentile":
        ordered = magnitudes.sort(dim=-1).values
        largest = ordered[..., round((group - 1) * percentile / 100)]
    else:
        raise GracecError(f"no observer {observer!r} for weights", fix="mse, min_max, percentile")
    _, q_max = quant.code_range(spec.bits)
    return quant.round_scale(largest / q_max, spec.scale_grid).reshape(
        spec.scale_shape(rows, columns)
    )

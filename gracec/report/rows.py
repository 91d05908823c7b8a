"""A row of a report for every matmul-like weight: what was planned for it, and how well it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gracec.passes.plan_quantization import Plan
from gracec.quant import QuantSpec


@dataclass(frozen=True)
class PlanRow:
    """What a report says of one weight.

    Attributes:
        fqns: its names in the state dict, more than one when it is tied.
        part: what it is for; see `gracec.ir.annotations.Part`.
        shape: [N, K] for linears.
        spec: how it is quantized, or None.
        reason: why it keeps its precision, empty when it is quantized.
        source_bytes, planned_bytes: as it was, and as planned.
        sqnr_db: signal to quantization noise in decibel; infinite without noise, None where it was
            not measured.
        ptq_sqnr_db: likewise before training.
    """

    fqns: tuple[str, ...]
    part: str
    shape: tuple[int, ...]
    spec: QuantSpec | None
    reason: str
    source_bytes: int
    planned_bytes: int
    sqnr_db: float | None = None
    ptq_sqnr_db: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: no noise is null, and a figure that was not measured is left out."""
        found = {**asdict(self), "fqns": list(self.fqns), "shape": list(self.shape)}
        for name in ("sqnr_db", "ptq_sqnr_db"):
            figure = found.pop(name)
            if figure is not None:
                found[name] = figure if math.isfinite(figure) else None
        return found

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> PlanRow:
        """What `to_dict` gave."""
        figures = {
            name: math.inf if saved[name] is None else float(saved[name])
            for name in ("sqnr_db", "ptq_sqnr_db")
            if name in saved
        }
        spec = None if saved["spec"] is None else QuantSpec(**saved["spec"])
        sequences = {name: tuple(saved[name]) for name in ("fqns", "shape")}
        return cls(**{**saved, **sequences, **figures, "spec": spec})


def plan_rows(
    plan: Plan,
    sqnr: Mapping[str, float] | None = None,
    before: Mapping[str, float] | None = None,
) -> tuple[PlanRow, ...]:
    """A row for each weight of a plan.

    Args:
        sqnr: FQN -> `sqnr_db`.
        before: FQN -> `ptq_sqnr_db`.
    """
    return tuple(
        PlanRow(
            fqns=entry.fqns,
            part=entry.part.value,
            shape=entry.shape,
            spec=entry.spec,
            reason=entry.reason,
            source_bytes=entry.source_bytes,
            planned_bytes=entry.planned_bytes,
            sqnr_db=(sqnr or {}).get(entry.fqn),
            ptq_sqnr_db=(before or {}).get(entry.fqn),
        )
        for entry in plan.entries
    )

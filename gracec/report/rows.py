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
        output_error: errors of the output, as shares of its energy: of plain rounding (to nearest,
            scales of the largest weight), of rounding on the searched scales, and as compiled.
            Measured on inputs that codes were not corrected on, if there were any. None where codes
            were not calibrated on data, no such input came by, plain rounding costs nothing, or
            training went on from them.
        rule: which of the recipe's `layers` decided; empty where its part did.
        codes: "corrected", "rounded" where that was no better, or "partly" where it was for some of
            the matrices of the weight; empty without such a calibration.
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
    output_error: tuple[float, float, float] | None = None
    codes: str = ""
    rule: str = ""

    @property
    def error_of_plain(self) -> float | None:
        """The output error as a share of that of plain rounding."""
        if self.output_error is None or not self.output_error[0]:
            return None
        plain, _, compiled = self.output_error
        return compiled / plain

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: no noise is null, and what was not measured is left out."""
        found = {**asdict(self), "fqns": list(self.fqns), "shape": list(self.shape)}
        for name in ("sqnr_db", "ptq_sqnr_db"):
            figure = found.pop(name)
            if figure is not None:
                found[name] = figure if math.isfinite(figure) else None
        errors = found.pop("output_error")
        if errors is not None:
            found["output_error"] = list(errors)
        for name in ("codes", "rule"):
            if not found[name]:
                del found[name]
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
        named = ("fqns", "shape", "output_error")
        sequences = {name: tuple(saved[name]) for name in named if saved.get(name) is not None}
        return cls(**{**saved, **sequences, **figures, "spec": spec})


def plan_rows(
    plan: Plan,
    sqnr: Mapping[str, float] | None = None,
    before: Mapping[str, float] | None = None,
    errors: Mapping[str, tuple[float, float, float]] | None = None,
    codes: Mapping[str, str] | None = None,
) -> tuple[PlanRow, ...]:
    """A row for each weight of a plan.

    Args:
        sqnr: FQN -> `sqnr_db`.
        before: FQN -> `ptq_sqnr_db`.
        errors: FQN -> `output_error`.
        codes: FQN -> `codes`.
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
            output_error=(errors or {}).get(entry.fqn),
            codes=(codes or {}).get(entry.fqn, ""),
            rule=entry.rule,
        )
        for entry in plan.entries
    )

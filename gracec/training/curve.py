"""What a run did: its figures, on disk step by step, and what they say at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
"""A row for each optimizer step, in the directory of a run."""


@dataclass
class Curve:
    """What a run did: a row for each optimizer step, the held-out scores, and what was kept."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "steps": len(self.rows),
            "best_step": self.best_step,
            "skipped": self.skipped,
            "held_out": self.held_out,
            "rows": self.rows,
        }

    def conclusions(self, *, distils: bool) -> list[str]:
        """What there is to say about a run that has ended, a line each."""
        first = self.held_out[0]
        best = next(row for row in self.held_out if row["step"] == self.best_step)
        found = [
            f"trained {len(self.rows)} steps; held-out loss {first['held_out_loss']:.4f} before, "
            f"{best['held_out_loss']:.4f} after step {best['step']}, which was kept"
        ]
        if best["step"] == 0:
            found.append("training did not help: the weights are those from before it")
        if self.skipped:
            found.append(f"{self.skipped} steps were skipped: their loss was not finite")
        saturated = sum(bool(row["saturated"]) for row in self.rows)
        if saturated and distils:
            share = saturated / len(self.rows)
            found.append(f"β stood at a bound in {share:.0%} of the steps; see tau")
        return found


def append_metrics(row: Mapping[str, Any], directory: Path) -> None:
    """One more row of the metrics file."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / METRICS).open("a", encoding="utf-8") as file:
        file.write(_line(row))


def write_metrics(curve: Curve, directory: Path) -> None:
    """The metrics file anew, as a checkpoint remembers it."""
    lines = "".join(_line(row) for row in curve.rows)
    (directory / METRICS).write_text(lines, encoding="utf-8")


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, sort_keys=True) + "\n"

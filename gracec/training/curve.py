"""What a run did: its figures, on disk step by step, and what they say at the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
"""A row for each optimizer step, in the directory of a run."""
CHOICES = {"held_out_loss": "held-out loss", "held_out_kl": "held-out KL to the teacher"}
"""What chooses the state that is kept, in words."""
CALIBRATED = "the calibrated post-training quantization"


@dataclass
class Seconds:
    """What an optimizer step took, and how much of it was waiting for its samples."""

    whole: float = 0.0
    data: float = 0.0


@dataclass
class Curve:
    """What a run did: a row for each optimizer step, the held-out scores, and what was kept.

    Attributes:
        held_out: the scores of the states that were looked at, by optimizer step.
        best_step: of the state that was kept; None is the candidate.
        candidate: scores of the calibrated post-training quantization, where it was a candidate.
        chosen_by: the score that chose it, a name in `CHOICES`; the least is best.
        seconds: of the steps that this process took; no two runs have the same.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    held_out: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = 0
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    candidate: dict[str, Any] | None = None
    chosen_by: str = "held_out_loss"
    seconds: list[Seconds] = field(default_factory=list, compare=False)

    def waiting(self) -> str:
        """How long the steps of this process took, and what share of it they waited for data."""
        whole, data = (sum(getattr(one, of) for one in self.seconds) for of in ("whole", "data"))
        share = data / whole if whole else 0.0
        steps = len(self.seconds)
        return f"{steps} steps took {whole:,.1f} s, {share:.0%} of it waiting for samples"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the same for runs to the same bits."""
        return {
            "steps": len(self.rows),
            "best_step": self.best_step,
            "chosen_by": self.chosen_by,
            "candidate": self.candidate,
            "skipped": self.skipped,
            "held_out": self.held_out,
            "rows": self.rows,
        }

    def conclusions(self, *, distils: bool) -> list[str]:
        """What there is to say about a run that has ended, a line each."""
        scores = {row["step"]: row[self.chosen_by] for row in self.held_out}
        score = CHOICES[self.chosen_by]
        trained = f"trained {len(self.rows)} steps; {score} {scores[0]:.4f} before"
        other = None if self.candidate is None else self.candidate[self.chosen_by]
        calibrated = "not finite" if other is None else f"{other:.4f}"
        if self.best_step is None:
            reached = {step: one for step, one in scores.items() if one is not None}
            step = min(reached, key=lambda step: reached[step])
            found = [f"{trained}, {reached[step]:.4f} after step {step}"]
            found.append(f"{CALIBRATED} alone: {calibrated}")
            found.append(f"{CALIBRATED} was better than every trained state: kept")
        else:
            best = scores[self.best_step]
            found = [f"{trained}, {best:.4f} after step {self.best_step}, which was kept"]
            if self.candidate is not None:
                found.append(f"{CALIBRATED} alone: {calibrated}")
            if self.best_step == 0:
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

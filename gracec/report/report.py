"""The report of one compilation: plan, notes, gates and sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

from gracec import quant
from gracec.passes.freeze import FrozenWeight
from gracec.passes.insert_fake_quant import fake_quantized
from gracec.passes.plan_quantization import Plan
from gracec.program import Program
from gracec.quant import QuantSpec


@dataclass(frozen=True)
class Report:
    """Everything a user should know about a compiled model.

    Attributes:
        recipe: the resolved recipe.
        plan: one row per matmul-like weight: names, part, shape, spec or reason.
        notes: what the passes decided, skipped or refused.
        gates: name of each gate -> the figures it found.
        sizes: bytes of all weights in float32, bfloat16 and as compiled.
        accuracy: scores of "original" and "compiled" on "data", and their paired "difference";
            empty if it was not measured.
        training: rows of the loss terms, held-out scores and the step that was kept; empty if
            nothing was trained.
    """

    recipe: Mapping[str, Any]
    plan: list[dict[str, Any]]
    notes: list[str]
    gates: dict[str, Any]
    sizes: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def coverage_table(self) -> Table:
        """Bytes by part of the model: quantized, kept, and why."""
        return coverage_table(self.plan)

    def errors_table(self) -> Table:
        """Signal to quantization noise of every quantized weight, the worst first."""
        table = Table("weight", "scheme", "SQNR dB")
        table.columns[2].justify = "right"
        rows = [row for row in self.plan if row["spec"]]
        for row in sorted(rows, key=_sqnr):
            found = row.get("sqnr_db")
            spec = QuantSpec(**row["spec"])
            table.add_row(row["fqns"][0], str(spec), "exact" if found is None else f"{found:.1f}")
        return table

    def gates_table(self) -> Table:
        """The gates that passed and the figures they found."""
        table = Table("gate", "figure")
        for gate, figure in self.gates.items():
            if isinstance(figure, Mapping):
                text = ", ".join(f"{name} {value:.4g}" for name, value in figure.items())
            else:
                text = f"{figure:.3g}" if isinstance(figure, float) else str(figure)
            table.add_row(gate.replace("_", " "), text)
        return table

    def sizes_line(self) -> str:
        """Weight bytes, and how much smaller the compiled model is."""
        source, compiled = self.sizes["bfloat16"], self.sizes["compiled"]
        return (
            f"weights: float32 {self.sizes['float32']:,} B, bfloat16 {source:,} B, "
            f"compiled {compiled:,} B ({1 - compiled / source:.0%} less than bfloat16)"
        )

    def accuracy_line(self) -> str:
        """Exact match before and after, with standard errors."""
        before, after = (self.accuracy[name]["overall"] for name in ("original", "compiled"))
        difference = self.accuracy["difference"]
        return (
            f"accuracy on {before['n']} questions: original {before['accuracy']:.1%} "
            f"±{before['standard_error']:.1%}, compiled {after['accuracy']:.1%} "
            f"±{after['standard_error']:.1%}, difference {difference['difference']:+.1%} "
            f"±{difference['standard_error']:.1%}"
        )


def coverage_table(plan: Sequence[Mapping[str, Any]]) -> Table:
    """Bytes by part of the model: quantized, kept, and why; from the rows of a plan."""
    table = Table(*COVERAGE)
    for row in coverage_rows(plan):
        table.add_row(*row)
    return table


ACCURACY = ("questions", "n", "original", "compiled", "without the image", "commonest answer")


def accuracy_cells(accuracy: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """For all questions, and for each type of them, the cells of `ACCURACY`; none if none."""
    if not accuracy:
        return []
    pair = [accuracy[name] for name in ("original", "compiled")]
    found: list[tuple[str, ...]] = []
    for kind in ("overall", *pair[1]["types"]):
        scores = [s["overall"] if kind == "overall" else s["types"][kind] for s in pair]
        figures = [f"{s['accuracy']:.1%} ±{s['standard_error']:.1%}" for s in scores]
        blind = scores[1]["blind_accuracy"]
        controls = ["-" if blind is None else f"{blind:.1%}", f"{scores[1]['majority']:.1%}"]
        found.append((kind, str(scores[1]["n"]), *figures, *controls))
    return found


COVERAGE = ("part", "weights", "bytes", "quantized", "kept because")


def coverage_rows(plan: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """For each part of the model the cells of `COVERAGE`."""
    found: list[tuple[str, ...]] = []
    for part in dict.fromkeys(row["part"] for row in plan):
        rows = [row for row in plan if row["part"] == part]
        total = sum(row["source_bytes"] for row in rows)
        quantized = sum(row["source_bytes"] for row in rows if row["spec"])
        reasons = Counter(row["reason"] for row in rows if row["reason"])
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
        share = f"{quantized / total:.0%}" if total else "-"
        found.append((part, str(len(rows)), f"{total:,}", share, why))
    return found


def sqnr_db(program: Program) -> dict[str, float | None]:
    """FQN -> signal to quantization noise in decibel of each fake-quantized weight of a program.

    None where there is no noise.
    """
    found: dict[str, float | None] = {}
    for fake in fake_quantized(program):
        signal = noise = 0.0
        for part, scale in quant.row_chunks(fake.weight, fake.scales):
            quantized = quant.fake_quantize(part, scale, fake.bits, fake.group_size)
            reference = part.to(torch.float32)
            signal += reference.square().sum(dtype=torch.float64).item()
            noise += (reference - quantized).square().sum(dtype=torch.float64).item()
        found[fake.fqn] = 10 * math.log10(signal / noise) if signal and noise else None
    return found


def _sqnr(row: Mapping[str, Any]) -> float:
    found = row.get("sqnr_db")
    return math.inf if found is None else float(found)


def plan_rows(
    plan: Plan,
    sqnr: Mapping[str, float | None] | None = None,
    before: Mapping[str, float | None] | None = None,
) -> list[dict[str, Any]]:
    """A plan as JSON-able rows.

    Args:
        sqnr: becomes `sqnr_db` of the quantized weights.
        before: likewise before training, becomes `ptq_sqnr_db`.
    """
    return [
        {
            "fqns": list(entry.fqns),
            "part": entry.part,
            "shape": list(entry.shape),
            "spec": entry.spec.to_dict() if entry.spec else None,
            "reason": entry.reason,
            "source_bytes": entry.source_bytes,
            "planned_bytes": entry.planned_bytes,
            **({"sqnr_db": sqnr[entry.fqn]} if sqnr and entry.fqn in sqnr else {}),
            **({"ptq_sqnr_db": before[entry.fqn]} if before and entry.fqn in before else {}),
        }
        for entry in plan.entries
    ]


def weight_bytes(
    model: PreTrainedModel, weights: Mapping[str, FrozenWeight], parameters: int
) -> dict[str, int]:
    """Bytes of the original as float32 and as bfloat16, and of the model as compiled.

    As compiled means packed codes, 16-bit scales, and everything else in 16 bits.

    Args:
        parameters: how many the original has; a head that was tied has become one more weight.
    """
    kept = sum(p.numel() for name, p in model.named_parameters() if name not in weights)
    codes = sum(weight.shape.numel() * weight.spec.storage_bits // 8 for weight in weights.values())
    scales = sum(weight.scales.numel() * 2 for weight in weights.values())
    return {
        "float32": parameters * 4,
        "bfloat16": parameters * 2,
        "compiled": kept * 2 + codes + scales,
    }

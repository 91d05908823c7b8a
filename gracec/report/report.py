"""The report of one compilation: plan, notes, gates and sizes."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from gracec import quant
from gracec.frozen import Frozen
from gracec.ir.program import Program
from gracec.journal import Agreement, Figure, Journal, Note, figure_of, figure_to_dict
from gracec.passes.base import run_passes
from gracec.passes.freeze import DEQUANTIZE, SCALE_CODES, Freeze, frozen_weights
from gracec.passes.insert_fake_quant import fake_quantized
from gracec.recipe import Recipe
from gracec.report.rows import PlanRow


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
    plan: tuple[PlanRow, ...]
    notes: tuple[Note, ...]
    gates: dict[str, Figure]
    sizes: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, journal: Journal) -> Report:
        """What a journal says, once."""
        return cls(
            recipe.to_dict(),
            journal.plan,
            tuple(journal.notes),
            dict(journal.figures),
            dict(journal.sizes),
            copy.deepcopy(journal.accuracy),
            copy.deepcopy(journal.training),
        )

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Report:
        """What `to_dict` gave, now or before notes and figures had types.

        Raises:
            TypeError, KeyError: if it is no report.
        """
        notes = tuple(Note.of(note) for note in saved["notes"])
        gates = {name: figure_of(figure) for name, figure in saved["gates"].items()}
        plan = tuple(PlanRow.from_dict(row) for row in saved["plan"])
        return cls(**{**saved, "plan": plan, "notes": notes, "gates": gates})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        gates = {name: figure_to_dict(figure) for name, figure in self.gates.items()}
        notes, plan = ([one.to_dict() for one in many] for many in (self.notes, self.plan))
        return {**asdict(self), "plan": plan, "notes": notes, "gates": gates}

    def coverage_table(self) -> Table:
        """Bytes by part of the model: quantized, kept, and why."""
        return coverage_table(self.plan)

    def errors_table(self) -> Table:
        """Output error and signal to quantization noise of every quantized weight, the worst
        first."""
        head = error_head(self.plan)
        table = rich_table(head, error_rows(self.plan), right=head[2:])
        table.caption = SQNR_NOTE if OUTPUT_ERRORS[0] in head else None
        return table

    def gates_table(self) -> Table:
        """The gates that passed, what they found and what they allow."""
        return rich_table(GATES, gate_rows(self.gates))

    def sizes_line(self) -> str:
        """Weight bytes, and how much smaller the compiled model is."""
        source, compiled = self.sizes["bfloat16"], self.sizes["compiled"]
        return (
            f"weights: float32 {self.sizes['float32']:,} B, bfloat16 {source:,} B, "
            f"compiled {compiled:,} B ({1 - compiled / source:.0%} less than bfloat16)"
        )

    def output_error_line(self) -> str:
        """How much correcting codes was worth; empty where none were corrected, or none kept."""
        found = [row.error_of_plain for row in self.plan]
        shares = [share for share in found if share is not None]
        if not shares:
            return ""
        rounded, corrected = (self.gates.get(f"{how}_logits") for how in ("rounded", "corrected"))
        compared = isinstance(rounded, Agreement) and isinstance(corrected, Agreement)
        where = "held-out inputs" if compared else "the inputs it was calibrated on"
        line = (
            f"output error on {where}: median {median(shares):.2g} of plain rounding's, "
            f"worst {max(shares):.2g}"
        )
        if isinstance(rounded, Agreement) and isinstance(corrected, Agreement):
            line += f"; logits KL {corrected.kl:.2g} nats against {rounded.kl:.2g}"
        return line

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


def rich_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()
) -> Table:
    """Cells for a terminal.

    Args:
        right: columns of numbers.
    """
    table = Table()
    for name in head:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def coverage_table(plan: Sequence[PlanRow]) -> Table:
    """Bytes by part of the model: quantized, kept, and why; from the rows of a plan."""
    return rich_table(COVERAGE, coverage_rows(plan))


CODES = (DEQUANTIZE, SCALE_CODES)


GATES = ("gate", "figure")


def gate_rows(gates: Mapping[str, Figure]) -> list[tuple[str, ...]]:
    """For each gate the cells of `GATES`."""
    return [(gate.replace("_", " "), str(figure)) for gate, figure in gates.items()]


ERRORS = ("weight", "scheme", "SQNR dB")
OUTPUT_ERRORS = ("plain error", "searched", "compiled")
SQNR_NOTE = (
    "Errors of the output, as shares of its energy: of plain rounding, of rounding on the "
    "searched scales, and as compiled. Corrected codes lower them and raise that of the weight "
    "instead: its SQNR does not say how good they are."
)
"""Below the cells of `OUTPUT_ERRORS`."""


def error_head(plan: Sequence[PlanRow]) -> tuple[str, ...]:
    """`ERRORS`, and `OUTPUT_ERRORS` where there are any."""
    measured = any(row.output_error is not None for row in plan)
    return (*ERRORS, *OUTPUT_ERRORS) if measured else ERRORS


def error_rows(plan: Sequence[PlanRow]) -> list[tuple[str, ...]]:
    """For each quantized weight the cells of `error_head`, the worst first: by output error, and
    after those by SQNR where there is none."""
    columns = len(error_head(plan))
    quantized = sorted((row for row in plan if row.spec is not None), key=_goodness)
    return [
        (row.fqns[0], str(row.spec), _noise_cell(row), *_error_cells(row))[:columns]
        for row in quantized
    ]


def _goodness(row: PlanRow) -> tuple[bool, float]:
    if row.output_error is not None:
        return False, -row.output_error[-1]
    return True, math.inf if row.sqnr_db is None else row.sqnr_db


def _noise_cell(row: PlanRow) -> str:
    finite = row.sqnr_db is not None and math.isfinite(row.sqnr_db)
    return f"{row.sqnr_db:.1f}" if finite else "exact"


def _error_cells(row: PlanRow) -> list[str]:
    """Of `OUTPUT_ERRORS`; codes that are rounded after all, or some of them, are called so."""
    if row.output_error is None:
        return ["-"] * len(OUTPUT_ERRORS)
    *others, compiled = (f"{share:.3g}" for share in row.output_error)
    how = {"rounded": ", rounded", "partly": ", partly rounded"}.get(row.codes, "")
    return [*others, compiled + how]


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


def coverage_rows(plan: Sequence[PlanRow]) -> list[tuple[str, ...]]:
    """For each part of the model the cells of `COVERAGE`."""
    found: list[tuple[str, ...]] = []
    for part in dict.fromkeys(row.part for row in plan):
        rows = [row for row in plan if row.part == part]
        total = sum(row.source_bytes for row in rows)
        quantized = sum(row.source_bytes for row in rows if row.spec is not None)
        reasons = Counter(row.reason for row in rows if row.reason)
        why = "; ".join(f"{reason} ({count})" for reason, count in reasons.items())
        share = f"{quantized / total:.0%}" if total else "-"
        found.append((part, str(len(rows)), f"{total:,}", share, why))
    return found


def sqnr_db(program: Program, original: nn.Module | None = None) -> dict[str, float]:
    """FQN -> signal to quantization noise in decibel of each quantized weight of a program.

    Infinite where there is no noise. A float weight of the program is compared with what it is
    quantized to. Codes, and a float weight that was made of codes and so has no noise of its own,
    are compared with the weight of the original.

    Args:
        original: a model with the weights before quantization; without it codes have no figure.
    """
    found: dict[str, float] = {}
    for fake in fake_quantized(program):
        signal = noise = 0.0
        for part, scale in quant.row_chunks(fake.weight, fake.scales):
            quantized = quant.fake_quantize(part, scale, fake.bits, fake.group_size)
            signal, noise = signal + _power(part), noise + _power(part.float() - quantized)
        found[fake.fqn] = _decibel(signal, noise)
    weights = {} if original is None else dict(original.named_parameters(remove_duplicate=False))
    exact = [fqn for fqn, figure in found.items() if math.isinf(figure) and fqn in weights]
    if not weights or not (exact or any(any(program.nodes(op)) for op in CODES)):
        return found
    frozen = frozen_weights(run_passes(program, [Freeze()]).program)
    for fqn in [*exact, *(fqn for fqn in frozen if fqn not in found and fqn in weights)]:
        weight, signal, noise = frozen[fqn], 0.0, 0.0
        experts, reference = weight.experts, weights[fqn].detach()
        matrix = reference if experts is None else experts.matrix(reference)
        for part, stored, scale in quant.row_chunks(matrix, weight.stored, weight.scales):
            quantized = quant.dequantize(stored, scale, weight.group_size)
            quantized = quantized.to(part.device)
            signal, noise = signal + _power(part), noise + _power(part.float() - quantized)
        found[fqn] = _decibel(signal, noise)
    return found


def _power(part: Tensor) -> float:
    return part.to(torch.float32).square().sum(dtype=torch.float64).item()


def _decibel(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if signal and noise else math.inf


def weight_bytes(frozen: Frozen, parameters: int) -> dict[str, int]:
    """Bytes of the original as float32 and as bfloat16, and of the model as compiled.

    As compiled means packed codes, 16-bit scales, and everything else in 16 bits.

    Args:
        parameters: how many the original has; a head that was tied has become one more weight.
    """
    names = {name for name, _ in frozen.skeleton.named_parameters()}
    kept = sum(tensor.numel() for name, tensor in frozen.others.items() if name in names)
    weights = frozen.weights.values()
    codes = sum(weight.shape.numel() * weight.spec.storage_bits // 8 for weight in weights)
    scales = sum(weight.scales.numel() * 2 for weight in weights)
    return {
        "float32": parameters * 4,
        "bfloat16": parameters * 2,
        "compiled": kept * 2 + codes + scales,
    }

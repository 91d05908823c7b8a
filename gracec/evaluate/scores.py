"""Accuracies by exact match, with their standard errors and the controls that give them a meaning.

Each accuracy comes with its standard error and with three controls: `blind` (the same questions
with the image zeroed after normalisation), `majority` (always the most frequent answer of the type)
and `chance` (any answer of the type). The overall row is the micro average; its majority and chance
are those of a guesser who knows the type of each question.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from gracec.errors import GracecError


@dataclass(frozen=True)
class VqaScore:
    """The figures of one type of question; shares between 0 and 1."""

    n: int
    accuracy: float
    standard_error: float
    chance: float
    majority: float
    blind_accuracy: float | None
    blind_standard_error: float | None


@dataclass(frozen=True)
class Prediction:
    """What was generated for one sample; `blind` is the answer without the image."""

    index: int
    type: str
    predicted: str
    answer: str
    correct: bool
    blind: str | None = None


@dataclass(frozen=True)
class VqaReport:
    """Scores by type, in the order in which the types appear, and over all samples."""

    overall: VqaScore
    types: Mapping[str, VqaScore]
    predictions: tuple[Prediction, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-able values."""
        return {
            "overall": asdict(self.overall),
            "types": {name: asdict(score) for name, score in self.types.items()},
            "predictions": [asdict(prediction) for prediction in self.predictions],
        }


class PairedDifference(NamedTuple):
    """Mean difference in accuracy over the same samples, and its standard error."""

    difference: float
    standard_error: float


def normalise_answer(text: str) -> str:
    """Lower case, single spaces, no punctuation at the end."""
    text = " ".join(text.lower().split())
    return re.sub(f"[{re.escape(string.punctuation)}\\s]+$", "", text) or text


def summarise(predictions: Sequence[Prediction]) -> VqaReport:
    """The report of a list of predictions."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.type, []).append(prediction)
    types = {name: _score(group) for name, group in groups.items()}
    chance = sum(score.n * score.chance for score in types.values()) / len(predictions)
    majority = sum(score.n * score.majority for score in types.values()) / len(predictions)
    return VqaReport(
        overall=_score(predictions, chance=chance, majority=majority),
        types=types,
        predictions=tuple(predictions),
    )


def paired_difference(a: VqaReport, b: VqaReport) -> PairedDifference:
    """How much more accurate `a` is than `b`, both over the same samples.

    The standard error is that of the mean of the per-sample differences, which leaves out how hard
    the questions are; like the binomial one it divides by n.
    """
    if _sample_keys(a) != _sample_keys(b):
        raise GracecError(
            "the two reports are not over the same samples",
            fix="evaluate both models on one list of samples",
        )
    differences = [
        int(left.correct) - int(right.correct)
        for left, right in zip(a.predictions, b.predictions, strict=True)
    ]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((value - mean) ** 2 for value in differences) / n
    return PairedDifference(mean, math.sqrt(variance / n))


def format_table(reports: Mapping[str, VqaReport]) -> Table:
    """One row a type, one column a model ("59.1 ±0.8", per cent), and the controls beside them.

    With several models `blind` is that of the model which guesses best without the image.
    """
    if not reports:
        raise GracecError("no reports to show")
    first = next(iter(reports.values()))
    for name, report in reports.items():
        if _sample_keys(report) != _sample_keys(first):
            raise GracecError(
                "the report is not over the same samples as the first one",
                where=name,
                fix="evaluate all models on one list of samples",
            )
    caption = "blind: the best of the models" if len(reports) > 1 else None
    # No frame: three models and their controls fit into 80 columns.
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=caption)
    table.add_column("type")
    table.add_column("n", justify="right")
    for name in (*reports, "blind"):
        # A narrow terminal breaks the name, never the figure.
        table.add_column(name, justify="right", min_width=len("59.1 ±0.8"))
    table.add_column("majority", justify="right")
    table.add_column("chance", justify="right")
    for name in first.types:
        table.add_row(name, *_cells([report.types[name] for report in reports.values()]))
    table.add_section()
    table.add_row("overall", *_cells([report.overall for report in reports.values()]))
    return table


def _cells(scores: Sequence[VqaScore]) -> list[str]:
    blind = max(
        scores, key=lambda score: -1.0 if score.blind_accuracy is None else score.blind_accuracy
    )
    return [
        str(scores[0].n),
        *(_percent(score.accuracy, score.standard_error) for score in scores),
        _percent(blind.blind_accuracy, blind.blind_standard_error),
        _percent(scores[0].majority),
        _percent(scores[0].chance),
    ]


def _percent(share: float | None, error: float | None = None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.1f}" if error is None else f"{100 * share:.1f} ±{100 * error:.1f}"


def accuracy_rows(original: VqaReport, compiled: VqaReport, data: str) -> dict[str, Any]:
    """Scores of both models and their paired difference, JSON-able and without the answers."""
    scores = {
        name: {"overall": asdict(r.overall), "types": {t: asdict(s) for t, s in r.types.items()}}
        for name, r in (("original", original), ("compiled", compiled))
    }
    difference = paired_difference(compiled, original)._asdict()
    return {"data": data, **scores, "difference": difference}


def _sample_keys(report: VqaReport) -> list[tuple[int, str, str]]:
    return [(one.index, one.type, one.answer) for one in report.predictions]


def same_answer(predicted: str, answer: str) -> bool:
    return normalise_answer(predicted) == normalise_answer(answer)


def _score(
    group: Sequence[Prediction], chance: float | None = None, majority: float | None = None
) -> VqaScore:
    n = len(group)
    answers = Counter(normalise_answer(one.answer) for one in group)
    accuracy = sum(one.correct for one in group) / n
    blind = [same_answer(one.blind, one.answer) for one in group if one.blind is not None]
    blind_accuracy = sum(blind) / n if len(blind) == n else None
    return VqaScore(
        n=n,
        accuracy=accuracy,
        standard_error=_binomial_error(accuracy, n),
        chance=1 / len(answers) if chance is None else chance,
        majority=max(answers.values()) / n if majority is None else majority,
        blind_accuracy=blind_accuracy,
        blind_standard_error=None if blind_accuracy is None else _binomial_error(blind_accuracy, n),
    )


def _binomial_error(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / n)

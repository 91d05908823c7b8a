"""The report of a run as one HTML file that needs nothing else: no script, no request, no font."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from gracec._version import __version__
from gracec.evaluate import VqaReport, VqaSample
from gracec.report.report import (
    ACCURACY,
    COVERAGE,
    GATES,
    SQNR_NOTE,
    Report,
    accuracy_cells,
    coverage_rows,
    error_head,
    error_rows,
    gate_rows,
)
from gracec.report.rows import PlanRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, PURPLE, GREEN, QUIET = "#1f7a8c", "#b8741a", "#6a4c9c", "#2e8b57", "#888888"
SCORES = {"held_out_loss": "cross-entropy", "held_out_kl": "KL to the teacher"}
"""What may have chosen the state that was kept."""
TERMS = {"ce": ("cross-entropy", BLUE), "distillation": ("distillation", PURPLE)}
EXAMPLES = 6
"""Questions of each kind that are shown with their answers."""
THUMBNAIL = 192
"""Pixels of the longer side of an example's picture."""


@dataclass(frozen=True)
class Example:
    """A question, its picture as a data URI, and what every artifact answered."""

    image: str
    question: str
    expected: str
    answers: Mapping[str, tuple[str, bool]]


def render_page(
    reports: Mapping[str, Report],
    source: str,
    samples: Sequence[VqaSample] = (),
    answered: Mapping[str, VqaReport | None] | None = None,
) -> str:
    """The page as text.

    Args:
        reports: name of an artifact -> its report; the page is about the first one.
        source: name of the model that was compiled.
        samples, answered: questions, and what every artifact answered to them.
    """
    name, report = next(iter(reports.items()))
    found = {n: a for n, a in (answered or {}).items() if a is not None}
    environment = Environment(
        loader=PackageLoader("gracec", "report"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        version=__version__,
        source=source,
        name=name,
        report=report,
        recipe=yaml.safe_dump(dict(report.recipe), sort_keys=False, allow_unicode=True),
        coverage=(COVERAGE, coverage_rows(report.plan)),
        gates=(GATES, gate_rows(report.gates)),
        accuracy=(ACCURACY, accuracy_cells(report.accuracy)),
        pictures=_pictures(reports),
        errors=(error_head(report.plan), error_rows(report.plan)),
        sqnr_note=SQNR_NOTE if report.output_error_line() else "",
        examples=_examples(samples, found) if found else {},
        asked={n: a.overall for n, a in found.items()},
        percent=lambda share: "-" if share is None else f"{100 * share:.1f} %",
    )


# Pictures -------------------------------------------------------------------------------------


def _pictures(reports: Mapping[str, Report]) -> dict[str, str]:
    """Caption -> data URI of every picture that there are figures for."""
    report = next(iter(reports.values()))
    found: dict[str, str] = {}
    if report.training.get("rows"):
        found["Training: terms of the loss, the controller, and the held-out part"] = _drawn(
            _training_curves, report, (11, 3.5)
        )
    if any(row.error_of_plain for row in report.plan):
        found["Error of the output of every weight, before and after its codes were corrected"] = (
            _drawn(_output_errors, report, (11, 3.6))
        )
    if any(row.sqnr_db is not None for row in report.plan):
        found["Signal to quantization noise of every weight"] = _drawn(_noise, report, (11, 3.6))
    if sum(bool(other.accuracy) for other in reports.values()) > 1:
        found["Accuracy against bits for each parameter"] = _drawn(_bits, reports, (6, 3.6))
    return found


def _drawn(draw: Any, subject: Any, size: tuple[float, float]) -> str:
    """What a function draws, as SVG in a data URI: equal for equal figures."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "gracec", "text.parse_math": False}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, subject)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _training_curves(figure: Figure, report: Report) -> None:
    rows, held_out = report.training["rows"], report.training["held_out"]
    terms, control, scores = figure.subplots(1, 3)
    for name, (words, colour) in TERMS.items():
        _line(terms, rows, name, words, colour)
    aligned = terms.twinx()
    _line(aligned, rows, "rcka", "1 - CKA (right scale)", GREEN)
    aligned.set(ylim=(0, None))
    terms.set(xlabel="optimizer step", title="terms of the loss, nats", ylim=(0, None))
    _legend(terms, aligned)
    _line(control, rows, "beta", "β", ORANGE)
    _line(control, rows, "ema", "moving average of distillation", QUIET)
    control.set(xlabel="optimizer step", title="the controller of β", ylim=(0, None))
    _legend(control)
    chosen_by = report.training.get("chosen_by", "held_out_loss")
    points = [row for row in held_out if row[chosen_by] is not None]
    at = [row["step"] for row in points]
    scores.plot(at, [row[chosen_by] for row in points], "o-", color=BLUE)
    best, candidate = report.training["best_step"], report.training.get("candidate")
    if best is not None:
        scores.axvline(best, color=QUIET, ls=":", label="kept")
    if candidate is not None and candidate[chosen_by] is not None:
        label = "calibrated, kept" if best is None else "calibrated"
        scores.axhline(candidate[chosen_by], color=ORANGE, ls="--", lw=1, label=label)
    scores.set(xlabel="optimizer step", title=f"{SCORES[chosen_by]}, held out")
    _legend(scores)


def _legend(*axes: Axes) -> None:
    """Below the picture, where it hides no line."""
    parts = [one.get_legend_handles_labels() for one in axes]
    handles = [handle for part, _ in parts for handle in part]
    labels = [label for _, part in parts for label in part]
    axes[0].legend(
        handles,
        labels,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=2,
        frameon=False,
        fontsize=8,
    )


def _line(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, words: str, color: str) -> None:
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if any(value for _, value in points):
        axes.plot(*zip(*points, strict=True), color=color, label=words, lw=1)
    else:
        axes.plot([], [], color=color, label=f"{words}: off")


def _drawable(figure: float | None) -> float:
    """A finite figure, or NaN, which is not drawn."""
    return figure if figure is not None and math.isfinite(figure) else math.nan


def _noise(figure: Figure, report: Report) -> None:
    """A point a weight, in the order of the plan; hollow ones are those before training."""
    rows = [row for row in report.plan if not math.isnan(_drawable(row.sqnr_db))]
    places = list(range(len(rows)))
    axes = figure.subplots()
    if any(row.ptq_sqnr_db is not None for row in rows):
        before = [_drawable(row.ptq_sqnr_db) for row in rows]
        axes.plot(places, before, "o", mfc="none", color=QUIET, label="before training")
    axes.plot(
        places, [_drawable(row.sqnr_db) for row in rows], ".", color=BLUE, label="as compiled"
    )
    _name_weights(axes, rows)
    axes.set(ylabel="dB")
    axes.legend(frameon=False)


def _output_errors(figure: Figure, report: Report) -> None:
    """A line a weight, in the order of the plan, from plain rounding down to what was compiled."""
    errors = [(row, row.output_error) for row in report.plan if row.output_error is not None]
    series = zip(*(shares for _, shares in errors), strict=True)
    plain, searched, compiled = ([one if one > 0 else math.nan for one in each] for each in series)
    places = list(range(len(errors)))
    axes = figure.subplots()
    axes.vlines(places, compiled, plain, color=QUIET, lw=0.8, alpha=0.6)
    axes.plot(places, plain, "o", mfc="white", color=QUIET, label="plain rounding")
    axes.plot(places, searched, "_", color=ORANGE, ms=7, mew=2, label="searched scales, rounded")
    axes.plot(places, compiled, "o", color=BLUE, ms=5, label="as compiled")
    _name_weights(axes, [row for row, _ in errors])
    axes.set(ylabel="share of the output's energy", yscale="log")
    axes.grid(axis="y", which="both", alpha=0.25, lw=0.6)
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False
    )


def _name_weights(axes: Axes, rows: Sequence[PlanRow]) -> None:
    """Under their places, if they are few enough to be read."""
    names = [row.fqns[0].removesuffix(".weight").split(".layers.")[-1] for row in rows]
    if len(rows) <= 64:
        axes.set_xticks(range(len(rows)), names, rotation=90, fontsize=7)
    else:
        axes.set_xlabel("weight, in the order of the model")


def _bits(figure: Figure, reports: Mapping[str, Report]) -> None:
    axes = figure.subplots()
    original = None
    for name, report in reports.items():
        if not report.accuracy:
            continue
        score = report.accuracy["compiled"]["overall"]
        original = report.accuracy["original"]["overall"]
        bits = 32 * report.sizes["compiled"] / report.sizes["float32"]
        error = 100 * score["standard_error"]
        axes.errorbar([bits], [100 * score["accuracy"]], [error], fmt="o", capsize=3, label=name)
    if original is not None:
        axes.axhline(100 * original["accuracy"], color=QUIET, ls="--", label="original")
    axes.set(xlabel="bits for each parameter, everything counted", ylabel="% right")
    axes.legend(frameon=False, fontsize=8)


# Examples -------------------------------------------------------------------------------------


def _examples(
    samples: Sequence[VqaSample], answered: Mapping[str, VqaReport]
) -> dict[str, list[Example]]:
    """Heading -> questions: those that set the first artifact apart from the others."""
    first, *others = answered.values()
    right = [prediction.correct for prediction in first.predictions]
    if not others:
        return {"Answered wrongly": _shown(samples, answered, [not one for one in right])}
    theirs = [[one.correct for one in other.predictions] for other in others]
    all_right = [all(column) for column in zip(*theirs, strict=True)]
    any_right = [any(column) for column in zip(*theirs, strict=True)]
    mended = [mine and not them for mine, them in zip(right, all_right, strict=True)]
    broken = [them and not mine for mine, them in zip(right, any_right, strict=True)]
    name = next(iter(answered))
    return {
        f"{name} is right and another is wrong: {sum(mended)} of {len(samples)}": _shown(
            samples, answered, mended
        ),
        f"{name} is wrong and another is right: {sum(broken)} of {len(samples)}": _shown(
            samples, answered, broken
        ),
    }


def _shown(
    samples: Sequence[VqaSample], answered: Mapping[str, VqaReport], chosen: Sequence[bool]
) -> list[Example]:
    """A few of the chosen questions, type after type so that none fills the page."""
    by_type: dict[str, list[int]] = {}
    for index, wanted in enumerate(chosen):
        if wanted:
            by_type.setdefault(samples[index].type, []).append(index)
    turns = [
        group[turn] for turn in range(EXAMPLES) for group in by_type.values() if turn < len(group)
    ]
    return [
        Example(
            image=_thumbnail(samples[index].picture()),
            question=samples[index].question,
            expected=samples[index].answer,
            answers={
                name: (report.predictions[index].predicted, report.predictions[index].correct)
                for name, report in answered.items()
            },
        )
        for index in turns[:EXAMPLES]
    ]


def _thumbnail(image: Image.Image | None) -> str:
    if image is None:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

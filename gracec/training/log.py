"""What a person is told of a training run, by a bar or lines, and what callbacks are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gracec.callbacks import tell
from gracec.recipe import Training
from gracec.training.progress import shown
from gracec.training.setup import steps_of

SCORES = {
    "held_out_loss": ("loss", ".4f"),
    "held_out_exact": ("exact", ".1%"),
    "held_out_kl": ("KL to the teacher", ".4f"),
    "held_out_top1": ("same top token", ".1%"),
}
"""Name -> how a person reads it."""


@contextmanager
def training_log(
    rule: Training, samples: int, progress: bool, callbacks: Sequence[Any] = ()
) -> Iterator[Callable[[dict[str, Any]], bool]]:
    """A function that takes every row of figures of a run, and says whether to stop after it."""
    steps = steps_of(rule, samples)
    with shown(progress, "training", steps) as show:

        def log(row: dict[str, Any]) -> bool:
            scored = bool({"held_out_loss", "candidate"} & row.keys())
            show(line(row, steps), row["step"], steps, due=scored)
            return tell(callbacks, *_event(row))

        try:
            tell(callbacks, "on_train_begin", rule.model_dump(mode="json"))
            yield log
        finally:
            tell(callbacks, "on_train_end")


def line(row: dict[str, Any], steps: int) -> str:
    """A row in words."""
    head = f"step {row['step']}/{steps}"
    if "candidate" in row:
        return f"{head} calibrated, {_scores(row['candidate'])}"
    if "held_out_loss" in row:
        return f"{head} {_scores(row)}"
    names = ("ce", "distillation", "rcka", "beta", "ema")
    figures = (f"{name} {row[name]:.4g}" for name in names if row.get(name) is not None)
    text = f"{head} {' '.join(figures)}"
    whole = row.get("seconds")
    return f"{text} {whole:.3g} s, {row['data_seconds'] / whole:.0%} for data" if whole else text


def _scores(row: Mapping[str, Any]) -> str:
    """Those of the held-out part."""
    figures = (
        f"{words} " + ("not finite" if row[name] is None else format(row[name], form))
        for name, (words, form) in SCORES.items()
        if name in row
    )
    return f"held out: {', '.join(figures)}"


def _event(row: Mapping[str, Any]) -> tuple[str, int, dict[str, Any]]:
    """The method of a callback for a row, with its step and figures."""
    figures = {name: value for name, value in row.items() if name != "step"}
    if "candidate" in row:  # the untrained one, whose scores are not those of the run
        figures = {f"candidate_{name}": value for name, value in row["candidate"].items()}
        return "on_evaluation", row["step"], figures
    method = "on_evaluation" if "held_out_loss" in row else "on_step"
    return method, row["step"], figures

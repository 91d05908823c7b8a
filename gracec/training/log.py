"""What a person sees of a training run: a bar on a terminal, lines elsewhere, TensorBoard."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from gracec.recipe import Training
from gracec.training.setup import steps_of

LINE_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""
SCORES = {
    "held_out_loss": ("loss", ".4f"),
    "held_out_exact": ("exact", ".1%"),
    "held_out_kl": ("KL to the teacher", ".4f"),
    "held_out_top1": ("same top token", ".1%"),
}
"""Name -> how a person reads it."""


@contextmanager
def training_log(
    directory: Path | None, rule: Training, samples: int, progress: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes every row of figures of a run.

    TensorBoard events go to `directory` if the package is installed.
    """
    steps = steps_of(rule, samples)
    console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
    writer = _tensorboard(directory) if progress else None
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    last = 0.0
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("training", total=steps)

        def log(row: dict[str, Any]) -> None:
            nonlocal last
            text = line(row, steps)
            bar.update(task, completed=row["step"], description=text)
            scored = bool({"held_out_loss", "candidate"} & row.keys())
            due = scored or time.monotonic() - last > LINE_EVERY
            if progress and not console.is_terminal and due:
                last = time.monotonic()
                console.print(text, markup=False)
            if writer is not None:
                for name, value in row.items():
                    if isinstance(value, (int, float)) and name != "step":
                        writer.add_scalar(name, value, row["step"])

        try:
            yield log
        finally:
            if writer is not None:
                writer.close()


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


def _tensorboard(directory: Path | None) -> Any:
    if directory is None or find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(directory))

"""Trackers of experiments (TensorBoard, wandb, ...), as accelerate has them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from gracec.callbacks import Callback, Figures
from gracec.errors import GracecError, first_line
from gracec.registry import nearest

PROJECT = "gracec"
"""What a tracker calls the run."""
PACKAGES: Mapping[str, tuple[str, ...]] = {"tensorboard": ("tensorboard", "tensorboardX")}
"""Tracker -> packages any of which it needs, where they are not called like it."""


def check_trackers(report_to: Any) -> tuple[str | GeneralTracker, ...]:
    """Trackers by name or as they are.

    Raises:
        GracecError: for a name that is unknown, or whose package is not installed.
    """
    given = [report_to] if isinstance(report_to, (str, GeneralTracker)) else list(report_to or ())
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    found: list[str | GeneralTracker] = []
    for one in given:
        if isinstance(one, GeneralTracker):
            found.append(one)
            continue
        if one == "none":
            continue
        if one not in known:
            raise GracecError(
                f"unknown tracker {one!r}",
                where="report_to",
                fix=nearest(str(one), known) if isinstance(one, str) else f"use {known}",
            )
        packages = PACKAGES.get(one, (one,))
        if not any(find_spec(package) for package in packages):
            raise GracecError(
                f"{one} needs the package {packages[0]}, which is not installed",
                where="report_to",
                fix=f"pip install {packages[0]}",
            )
        found.append(one)
    return tuple(found)


class TrackerCallback(Callback):
    """Hands figures of a training on to trackers.

    Args:
        directory: where those that write files have them.
    """

    def __init__(self, trackers: Sequence[str | GeneralTracker], directory: Path) -> None:
        self.trackers, self.directory = trackers, directory
        self.open: list[GeneralTracker] = []

    def on_train_begin(self, settings: Figures) -> None:
        flat = dict(_flat(settings))
        for one in self.trackers:
            tracker = self._made(one) if isinstance(one, str) else one
            self._calling(tracker, "start")
            self.open.append(tracker)
            self._calling(tracker, "store_init_configuration", flat)

    def on_step(self, step: int, figures: Figures) -> None:
        self._log(step, figures)

    def on_evaluation(self, step: int, figures: Figures) -> None:
        self._log(step, figures)

    def on_train_end(self) -> None:
        for tracker in self.open:
            self._calling(tracker, "finish")
        self.open = []

    def _made(self, name: str) -> GeneralTracker:
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        if not kind.requires_logging_directory:
            return self._calling(kind, "__call__", PROJECT)
        self.directory.mkdir(parents=True, exist_ok=True)
        return self._calling(kind, "__call__", PROJECT, logging_dir=str(self.directory))

    def _log(self, step: int, figures: Figures) -> None:
        finite = {
            name: value
            for name, value in figures.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for tracker in self.open:
            self._calling(tracker, "log", finite, step=step)

    def _calling(self, tracker: Any, method: str, *arguments: Any, **options: Any) -> Any:
        """A method of a tracker, whose error names it: it may be one of a server far away."""
        made = isinstance(tracker, type)
        try:
            call = tracker if made else getattr(tracker, method)
            return call(*arguments, **options)
        except Exception as error:
            raise GracecError(
                f"tracker {getattr(tracker, 'name', tracker)}: {first_line(error)}",
                where="report_to",
                fix="leave it out, and go on with resume",
            ) from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings within settings as `outer.inner`, in kinds that every tracker takes."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (bool, int, float, str)):
            yield f"{prefix}{name}", value
        elif value is not None:
            yield f"{prefix}{name}", str(value)

"""What `compile` tells of its progress: to objects with methods of these names, and to a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from gracec.errors import GracecError

LOGGER = logging.getLogger(__name__)
Figures = Mapping[str, Any]
P = ParamSpec("P")
T = TypeVar("T")

METHODS = ("on_stage", "on_train_begin", "on_step", "on_evaluation", "on_train_end")


class Callback:
    """Methods to override; none does anything by itself, and an object need not have all of them.

    They are called in the first process of a run. What one raises ends the run as it is: what has
    been kept for `resume` stays.
    """

    def on_stage(self, name: str) -> None:
        """A stage begins: load, examine, answer, prepare, train, freeze, lower, evaluate or
        publish."""

    def on_train_begin(self, settings: Figures) -> None:
        """Training begins, by a recipe with these settings."""

    def on_step(self, step: int, figures: Figures) -> bool | None:
        """An optimizer step was taken, the first is 1. True ends the training after it, as if it
        were the last: it is evaluated, and the best state is kept."""

    def on_evaluation(self, step: int, figures: Figures) -> bool | None:
        """The held-out part was scored after a step; before the first it is 0. True ends the
        training, but before the first step."""

    def on_train_end(self) -> None:
        """Training has ended, by an error too."""


def check_callbacks(callbacks: Sequence[Any]) -> tuple[Any, ...]:
    """Callbacks that have a method to call.

    Raises:
        GracecError: if one has none, so that it would be ignored.
    """
    for one in callbacks:
        if isinstance(one, type) or not any(hasattr(one, method) for method in METHODS):
            what = f"the class {one.__name__}" if isinstance(one, type) else type(one).__name__
            raise GracecError(
                f"{what} is no callback: an object with one of {', '.join(METHODS)}",
                where="callbacks",
                fix="derive it from gracec.callbacks.Callback, and give an instance",
            )
    return tuple(callbacks)


def tell(callbacks: Sequence[Any], method: str, *arguments: Any) -> bool:
    """Call a method of all that have it; whether any of them says to stop."""
    said = [getattr(one, method)(*arguments) is True for one in callbacks if hasattr(one, method)]
    return any(said)


def stage(
    callbacks: Sequence[Any],
    name: str,
    work: Callable[P, T],
    *arguments: P.args,
    **options: P.kwargs,
) -> T:
    """Do the work of a stage, which is told when it begins, and logged with its seconds."""
    tell(callbacks, "on_stage", name)
    LOGGER.info("stage %s ...", name)
    start = time.perf_counter()
    try:
        return work(*arguments, **options)
    finally:
        LOGGER.info("stage %s %.2f s", name, time.perf_counter() - start)

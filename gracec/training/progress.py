"""How far long work is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY = 10.0
"""Seconds between two lines where there is no terminal."""


@contextmanager
def bar(console: Console, visible: bool, *columns: ProgressColumn) -> Iterator[Progress]:
    """A bar, with the columns of rich if none are named.

    One that is not visible is not begun either: older versions of rich end it with an empty line.
    """
    progress = Progress(*columns, console=console, disable=not visible)
    with progress if visible else nullcontext():
        yield progress


class Shown:
    """Shows how far something is.

    Args:
        lines: where lines go, if not to a terminal; nowhere without one.
    """

    def __init__(self, bar: Progress, lines: Console | None = None) -> None:
        self._bar, self._lines = bar, lines
        self._last = 0.0

    def __call__(self, text: str, done: int, total: int, *, due: bool = False) -> None:
        """Say it in words and numbers.

        Args:
            due: print a line in any case, and not only if the last one was some time ago.
        """
        task = self._bar.tasks[0].id if self._bar.tasks else self._bar.add_task(text)
        self._bar.update(task, completed=done, total=total, description=text)
        due = due or time.monotonic() - self._last > LINE_EVERY
        if self._lines is not None and due:
            self._last = time.monotonic()
            self._lines.print(text, markup=False)


@contextmanager
def shown(progress: bool, text: str = "", total: int | None = None) -> Iterator[Shown]:
    """Shows on standard error how far something is, if anybody is to see it.

    Args:
        text, total: of a bar that is there from the beginning.
    """
    console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with bar(console, progress and console.is_terminal, *columns) as inside:
        if text:
            inside.add_task(text, total=total)
        yield Shown(inside, console if progress and not console.is_terminal else None)

"""What the command line says beside its results: log lines and warnings, on standard error."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

from rich.logging import RichHandler

from gracec.cli.app import err

LOGGER = logging.getLogger("gracec")


def say(level: int) -> None:
    """From which level on log lines of gracec are shown: quiet ERROR, verbose INFO.

    Warnings of gracec are shown from WARNING on. The library itself sets no level.
    """
    if not any(isinstance(handler, RichHandler) for handler in LOGGER.handlers):
        handler = RichHandler(console=err, show_time=False, show_level=False, show_path=False)
        handler.setFormatter(logging.Formatter("gracec: %(message)s"))
        LOGGER.addHandler(handler)
        LOGGER.propagate = False
    LOGGER.setLevel(level)


def is_quiet() -> bool:
    """Whether only errors and the result are printed."""
    return LOGGER.getEffectiveLevel() >= logging.ERROR


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of gracec is one line, or none if it is to be quiet; others are as Python's."""
    from gracec.errors import GracecWarning, printable

    if not issubclass(category, GracecWarning):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
    elif not is_quiet():
        err.print(f"gracec: warning: {printable(str(message))}", markup=False)

"""What the command line says beside its results: log lines and warnings, on standard error."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

from gracec.cli.app import err

LOGGER = logging.getLogger("gracec")


class Lines(logging.Handler):
    """Prints a record as a line, as errors and warnings are."""

    def emit(self, record: logging.LogRecord) -> None:
        from gracec.errors import printable

        err.print(f"gracec: {printable(record.getMessage())}", markup=False)


def say(level: int) -> None:
    """From which level on log lines of gracec are shown: quiet ERROR, verbose INFO.

    Warnings of gracec are shown from WARNING on. The library itself sets no level.
    """
    if not any(isinstance(handler, Lines) for handler in LOGGER.handlers):
        LOGGER.addHandler(Lines())
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

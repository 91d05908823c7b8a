"""The `gracec` command. Exit codes: 0 done, 1 a gate failed, 2 bad input."""

from __future__ import annotations

import sys
import warnings
from typing import TextIO

from gracec.cli import compiling, graphs, running
from gracec.cli.app import app, err

__all__ = ["app", "compiling", "graphs", "main", "running"]


def main() -> None:
    """Entry point: bad input is one line on standard error, never a traceback."""
    from gracec.errors import GateError, GracecError

    warnings.showwarning = _show_warning
    try:
        app()
    except GateError as error:
        err.print(f"gracec: gate failed: {error}", markup=False)
        sys.exit(1)
    except GracecError as error:
        err.print(f"gracec: {error}", markup=False)
        sys.exit(2)


@app.callback()
def _before_any_command() -> None:
    _quiet_libraries()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of gracec is one line; others are shown as Python does."""
    from gracec.errors import GracecWarning

    if issubclass(category, GracecWarning):
        err.print(f"gracec: warning: {message}", markup=False)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _quiet_libraries() -> None:
    """Progress bars and log lines of transformers tell a user of gracec nothing to act on."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

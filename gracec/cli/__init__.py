"""The `gracec` command. Exit codes: 0 done, 1 a gate failed, 2 bad input."""

from __future__ import annotations

import os
import sys
import warnings
from io import TextIOWrapper
from typing import TextIO

from gracec.cli import compiling, graphs, running
from gracec.cli.app import app, err

__all__ = ["app", "compiling", "graphs", "main", "running"]


def main() -> None:
    """Entry point: bad input is one line on standard error, never a traceback."""
    from gracec.errors import GateError, GracecError, first_line, printable

    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a path may hold what no encoding does
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except GateError as error:
        err.print(f"gracec: gate failed: {error}", markup=False)
        sys.exit(1)
    except GracecError as error:
        err.print(f"gracec: {error}", markup=False)
        sys.exit(2)
    except (OSError, RecursionError, UnicodeError, MemoryError) as error:
        # Of the machine or of what was given, and met where nobody looked for it.
        what = f"{type(error).__name__}: {first_line(error)}"
        err.print(f"gracec: {printable(what)}", markup=False)
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
    from gracec.errors import GracecWarning, printable

    if issubclass(category, GracecWarning):
        err.print(f"gracec: warning: {printable(str(message))}", markup=False)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _quiet_libraries() -> None:
    """Progress bars and log lines of transformers tell a user of gracec nothing to act on; and
    kernels are not fetched from the Hub, whatever a model is made of."""
    os.environ.setdefault("USE_HUB_KERNELS", "0")  # read when transformers is imported
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

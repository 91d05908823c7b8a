"""The `gracec` command. Exit codes: 0 done, 1 a gate failed, 2 bad input."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from io import TextIOWrapper
from typing import Annotated

import typer

from gracec.cli import compiling, graphs, running
from gracec.cli.app import app, err
from gracec.cli.logs import say, show_warning

__all__ = ["app", "compiling", "graphs", "main", "running"]


def main() -> None:
    """Entry point: bad input is one line on standard error, never a traceback."""
    from gracec.errors import GateError, GracecError, first_line, printable

    warnings.showwarning = show_warning
    say(logging.WARNING)
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


def _print_version(asked: bool) -> None:
    if asked:
        from gracec import __version__

        typer.echo(f"gracec {__version__}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say which it is."),
    ] = False,
) -> None:
    _quiet_libraries()


def _quiet_libraries() -> None:
    """Progress bars and log lines of transformers tell a user of gracec nothing to act on; and
    kernels are not fetched from the Hub, whatever a model is made of."""
    os.environ.setdefault("USE_HUB_KERNELS", "0")  # read when transformers is imported
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()

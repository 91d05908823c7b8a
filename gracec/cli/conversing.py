"""The conversation of `gracec run`: with a person at a terminal, or with lines from a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from gracec.cli.app import err
from gracec.cli.logs import is_quiet

HELP = "/image PATH adds a picture to the next question, /reset forgets, /quit or Ctrl-D ends"


def converse(chat: Any, images: list[Path], streamer: Any, as_json: bool) -> None:
    """Answer one line after the other until there are no more.

    At a terminal what goes wrong is told, and the next line may do better; from a pipe it ends.

    Args:
        chat: a `gracec.evaluate.Chat`.
        images: that the first question is about.
        as_json: an object a line for each answer.

    Raises:
        GracecError: from a pipe, for a picture or a question that cannot be used.
    """
    from gracec.errors import GracecError

    person = sys.stdin.isatty()
    if person and not is_quiet():
        err.print(HELP, markup=False)
    waiting = list(images)
    for line in _lines(person):
        word, _, rest = line.partition(" ")
        try:
            if word == "/quit":
                return
            if word == "/reset":
                chat.reset()
                waiting = []
            elif word == "/image":
                waiting.append(_picture(rest.strip()))
            elif word.startswith("/"):
                raise GracecError(f"unknown command {word!r}", fix=HELP)
            else:
                answer_one(chat, line, waiting, streamer, as_json)
                waiting = []
        except GracecError as error:
            if not person:
                raise
            err.print(f"gracec: {error}", markup=False)


def answer_one(
    chat: Any, text: str, images: list[Path], streamer: Any, as_json: bool, **more: str
) -> None:
    """Ask one question and print the answer, unless a streamer has done so."""
    from gracec.evaluate import load_image

    said = chat.ask(text, [load_image(path) for path in images], streamer)
    if as_json:
        row = {**more, "images": list(map(str, images)), "prompt": text, "answer": said}
        typer.echo(json.dumps(row, indent=1 if more else None))
    elif streamer is None:
        typer.echo(said)


def _picture(name: str) -> Path:
    from gracec.errors import GracecError
    from gracec.evaluate import load_image

    if not name:
        raise GracecError("no path", where="/image", fix="/image picture.png")
    load_image(Path(name))  # which says what is wrong with it now, and not with the question
    return Path(name)


def _lines(person: bool) -> Iterator[str]:
    """Lines that are not blank, until the end of input or Ctrl-C."""
    while True:
        try:
            if person:
                typer.echo("> ", nl=False, err=True)
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            return
        if not line:
            return
        if line.strip():
            yield line.strip()

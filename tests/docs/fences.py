"""The fenced blocks of a page, and running its Python."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import PreTrainedModel

from gracec.ir.program import Program
from tests.goldens import same_graphs

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Fence:
    """One fenced block: its language, the rest of its first line, what it holds, and its line."""

    language: str
    info: str
    text: str
    line: int


def fences(page: str) -> list[Fence]:
    """All blocks of a page, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        Fence(m[1], m[2].strip(), m[3], text.count("\n", 0, m.start()) + 1)
        for m in _FENCE.finditer(text)
    ]


def run_page(page: str, captured: Program | None = None) -> dict[str, Any]:
    """Run the Python blocks of a page in one namespace, in order.

    A `text` block right after a Python block is what that one prints.

    Args:
        captured: a program of the model that the page captures, with any weights; saves the time.

    Returns:
        The namespace.
    """
    same_graphs()
    if captured is not None:
        with mock.patch("gracec.capture.capture", capture_again(captured)):
            return run_page(page)
    names: dict[str, Any] = {"__name__": "page"}
    blocks = fences(page)
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.language != "python":
            continue
        printed = io.StringIO()
        source = "\n" * block.line + block.text
        code = compile(source, str(DOCS / page), "exec", dont_inherit=True)
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if following is not None and following.language == "text":
            assert plain(printed.getvalue()) == plain(following.text), f"{page}:{following.line}"
    return names


def plain(text: str) -> list[str]:
    """Lines without empty ones around them and blanks at their ends, which editors remove."""
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n").splitlines()


def capture_again(captured: Program) -> Callable[[PreTrainedModel], Program]:
    """A `capture` for models like the one captured: the same graph with the model's tensors."""

    def capture(model: PreTrainedModel) -> Program:
        program = captured.copy()
        for target, names in program.fqns.items():
            program.set_tensor(target, attrgetter(names[0])(model))
        program.recompile()
        return program

    return capture

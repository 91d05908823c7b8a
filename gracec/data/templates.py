"""Chat templates, which are programs of whoever made the model: rendered within bounds.

The sandbox of transformers keeps a template from files and other programs. It does not keep it from
taking all the memory or time there is, which one line can do.
"""

from __future__ import annotations

import ctypes
import resource
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import processing_utils
from transformers.utils import chat_template_utils

from gracec.errors import first_line

SECONDS = 10.0
"""For the conversations of one batch; it takes milliseconds."""
BYTES = 512 << 20
"""Memory beyond what the process has."""
MOST_TEXT = 16 << 20
"""Characters of the template, and of what it writes for a batch."""

_RENDER = "render_jinja_template"
_originals: list[Callable[..., Any]] = []
_bounded: ContextVar[bool] = ContextVar("bounded", default=False)
_one_at_a_time = threading.RLock()  # the limit of memory is one of the process


class _Overdue(BaseException):
    """Raised inside a template; no `except Exception` of a library takes it."""


def apply_chat_template(processor: Any, conversations: Any, **options: Any) -> Any:
    """`processor.apply_chat_template`, whose template is rendered within bounds.

    Raises:
        TemplateError: of jinja2, if the template fails in any way, or needs more time or memory.
    """
    if getattr(processing_utils, _RENDER) is not _render:
        _originals.append(getattr(processing_utils, _RENDER))
        setattr(processing_utils, _RENDER, _render)
    found = getattr(processor, "chat_template", None)
    for template in found.values() if isinstance(found, Mapping) else [found]:
        with _explained(), _limited():
            _admit(str(template))
    token = _bounded.set(True)
    try:
        return processor.apply_chat_template(conversations, **options)
    finally:
        _bounded.reset(token)


def _render(*arguments: Any, **options: Any) -> Any:
    """In the place of the function of transformers; for calls that are not ours it is that one."""
    original = _originals[-1]
    if not _bounded.get():
        return original(*arguments, **options)
    with _explained(), _limited():
        texts, indices = original(*arguments, **options)
    if sum(map(len, texts)) > MOST_TEXT:
        raise _failed(f"it writes more than {MOST_TEXT} characters")
    return texts, indices


@contextmanager
def _explained() -> Iterator[None]:
    """Whatever is raised inside becomes an error of jinja2 that says what failed."""
    try:
        yield
    except MemoryError as error:
        raise _failed("it needs more memory than a chat template may") from error
    except RecursionError as error:
        raise _failed("it is nested too deeply") from error
    except _Overdue as error:
        raise _failed(f"it takes longer than {SECONDS:g} seconds") from error
    except Exception as error:
        raise _failed(first_line(error)) from error


def _failed(reason: str) -> jinja2.TemplateRuntimeError:
    return jinja2.TemplateRuntimeError(f"the chat template fails: {reason}")


class _Generation(Extension):
    """The tag of transformers around answers."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def _admit(template: str) -> None:
    """Refuse what computes powers, which can take hours inside one operation that nothing ends.

    Compiling evaluates what is constant, so that this looks at the syntax first; transformers keeps
    what it compiled.
    """
    if len(template) > MOST_TEXT:
        raise ValueError(f"it has more than {MOST_TEXT} characters")
    parts = [_Generation, "jinja2.ext.loopcontrols"]
    tree = ImmutableSandboxedEnvironment(extensions=parts).parse(template)
    if next(tree.find_all(nodes.Pow), None) is not None:
        raise ValueError("it computes a power")
    for node in tree.find_all(nodes.Filter):
        named = [argument for argument in node.args if isinstance(argument, nodes.Const)]
        by_name = node.name == "map" and not any(one.value != "round" for one in named[:1])
        if (node.name == "round" or (by_name and node.args)) and (node.args or node.kwargs):
            raise ValueError("it rounds to a number of digits")
    chat_template_utils._get_template_variables(template)


@contextmanager
def _limited() -> Iterator[None]:
    """Raise `_Overdue` or MemoryError inside, in time."""
    thread = threading.get_ident()
    gate = threading.Lock()
    inside = True

    def end() -> None:
        with gate:
            if inside:
                _raise_in(thread, ctypes.py_object(_Overdue))

    watch = threading.Timer(SECONDS, end)
    watch.daemon = True
    with _one_at_a_time:
        watch.start()
        before = _limit_memory()
        try:
            yield
        finally:
            if before is not None:
                resource.setrlimit(resource.RLIMIT_AS, before)
            watch.cancel()
            with gate:
                inside = False
                _raise_in(thread, None)  # what was raised and has not arrived


def _raise_in(thread: int, kind: Any) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), kind)


def _limit_memory() -> tuple[int, int] | None:
    """The limit before; None where the system has none that can be set."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + BYTES
        if before[0] == resource.RLIM_INFINITY or limit < before[0]:
            resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    except (OSError, ValueError, IndexError):
        return None
    return before

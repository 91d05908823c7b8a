"""Work in processes of its own, which tests may kill."""

from __future__ import annotations

import os
from collections.abc import Callable


def start(work: Callable[[], None]) -> int:
    """Begin some work in a forked process; its number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def wait(child: int) -> int:
    """The end of a process: 0, 1 (an exception) or the signal that ended it."""
    status = os.waitpid(child, 0)[1]
    return status if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def in_a_child(work: Callable[[], None]) -> int:
    """Both."""
    return wait(start(work))

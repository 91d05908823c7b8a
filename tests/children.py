"""Work in processes of its own, which tests may kill.

They are forked from a server that has imported what they need and computed nothing: a fork of the
test's own process holds the locks of threads that it does not have, and may wait for them forever.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

SECONDS = 240
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "gracec.compiler", "tests.tiny"])
Child = multiprocessing.process.BaseProcess


def start(work: Callable[..., object], *arguments: Any) -> Child:
    """Begin some work, a function of a module and what it takes."""
    child = _SERVER.Process(target=_run, args=(work, *arguments))
    child.start()
    return child


def _run(work: Callable[..., object], *arguments: Any) -> None:
    torch.set_num_threads(1)  # as in the tests, so that sums come out the same
    work(*arguments)


def wait(child: Child) -> int:
    """The end of a process: 0, 1 (an exception) or the signal that ended it."""
    child.join(SECONDS)
    if child.exitcode is None:
        child.kill()
        raise TimeoutError(f"the process did not end in {SECONDS} s")
    return abs(child.exitcode)


def in_a_child(work: Callable[..., object], *arguments: Any) -> int:
    """Both."""
    return wait(start(work, *arguments))

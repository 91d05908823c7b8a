"""Batches in the order that is asked for, made ahead by worker processes where there are any.

    batches = Loader(samples, workers=2)([[3, 1], [2, 0]])      # or one_by_one(samples.batch)

Workers only make what is asked for: order, resuming and every bit of a batch are as without them.
What a worker finds broken is told to the data of this process before its batch is handed over, so
that reports, strict mode and the limit of broken samples are as without them too.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from gracec.data.collate import Batch, EmptyBatch
from gracec.data.conversations import BrokenSample, TrainData
from gracec.errors import GracecError, GracecWarning, first_line
from gracec.recipe import Training
from gracec.training.samples import Samples

Groups = Iterable[Sequence[int]]
Batches = Callable[[Groups], Iterator[Batch | EmptyBatch]]
"""From the numbers of the samples of each batch, the batches; an `EmptyBatch` if all are broken."""

MOST_WORKERS = 4
"""Of a process, where the recipe leaves it open."""
AHEAD = 2
"""Batches that each worker makes ahead."""
_PR_SET_PDEATHSIG = 1


def one_by_one(collate: Callable[[Sequence[int]], Batch]) -> Batches:
    """Batches that are made when they are asked for, in this process."""

    def batches(groups: Groups) -> Iterator[Batch | EmptyBatch]:
        for numbers in groups:
            try:
                made: Batch | EmptyBatch = collate(numbers)
            except EmptyBatch as empty:  # its samples are broken, which the data has reported
                made = empty
            yield made

    return batches


def workers_of(rule: Training, device: torch.device, ranks: int = 1) -> int:
    """How many worker processes a training has; "auto" are none where the CPU does the training.

    Workers share the memory of this process, which takes a system that can fork.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return 0
    if rule.workers != "auto":
        return rule.workers
    if device.type == "cpu":
        return 0
    return min(MOST_WORKERS, (os.cpu_count() or 1) // (2 * ranks))


class _Made(NamedTuple):
    """What a worker says of a batch."""

    result: Batch | GracecError
    broken: tuple[tuple[int, BrokenSample], ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Loader:
    """`Batches` of some samples.

    Attributes:
        workers: processes that make batches; 0 for none but this one.
        pinned: whether batches lie in memory that a GPU copies from by itself.
    """

    samples: Samples
    workers: int = 0
    pinned: bool = False

    def __call__(self, groups: Groups) -> Iterator[Batch | EmptyBatch]:
        """The batches of groups of samples, in order.

        Raises:
            GracecError: as `Samples.batch` does, or if a worker is ended from outside.
        """
        if not self.workers:
            yield from one_by_one(self.samples.batch)(groups)
            return
        loader: Any = DataLoader(
            _Work(self.samples),
            batch_size=None,
            sampler=groups,
            num_workers=self.workers,
            prefetch_factor=AHEAD,
            collate_fn=_as_it_is,
            pin_memory=self.pinned,
            worker_init_fn=_begin,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # the global one belongs to the training
        )
        made = iter(loader)
        while (one := self._next(made)) is not None:
            self.samples.learn(one.broken, one.problems)
            if isinstance(one.result, GracecError) and not isinstance(one.result, EmptyBatch):
                raise one.result
            yield one.result

    def _next(self, made: Iterator[_Made]) -> _Made | None:
        try:
            return next(made, None)
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            raise GracecError(
                f"a worker that makes batches was ended ({first_line(error)})",
                where="training.workers",
                fix="allow more (shared) memory, or set training.workers: 0",
            ) from error


class _Work(Dataset[_Made]):
    """Makes the batch of a group of samples, in a worker."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitem__(self, numbers: Sequence[int]) -> _Made:
        seen = len(self.samples.collate.problems)
        result: Batch | GracecError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GracecWarning)  # the other process warns
            try:
                result = self.samples.batch(numbers)
            except GracecError as error:
                result = error
        data = self.samples.data
        broken = data.known_broken(numbers) if isinstance(data, TrainData) else {}
        problems = self.samples.collate.problems[seen:]
        return _Made(result, tuple(broken.items()), tuple(problems))


def _as_it_is(made: Any) -> Any:
    return made


def _begin(number: int) -> None:
    """In a worker: leave with the process that began it, and the locks that it holds, at once."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that were not forked with it
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

"""Batches that workers make ahead are those of this process, and so is what it hears of."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gracec.data.collate import EmptyBatch
from gracec.errors import GracecError, GracecWarning
from gracec.recipe import Training
from gracec.training.loader import Loader, workers_of
from gracec.training.samples import Samples, open_samples
from tests.data.collators import collator
from tests.data.conversations import png, record, write

GROUPS = [[5, 1], [3], [0, 4], [2], [6, 3], [1, 0]]


def written(folder: Path, broken: int = 1) -> Path:
    """Seven samples: from number 3 on so many pictures cannot be decoded, and the text of number 6
    has a control token."""
    png(folder, *range(7))
    records = [record(f"{number}.png", answer="red") for number in range(6)]
    file = write(folder, *records, record("6.png", "what is </s> ?"))
    for number in range(3, 3 + broken):
        (folder / f"{number}.png").write_bytes(b"no picture")
    return file


def opened(file: Path, *, strict: bool = False) -> Samples:
    rule = Training.model_validate({"held_out": 0.5})
    return open_samples(file, file, rule, replace(collator(), strict=strict))[0]


def made(samples: Samples, workers: int) -> list[Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GracecWarning)
        found = list(Loader(samples, workers)(iter(GROUPS)))
    told = (str(one.message) for one in caught if issubclass(one.category, GracecWarning))
    return [*found, sorted(told)]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_no_batch_and_nothing_that_is_reported(workers: int, tmp_path: Path) -> None:
    file = written(tmp_path)
    alone, helped = opened(file), opened(file)
    state = torch.get_rng_state()
    *expected, said = made(alone, 0)
    *found, warned = made(helped, workers)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found) == len(expected) == len(GROUPS)
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, EmptyBatch):
            assert isinstance(one, EmptyBatch)
            continue
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in other)
    assert sum(isinstance(one, EmptyBatch) for one in expected) == 2
    assert helped.data.problems == alone.data.problems and len(helped.data.problems) == 1
    assert helped.collate.problems == alone.collate.problems
    assert len(helped.collate.problems) == 1 and warned == said
    assert not multiprocessing.active_children()


def test_what_a_worker_finds_may_end_a_run(tmp_path: Path) -> None:
    with pytest.raises(GracecError, match=r"train.jsonl:4: image 3.png cannot be decoded"):
        list(Loader(opened(written(tmp_path), strict=True), 1)([[0], [3]]))
    with pytest.raises(GracecError, match="more than half of the 7 samples are broken"):
        made(opened(written(tmp_path, broken=4)), 2)
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_is_one_line(tmp_path: Path) -> None:
    others = multiprocessing.active_children()  # of tests before
    batches = Loader(opened(written(tmp_path)), 1)([[0]] * 1000)
    next(batches)
    (worker,) = (one for one in multiprocessing.active_children() if one not in others)
    os.kill(int(worker.pid or 0), signal.SIGKILL)
    with pytest.raises(GracecError, match="a worker that makes batches was ended .*workers: 0"):
        list(batches)


def test_how_many_workers() -> None:
    rule, cuda = Training(), torch.device("cuda")
    assert workers_of(rule, torch.device("cpu")) == 0
    assert 0 <= workers_of(rule, cuda, ranks=2) <= workers_of(rule, cuda) <= 4
    assert workers_of(rule.model_copy(update={"workers": 3}), torch.device("cpu")) == 3

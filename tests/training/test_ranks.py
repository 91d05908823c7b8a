"""Several processes, each with a GPU of its own; torch is asked, and no GPU is there."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from gracec.errors import GracecError
from gracec.training.ranks import join_ranks, take_device


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch is told in the second of two processes on a machine with two GPUs."""
    found: list[Any] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", found.append)
    return found


def test_each_process_takes_a_gpu_before_it_joins(told: list[Any]) -> None:
    join_ranks(torch.device("cuda"))
    assert told == [1, "cpu:gloo,cuda:nccl"]
    join_ranks(torch.device("cuda:1"))


def test_the_processor_needs_no_gpu(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")  # more processes than GPUs
    join_ranks(torch.device("cpu"))
    assert told == ["cpu:gloo,cuda:nccl"]


def test_a_gpu_of_another_process_is_refused(told: list[Any]) -> None:
    with pytest.raises(GracecError, match="process 1 of this machine computes on cuda:0"):
        join_ranks(torch.device("cuda:0"))
    assert told == [1]


def test_a_process_alone_is_left_as_it_is(told: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    take_device()
    join_ranks(torch.device("cuda:0"))
    assert told == []

"""The processes of a training that `torchrun` started."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def join_ranks() -> None:
    """Join the other processes where `torchrun` started this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """Number of this process among those that `torchrun` started; 0 alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0

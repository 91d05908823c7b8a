"""The processes of a training that `torchrun` started."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from gracec.errors import GracecError


def take_device() -> None:
    """Let "cuda" mean the GPU of this process, where `torchrun` started one for each."""
    if _several() and _local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(_local_rank())


def join_ranks(device: torch.device) -> None:
    """Join the other processes where `torchrun` started this one.

    Args:
        device: that this one computes on.

    Raises:
        GracecError: if it is a GPU that another process has.
    """
    if not _several() or dist.is_initialized():
        return
    take_device()
    if device.type == "cuda" and device.index not in (None, _local_rank()):
        raise GracecError(
            f"process {_local_rank()} of this machine computes on {device}, which is that of "
            "another one",
            where="torchrun",
            fix="choose device cuda, without a number, and as many processes as there are GPUs",
        )
    # Sums of figures, and of gradients where the CPU trains, are not for NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def rank() -> int:
    """Number of this process among those that `torchrun` started; 0 alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0")) if _several() else 0


def _several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _local_rank() -> int:
    """Among the processes of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))

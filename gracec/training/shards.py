"""Tensors of which each rank holds some rows, and everything else as it is.

A shard is a `torch.distributed.tensor.DTensor`, as `fully_shard` makes them: the first rank has the
first ceil(N / ranks) of N rows, and so on; the last ones may have none. What has a single row for
all, as the scale of a whole weight, is on every rank. Functions here take ordinary tensors too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor as one; every rank has to ask for it."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach()


def own_rows(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """The rows of a tensor that this rank holds, a view; all of what has one row."""
    if len(tensor) == 1:
        return tensor
    each = -(-len(tensor) // mesh.size())
    first = min(len(tensor), mesh.get_local_rank() * each)
    return tensor[first : first + each]


def sharded(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """A copy of the rows of this rank, on the device of the mesh."""
    rows = own_rows(tensor.detach(), mesh).to(mesh.device_type, copy=True).contiguous()
    placement = Replicate() if len(tensor) == 1 else Shard(0)
    return DTensor.from_local(
        rows, mesh, [placement], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@torch.no_grad()
def write(into: Tensor, values: Tensor) -> None:
    """Write a whole tensor into one that may be sharded."""
    local(into).copy_(rows_of(values, into))


def of_rows(grad: Tensor, parameter: Tensor) -> Tensor:
    """The gradient of a parameter from that of the rows of this rank.

    Where the parameter is on every rank, what each has for it is added.
    """
    if not isinstance(parameter, DTensor):
        return grad
    (placement,) = parameter.placements
    found = DTensor.from_local(
        grad,
        parameter.device_mesh,
        [placement if placement.is_shard() else Partial()],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return found.redistribute(placements=[placement])


def rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The rows that this rank holds of something sharded as another tensor is, a view."""
    return own_rows(tensor, like.device_mesh) if isinstance(like, DTensor) else tensor


def whole_of(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `rows_of`; every rank has to ask for it."""
    if not isinstance(like, DTensor):
        return rows
    found = DTensor.from_local(
        rows.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return found.full_tensor()


def number(tensor: Tensor) -> float:
    """A scalar, of all ranks."""
    return whole(tensor).item()


def most(count: int, device: torch.device) -> int:
    """The largest of a count over all ranks."""
    found = torch.tensor(count, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)

"""Tensors of which each rank holds some rows, and everything else as it is.

A shard is a `torch.distributed.tensor.DTensor`, as `fully_shard` makes them: the first rank has the
first ceil(N / ranks) of N rows, and so on; the last ones may have none. The scale of a whole weight
is on every rank. Functions here take ordinary tensors too.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor as one; every rank has to ask for it."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach()


def sharded(tensor: Tensor, mesh: DeviceMesh, *, everywhere: bool = False) -> DTensor:
    """A copy of the rows of this rank, on the device of the mesh.

    Args:
        everywhere: whether every rank has all of it.
    """
    placement = Replicate() if everywhere else Shard(0)
    rows = tensor.detach() if everywhere else _own_rows(tensor.detach(), mesh)
    return _placed(rows.to(mesh.device_type, copy=True).contiguous(), tensor, mesh, placement)


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
    of_rank = placement if placement.is_shard() else Partial()
    return _placed(grad, parameter, parameter.device_mesh, of_rank).redistribute(
        placements=[placement]
    )


def rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The rows that this rank holds of something sharded as another tensor is, a view."""
    if not isinstance(like, DTensor) or like.placements[0].is_replicate():
        return tensor
    return _own_rows(tensor, like.device_mesh)


def as_shard(rows: Tensor, like: Tensor) -> Tensor:
    """What `rows_of` gave each rank, as the shard that it is a part of."""
    if not isinstance(like, DTensor):
        return rows
    return _placed(rows.to(like.device), like, like.device_mesh, like.placements[0])


def at_first_rank(tensors: Iterable[tuple[str, Tensor]], rank: int) -> dict[str, Tensor]:
    """Whole tensors in the memory of the first rank's CPU, gathered one after the other.

    Every rank has to ask, and the others get none.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        one = whole(tensor)
        if rank == 0:
            found[name] = one.cpu()
    return found


def _own_rows(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    each = -(-len(tensor) // mesh.size())
    first = min(len(tensor), mesh.get_local_rank() * each)
    return tensor[first : first + each]


def _placed(rows: Tensor, of: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """What each rank holds of a tensor of this shape, as one, without looking at other ranks."""
    return DTensor.from_local(
        rows, mesh, [placement], run_check=False, shape=of.shape, stride=of.stride()
    )


def number(tensor: Tensor) -> float:
    """A scalar, of all ranks."""
    return whole(tensor).item()


def most(count: int, device: torch.device) -> int:
    """The largest of a count over all ranks."""
    found = torch.tensor(count, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)

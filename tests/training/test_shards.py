"""Rows of each rank are those that `fully_shard` gives it, and come back as the whole."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gracec.training.shards import (
    as_shard,
    at_first_rank,
    local,
    most,
    number,
    of_rows,
    rows_of,
    sharded,
    whole,
    write,
)
from tests.children import start, wait

RANKS = 2


def numbered(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def as_rank(rank: int, out: Path) -> None:
    store = f"file://{out / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    for rows in (5, 4, 1):  # of one row the second rank has none
        tensor = numbered(rows, 3)
        shard = sharded(tensor, mesh)
        expected = distribute_tensor(tensor, mesh, [Shard(0)])
        assert torch.equal(local(shard), local(expected)) and shard.shape == tensor.shape
        assert local(shard).data_ptr() != tensor.data_ptr()
        assert torch.equal(whole(shard), tensor)
        own = rows_of(2 * tensor, shard)
        assert len(own) == len(local(shard))
        assert torch.equal(whole(as_shard(own, shard)), 2 * tensor)
        write(shard, 3 * tensor)
        assert torch.equal(whole(shard), 3 * tensor)
        assert torch.equal(whole(of_rows(own, shard)), 2 * tensor)

    scale = sharded(torch.tensor([[2.0]]), mesh, everywhere=True)
    assert local(scale).shape == (1, 1) and torch.equal(rows_of(scale, scale), scale)
    found = of_rows(torch.tensor([[rank + 1.0]]), scale)
    assert torch.equal(local(found), torch.tensor([[3.0]])), "each rank has a part of its gradient"
    write(scale, torch.tensor([[5.0]]))
    assert number(scale) == 5 and most(rank + 7, torch.device("cpu")) == 8

    tensors = {"shard": sharded(numbered(5, 3), mesh), "plain": numbered(2)}
    at_first = at_first_rank(tensors.items(), rank)
    assert at_first.keys() == (tensors.keys() if rank == 0 else set())
    if rank == 0:
        assert torch.equal(at_first["shard"], numbered(5, 3)) and type(at_first["shard"]) is Tensor
    dist.destroy_process_group()


def test_rows_of_two_ranks(tmp_path: Path) -> None:
    children = [start(as_rank, rank, tmp_path) for rank in range(RANKS)]
    assert [wait(child) for child in children] == [0] * RANKS


def test_what_is_not_sharded_stays_as_it_is() -> None:
    tensor = numbered(2, 3)
    assert local(tensor) is tensor and as_shard(tensor, tensor) is tensor
    assert rows_of(tensor, tensor) is tensor and of_rows(tensor, tensor) is tensor
    write(tensor, 2 * numbered(2, 3))
    assert torch.equal(whole(tensor), 2 * numbered(2, 3))

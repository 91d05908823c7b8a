"""Student and teacher in shards: each rank holds some rows of every parameter.

    fully_shard (FSDP2) on each decoder block and on the whole: parameters are gathered for a block
    at a time, gradients averaged and scattered, in forward and backward

Float masters and scales of quantized weights are no parameters of the graph that runs. They are
sharded by the same rows as what stands for them there: groups run along rows, so that each rank
quantizes its own part, and no float master is ever gathered in training.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from gracec.ir.program import Program
from gracec.quant.frozen import Experts
from gracec.training.blocks import blocks_of, by_path
from gracec.training.quantized_weights import QuantizedWeights
from gracec.training.shards import sharded, whole, write

FOR_PARAMETERS = 0.7
"""Share of the memory of a device; activations and what is temporary have the rest."""


def mesh_of(device: torch.device, ranks: int) -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(device.type, (ranks,))


def shard_blocks(module: fx.GraphModule, mesh: DeviceMesh) -> dict[int, nn.Parameter]:
    """Shard what `in_blocks` made, in place.

    Returns:
        id of each parameter that was there -> what took its place.
    """
    before = by_path(module)
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    # The loss reads the head after the graph has run.
    fully_shard(module, mesh=mesh, reshard_after_forward=False)
    after = by_path(module)
    return {id(parameter): after[path] for path, parameter in before.items()}


def shard_teacher(module: fx.GraphModule, mesh: DeviceMesh, *, owned: bool) -> None:
    """Shard what `in_blocks` made of a teacher, in place.

    Args:
        owned: whether nobody else needs its tensors: they let go of their memory, for good.
    """
    before = list(by_path(module).values())
    shard_blocks(module, mesh)
    if owned:
        for parameter in before:
            parameter.data = parameter.data.new_empty(0)


@dataclass(frozen=True)
class _Sharded:
    """A tensor of the student, and its shard.

    Attributes:
        experts: of routed experts, how the student holds what is a matrix in the shard.
        learns: whether it does; then the student's own is empty while it is trained.
    """

    tensor: Tensor
    shard: Tensor
    experts: Experts | None
    learns: bool


class ShardedStudent:
    """What a training in shards holds in the place of the student's tensors.

    What learns has no memory in the student meanwhile.

    Attributes:
        parameters: FQN -> what learns, in shards; a weight of routed experts as a matrix.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        quantized: QuantizedWeights,
        parameters: Mapping[str, nn.Parameter],
        mesh: DeviceMesh,
    ) -> None:
        """Args:
        module: what `in_blocks` made of the graph that runs. It is sharded, in place.
        quantized: its weights; from now on they are the rows of this rank.
        parameters: FQN -> what learns.
        """
        taken = shard_blocks(module, mesh)
        shards = dict(taken)
        experts_of: dict[int, Experts | None] = {}
        beside: list[Tensor] = []
        for target, weight in quantized.weights.items():
            tensors = [weight.weight, weight.scale_param]
            tensors += [] if weight.scale_signs is None else [weight.scale_signs]
            for tensor in tensors:
                if id(tensor) in shards:  # the graph also reads it as it is
                    continue
                experts = weight.experts if tensor is weight.weight else None
                matrix = tensor if experts is None else experts.matrix(tensor.detach())
                # The scale of a whole weight has no rows to be shared out.
                shard = sharded(matrix, mesh, everywhere=len(matrix) != len(weight.held))
                shards[id(tensor)] = nn.Parameter(shard, requires_grad=tensor.requires_grad)
                experts_of[id(tensor)] = experts
                beside.append(tensor)
            found = [shards[id(tensor)] for tensor in tensors]
            quantized.weights[target] = replace(
                weight,
                held=taken[id(weight.held)],
                weight=found[0],
                scale_param=found[1],
                scale_signs=found[2] if len(found) == 3 else None,
                experts=None,
                rows=len(weight.held),
            )
        learn = {id(parameter) for parameter in parameters.values()}
        every = [*parameters.values(), *(one for one in beside if id(one) not in learn)]
        self._sharded = [
            _Sharded(one, shards[id(one)], experts_of.get(id(one)), id(one) in learn)
            for one in every
        ]
        self.parameters = {name: shards[id(one)] for name, one in parameters.items()}
        self.release()

    def release(self) -> None:
        """Let what learns go of its memory in the student."""
        for one in self._sharded:
            if one.learns:
                one.tensor.data = one.tensor.data.new_empty(0)

    def gather(self) -> None:
        """Give the student what the shards hold; every rank has to."""
        for one in self._sharded:
            if one.learns:
                found = whole(one.shard)
                one.tensor.data = (
                    found if one.experts is None else one.experts.held(found).contiguous()
                )

    def scatter(self) -> None:
        """Give the shards what the student holds, and let go of it there."""
        for one in self._sharded:
            tensor = one.tensor.detach()
            write(one.shard, tensor if one.experts is None else one.experts.matrix(tensor))
        self.release()


class Held(Protocol):
    """A teacher, as far as it takes memory."""

    def tensors(self) -> Iterable[Tensor]:
        """What it holds."""


def bytes_of_a_rank(
    program: Program, parameters: Mapping[str, nn.Parameter], teacher: Held | None
) -> int:
    """What each rank needs where it has everything, without activations: parameters of the graph
    that runs, masters and scales, a gradient and two moments of each, and the teacher.

    All may be stand-ins."""
    running = {id(one): one.nbytes for one in program.graph_module.parameters()}
    learn = {id(one): one.nbytes for one in parameters.values()}
    taught = () if teacher is None else teacher.tensors()
    return (
        sum({**running, **learn}.values())
        + 3 * sum(learn.values())
        + sum({id(one): one.nbytes for one in taught}.values())
    )


def bytes_for_a_rank(device: torch.device, ranks: int) -> int:
    """What a rank may use for what `bytes_of_a_rank` counts: the rest is for activations."""
    if device.type == "cpu":
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // here
    else:
        _, memory = torch.accelerator.get_memory_info(device)
    return room_of(memory)


def room_of(memory: int) -> int:
    """What is for parameters and what belongs to them, of the memory of a rank. Where they need
    more, `strategy: auto` is sharded."""
    return int(FOR_PARAMETERS * memory)

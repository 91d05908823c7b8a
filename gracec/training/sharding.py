"""Student and teacher in shards: each rank holds some rows of every parameter.

    fully_shard (FSDP2) on each decoder block and on the whole: parameters are gathered for a block
    at a time, gradients averaged and scattered, in forward and backward

Float masters and scales of quantized weights are no parameters of the graph that runs. They are
sharded by the same rows as what stands for them there: groups run along rows, so that each rank
quantizes its own part, and no float master is ever gathered in training.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gracec.ir.program import Program
from gracec.quant.frozen import Experts
from gracec.training.blocks import blocks_of, by_path
from gracec.training.learner import LaterTeacher
from gracec.training.quantized_weights import QuantizedWeight, QuantizedWeights
from gracec.training.shards import sharded, whole, write

FOR_PARAMETERS = 0.7
"""Share of the memory of a device; activations and what is temporary have the rest."""


def mesh_of(device: torch.device, ranks: int) -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(device.type, (ranks,))


def shard_blocks(module: fx.GraphModule, mesh: DeviceMesh, *, owned: bool) -> None:
    """Shard what `in_blocks` made, in place. What is on the meta device stays there.

    Args:
        owned: whether nobody else needs its tensors: they let go of their memory, block by block.
    """
    for block in blocks_of(module):
        _shard(block, mesh, owned)
    # The loss reads the head after the graph has run.
    _shard(module, mesh, owned, reshard_after_forward=False)


def _shard(module: nn.Module, mesh: DeviceMesh, owned: bool, **options: Any) -> None:
    own = [one for one in module.parameters() if not isinstance(one, DTensor)]
    fully_shard(module, mesh=mesh, **options)
    for one in own:
        if owned and not one.is_meta:
            _let_go(one)


def _let_go(tensor: Tensor) -> None:
    """Of its memory; it stays the tensor that models and programs have."""
    tensor.data = tensor.data.new_empty(0)


def _materialize(module: fx.GraphModule) -> None:
    """Give the rows of this rank memory, where they have none."""
    for child in module.modules():
        for name, one in list(child.named_parameters(recurse=False)):
            if one.is_meta:
                assert isinstance(one, DTensor)
                made = torch.empty_like(one, device=one.device_mesh.device_type)
                setattr(child, name, nn.Parameter(made, requires_grad=one.requires_grad))


@dataclass(frozen=True)
class _Sharded:
    """A tensor of the student, and its shard.

    Attributes:
        experts: of routed experts, how the student holds what is a matrix in the shard.
        emptied: whether the student's own has no memory while it is trained.
    """

    tensor: Tensor
    shard: nn.Parameter
    experts: Experts | None = None
    emptied: bool = True


class ShardedStudent:
    """What a training in shards holds in the place of the student's tensors.

    These have no memory meanwhile, but for signs of scales.

    Attributes:
        parameters: FQN -> what learns, in shards; a weight of routed experts as a matrix.
        experts: FQN of each of these -> how the student holds it.
        mesh: of all ranks.
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
        quantized: its weights, without memory; from now on they are the rows of this rank.
        parameters: FQN -> what learns.
        """
        self.mesh, before = mesh, by_path(module)
        shard_blocks(module, mesh, owned=True)
        after = by_path(module)
        found = {
            id(one): _Sharded(one, after[path]) for path, one in before.items() if not one.is_meta
        }
        # One after the other, each of which lets go of its memory at once; ŵ gets its rows last.
        for weight in quantized:
            for tensor in (weight.weight, weight.scale_param, weight.scale_signs):
                if tensor is not None and id(tensor) not in found:  # the graph reads no other
                    found[id(tensor)] = _sharded_beside(tensor, weight, mesh)
        _materialize(module)
        after = by_path(module)
        held = {id(one): after[path] for path, one in before.items()}
        for target, weight in quantized.weights.items():
            signs = weight.scale_signs
            quantized.weights[target] = replace(
                weight,
                held=held[id(weight.held)],
                weight=found[id(weight.weight)].shard,
                scale_param=found[id(weight.scale_param)].shard,
                scale_signs=None if signs is None else found[id(signs)].shard,
                experts=None,
                rows=len(weight.held),
            )
        self._sharded = list(found.values())
        of = {name: found[id(one)] for name, one in parameters.items()}
        self.parameters = {name: one.shard for name, one in of.items()}
        self.experts = {name: one.experts for name, one in of.items() if one.experts is not None}

    def gather(self) -> None:
        """Give the student what the shards hold; every rank has to."""
        for one in self._sharded:
            if one.emptied:
                found = whole(one.shard)
                one.tensor.data = (
                    found if one.experts is None else one.experts.held(found).contiguous()
                )

    def scatter(self) -> None:
        """Give the shards what the student holds, and let go of it there."""
        for one in self._sharded:
            tensor = one.tensor.detach()
            write(one.shard, tensor if one.experts is None else one.experts.matrix(tensor))
            if one.emptied:
                _let_go(one.tensor)

    def as_held(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors of a checkpoint, by name, with routed experts as the student has them."""
        return {
            name: tensor if experts is None or tensor.dim() != 2 else experts.held(tensor)
            for name, tensor, experts in self._of_experts(tensors)
        }

    def as_sharded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `as_held`."""
        return {
            name: tensor if experts is None or tensor.dim() != 3 else experts.matrix(tensor)
            for name, tensor, experts in self._of_experts(tensors)
        }

    def _of_experts(
        self, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor, Experts | None]]:
        """Tensors named by an FQN, or "state/FQN/KEY" as an optimizer's are."""
        for name, tensor in tensors.items():
            fqn = name.split("/")[1] if name.startswith("state/") else name
            yield name, tensor, self.experts.get(fqn)


def _sharded_beside(tensor: Tensor, weight: QuantizedWeight, mesh: DeviceMesh) -> _Sharded:
    """What the graph does not read itself, in shards; but for signs, the whole is empty after."""
    experts = weight.experts if tensor is weight.weight else None
    matrix = tensor if experts is None else experts.matrix(tensor.detach())
    # The scale of a whole weight has no rows to be shared out.
    shard = sharded(matrix, mesh, everywhere=len(matrix) != len(weight.held))
    made = nn.Parameter(shard, requires_grad=tensor.requires_grad)
    is_sign = tensor is weight.scale_signs  # a checkpoint reads them in the student
    if not is_sign:
        _let_go(tensor)
    return _Sharded(tensor, made, experts, emptied=not is_sign)


class Held(Protocol):
    """A teacher, as far as it takes memory."""

    def tensors(self) -> Iterable[Tensor]:
        """What it holds."""


def bytes_of_a_rank(
    program: Program, parameters: Mapping[str, nn.Parameter], teacher: Held | LaterTeacher | None
) -> int:
    """What each rank needs where it has everything, without activations: parameters of the graph
    that runs, masters and scales, a gradient and two moments of each, and the teacher.

    All may be stand-ins."""
    running = {id(one): one.nbytes for one in program.graph_module.parameters()}
    learn = {id(one): one.nbytes for one in parameters.values()}
    return sum({**running, **learn}.values()) + 3 * sum(learn.values()) + _bytes_of(teacher)


def _bytes_of(teacher: Held | LaterTeacher | None) -> int:
    if teacher is None or isinstance(teacher, LaterTeacher):
        return 0 if teacher is None else teacher.nbytes
    return sum({id(one): one.nbytes for one in teacher.tensors()}.values())


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

"""rehearsal: a micro-batch of a training without weights and without computing anything.

The graphs run on fake tensors, which have a shape, a dtype and a storage of a size, and hold no
number. So what autograd keeps, what is alive at which time, and the operations of every matmul are
those of the real step, of any family, whatever its graph looks like.

    teacher   forward
    student   normalisers  ->  forward  ->  head and loss, in chunks  ->  backward

Left out is what a kernel allocates and frees inside itself; but not the copy of its operand that
logsumexp makes, which is as large as the logits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from gracec.ir.annotations import act_of
from gracec.ir.program import Program, annotation
from gracec.objective import GraceObjective, Outputs
from gracec.passes.insert_fake_quant import FAKE_QUANTIZE_ACTIVATION
from gracec.quant.ops_delta_rule import CHUNK
from gracec.training.learner import Learner
from gracec.training.micro_batch import MicroBatch
from gracec.training.teacher_cache import bytes_read

aten = torch.ops.aten

NEW_PAGES = 32 << 20
"""Bytes from which on a tensor on the CPU is in memory that the system has yet to fill with zeros,
page by page: the most that glibc's threshold for this grows to. What is smaller is mostly where
another tensor was before."""
LOOKUPS = {aten.embedding, aten.index, aten.index_select, aten.gather}
"""Operators that read of their first operand only as much as they return."""


@dataclass(frozen=True)
class Taught:
    """What a teacher says of one micro-batch.

    Attributes:
        outputs: fake ones.
        bytes: of them, which are kept until the student's turn.
        cached: of them, where the teacher is in files.
        peak: most that is alive while the teacher runs, beside its parameters.
        operations: floating-point ones.
        moved: bytes that all operators but matmuls read and write.
        new_pages: bytes of tensors of `NEW_PAGES` and more that any operator makes.
    """

    outputs: Outputs
    bytes: int
    cached: int
    peak: int
    operations: int
    moved: int
    new_pages: int

    def between(self, other: Taught, share: float) -> Taught:
        """On the line from this one to another, but for the outputs, which are this one's."""
        names = ("bytes", "cached", "peak", "operations", "moved", "new_pages")
        return Taught(self.outputs, **_between(self, other, share, names))


@dataclass(frozen=True)
class Rehearsal:
    """What one micro-batch of a student takes beside parameters and what the teacher said.

    Bytes, and floating-point operations. Where the micro-batch grows, each grows at least as fast
    as it did before: it is the largest of quantities that are linear in the number of samples.

    Attributes:
        inputs: of the graph.
        saved: what the forward pass keeps for the backward pass.
        peak: most that is alive at once, saved tensors among it, beside full gradients. The new
            gradient of one parameter, before it is added to the others, is among it.
        first: the same of a micro-batch that begins without gradients, these included.
        kept, computed_again: `saved` and `peak` where every decoder block is computed again in the
            backward pass, so that only what it begins with is kept.
        forward, backward, again: operations of both passes, and of the decoder blocks forward.
        moved, moved_again: bytes that all operators but matmuls read and write: in both passes,
            and in the decoder blocks forward.
        new_pages, new_pages_again: bytes of tensors of `NEW_PAGES` and more that any operator
            makes, likewise.
    """

    inputs: int
    saved: int
    peak: int
    first: int
    kept: int
    computed_again: int
    forward: int
    backward: int
    again: int
    moved: int
    moved_again: int
    new_pages: int
    new_pages_again: int

    @property
    def computed(self) -> int:
        """Operations of both passes."""
        return self.forward + self.backward

    def between(self, other: Rehearsal, share: float) -> Rehearsal:
        """On the line from this one to another: not less than what lies between them, but for new
        pages, which no tensor takes that is small enough."""
        return Rehearsal(**_between(self, other, share, vars(self)))


def rehearse_teacher(teacher: Learner, micro: MicroBatch, mode: FakeTensorMode) -> Taught:
    """One micro-batch of a teacher, whose parameters may be stand-ins.

    Args:
        micro: of real integers; nothing of it is computed with.
    """
    cached, micro = bytes_read(teacher, micro), _fake(micro, mode)
    parameters = _parameters(teacher.program, mode)
    alive = _Alive(_operations(micro), _given(micro, parameters))
    with mode, alive, torch.no_grad():
        inputs = teacher.inputs(micro)
        outputs = teacher.outputs(_Graph(teacher.program, parameters, alive).run(*inputs.values()))
        del inputs
    return Taught(
        outputs, alive.now, cached, alive.peak, alive.operations, alive.moved, alive.new_pages
    )


def rehearse(
    student: Learner,
    taught: Taught | None,
    micro: MicroBatch,
    objective: GraceObjective,
    learns: Collection[str],
    mode: FakeTensorMode,
    *,
    narrow: bool = False,
) -> Rehearsal:
    """One micro-batch of a student, whose parameters may be stand-ins.

    Args:
        taught: of the same micro-batch and the same mode.
        micro: of real integers; nothing of it is computed with.
        learns: FQNs of the parameters that get gradients.
        narrow: whether matmuls are in bfloat16.
    """
    micro = _fake(micro, mode)
    parameters = _parameters(student.program, mode)
    said = None if taught is None else taught.outputs
    alive = _Alive(_operations(micro), [*_given(micro, parameters), *_tensors(said)])
    with mode, alive:
        for name in learns:
            parameters[name].requires_grad_()
            parameters[name].register_post_accumulate_grad_hook(alive.accumulated)
        graph = _Graph(student.program, parameters, alive)
        with torch.no_grad():  # of all micro-batches of a step, before the first one
            normalisers = objective.normalisers(said, micro.targets)
        with saved_tensors_hooks(alive.pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, narrow):
                outputs = student.outputs(graph.run(*student.inputs(micro).values()))
            terms = objective.terms(outputs, said, micro.targets)
            loss = objective.loss(terms, normalisers, 1.0, objective.omega_warmup)
        del outputs, terms
        forward, saved, kept = alive.operations, alive.saved, alive.saved - alive.inside
        alive.phase, alive.block = "loss", None
        loss.backward()
        del loss
    excess = alive.excess
    return Rehearsal(
        inputs=sum(map(_size, micro.inputs.values())),
        saved=saved,
        peak=alive.beside,
        first=alive.peak,
        kept=kept,
        computed_again=max(
            excess["before"],
            kept + max(excess["loss"], excess["blocks"] + alive.largest_block),
        ),
        forward=forward,
        backward=alive.operations - forward,
        again=graph.operations_of_blocks,
        moved=alive.moved,
        moved_again=graph.moved_in_blocks,
        new_pages=alive.new_pages,
        new_pages_again=graph.new_pages_in_blocks,
    )


class _Alive(TorchDispatchMode):
    """Counts the bytes of every storage that is made, until it is gone.

    Attributes:
        now, peak: bytes alive.
        gradients, beside: those of parameters, and the peak of what is alive beside them.
        saved, inside: bytes that autograd keeps, and those of them made inside a decoder block.
        block: the number of the decoder block that is run, or None.
        phase: "before" the first block, "forward", "loss" or "blocks" in the backward pass.
        excess: phase -> most that was alive beside what autograd keeps and gradients.
        operations: floating-point ones of what is counted, matmuls and attention.
        moved: bytes read and written by everything else.
        new_pages: bytes of storages of `NEW_PAGES` and more.
    """

    def __init__(
        self, counted: Mapping[Any, Callable[..., int]], outside: Iterable[Tensor]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted, self.operations = counted, 0
        self.now = self.peak = self.gradients = self.beside = self.saved = self.moved = 0
        self.new_pages = 0
        self.by_block: dict[int, int] = {}
        self.largest_block = 0
        self.block: int | None = None
        self.phase = "before"
        self.excess = dict.fromkeys(("before", "forward", "loss", "blocks"), 0)
        self._made_in = WeakIdKeyDictionary()
        self._kept = WeakIdKeyDictionary()
        self._outside = WeakIdKeyDictionary()
        for tensor in outside:
            self._outside[tensor.untyped_storage()] = True

    @property
    def inside(self) -> int:
        return sum(self.by_block.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is aten.logsumexp.default:
            with self:
                return _logsumexp(*args, **(kwargs or {}))
        returned = func(*args, **(kwargs or {}))
        made = [self._note(one) for one in tree_leaves(returned) if isinstance(one, Tensor)]
        count = self.counted.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=returned)
        elif any(made) or func._schema.is_mutable:
            looked_up = func._overloadpacket in LOOKUPS
            operands = (returned if looked_up else args[:1], args[1:], kwargs, returned)
            self.moved += sum(
                _size(one) for one in tree_leaves(operands) if isinstance(one, Tensor)
            )
        return returned

    def pack(self, tensor: Tensor) -> Tensor:
        """Called with what autograd keeps."""
        storage = tensor.untyped_storage()
        if storage in self._made_in and storage not in self._kept:
            block, size = self._made_in[storage], storage.nbytes()
            self._kept[storage] = block
            self.saved += size
            if block is not None:
                self.by_block[block] = self.by_block.get(block, 0) + size
                self.largest_block = max(self.largest_block, self.by_block[block])
            weakref.finalize(storage, self._no_longer_kept, size)
        return tensor

    def leave_block(self, result: Any) -> None:
        """What a decoder block returns is kept for the next one."""
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            block = self._made_in.get(storage)
            self._made_in[storage] = None
            if self._kept.get(storage) is not None:
                self.by_block[block] -= storage.nbytes()
                self._kept[storage] = None

    def accumulated(self, parameter: Tensor) -> None:
        """Called when a parameter has its gradient."""
        assert parameter.grad is not None
        self.gradients += _size(parameter.grad)

    def _note(self, tensor: Tensor) -> bool:
        """Whether a tensor has a new storage."""
        storage = tensor.untyped_storage()
        if storage in self._made_in or storage in self._outside:
            return False
        self._made_in[storage] = self.block
        size = storage.nbytes()
        weakref.finalize(storage, self._gone, size)
        self.now += size
        self.new_pages += size * (size >= NEW_PAGES)
        self.peak = max(self.peak, self.now)
        self.beside = max(self.beside, self.now - self.gradients)
        excess = self.now - self.gradients - self.saved
        self.excess[self.phase] = max(self.excess[self.phase], excess)
        return True

    def _gone(self, size: int) -> None:
        self.now -= size

    def _no_longer_kept(self, size: int) -> None:
        self.saved -= size


class _Graph(fx.Interpreter):
    """Runs a program on fake parameters, and knows which decoder block each node belongs to."""

    def __init__(
        self,
        program: Program,
        parameters: Mapping[str, Tensor],
        alive: _Alive,
    ) -> None:
        super().__init__(program.graph_module)
        self.program, self.parameters, self.alive = program, parameters, alive
        self.blocks = block_numbers(program)
        self.operations_of_blocks = self.moved_in_blocks = self.new_pages_in_blocks = 0
        self.last = max((int(annotation(n)["block"]) for n in _ends(program)), default=0)
        self.rounded: tuple[fx.Node, Tensor] | None = None

    def run_node(self, n: fx.Node) -> Any:
        block = self.blocks.get(n)
        self.alive.block = block
        if block is not None and self.alive.phase == "before":
            self.alive.phase = "forward"
        operations, moved = self.alive.operations, self.alive.moved
        new_pages = self.alive.new_pages
        result = self._rounding_its_input(n) if act_of(n) else super().run_node(n)
        if block is not None:
            self.operations_of_blocks += self.alive.operations - operations
            self.moved_in_blocks += self.alive.moved - moved
            self.new_pages_in_blocks += self.alive.new_pages - new_pages
        if annotation(n).get("role") == "block_output":
            self.alive.leave_block(result)
            if annotation(n)["block"] == self.last and result.requires_grad:
                result.register_hook(self._loss_is_behind)
        return result

    def fetch_attr(self, target: str) -> Any:
        return self.parameters[self.program.fqn(target)]

    def _rounding_its_input(self, n: fx.Node) -> Any:
        """A planned matmul behind the fake-quantization that training has there."""
        source, spec = n.args[0], act_of(n)
        assert isinstance(source, fx.Node) and spec is not None
        kept = self.env[source]
        if self.rounded is None or self.rounded[0] is not source:
            scale = torch.empty(1, requires_grad=torch.is_grad_enabled())
            zero = torch.empty(1, dtype=torch.int32)
            rounded = FAKE_QUANTIZE_ACTIVATION(kept, scale, zero, spec.bits, "log", "bf16")
            self.rounded = source, rounded
        self.env[source] = self.rounded[1]
        try:
            return super().run_node(n)
        finally:
            self.env[source] = kept

    def _loss_is_behind(self, gradient: Tensor) -> None:
        self.alive.phase = "blocks"


def _logsumexp(x: Tensor, dim: list[int], keepdim: bool = False) -> Tensor:
    """With what the kernel makes inside itself, of the size of its operand."""
    largest = x.amax(dim, True)
    total = (x - largest).exp_().sum(dim, keepdim)
    return total.log_().add_(largest if keepdim else largest.squeeze(dim))


def _between(one: Any, other: Any, share: float, names: Iterable[str]) -> dict[str, int]:
    """Of these fields, what is on the line from one object to another."""
    ends = ((name, getattr(one, name), getattr(other, name)) for name in names)
    return {name: math.ceil(start + share * (end - start)) for name, start, end in ends}


def _parameters(program: Program, mode: FakeTensorMode) -> dict[str, Tensor]:
    """FQN -> a fake tensor like the one that a program has under it, without its memory."""
    found: dict[str, Tensor] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        real, name = program.tensor(str(node.target)), program.fqn(str(node.target))
        with mode:
            found[name] = torch.empty(real.shape, dtype=real.dtype, device="cpu")
    return found


def _fake(micro: MicroBatch, mode: FakeTensorMode) -> MicroBatch:
    """The same without numbers, but for the sizes of images."""

    def of(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    return replace(
        micro,
        inputs={name: of(tensor) for name, tensor in micro.inputs.items()},
        index=of(micro.index),
        labels=of(micro.labels),
        image_index=None if micro.image_index is None else of(micro.image_index),
    )


def _given(micro: MicroBatch, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """What is there before anything is computed."""
    given = [micro.index, micro.labels, *micro.inputs.values(), *parameters.values()]
    return given if micro.image_index is None else [*given, micro.image_index]


def _tensors(said: Any) -> Iterator[Tensor]:
    """Those of `Outputs`, of logits that are computed later too."""
    for one in vars(said).values() if said is not None else ():
        if isinstance(one, Tensor):
            yield one
        elif is_dataclass(one):
            yield from _tensors(one)


def _operations(micro: MicroBatch) -> dict[Any, Callable[..., int]]:
    """Operator -> what counts its floating-point operations, from its operands."""
    sizes = micro.image_sizes or (1,)
    share = sum(size**2 for size in sizes) / sum(sizes) ** 2

    def shapes(tensors: tuple[Any, ...], count: int) -> list[torch.Size]:
        return [tensor.shape for tensor in tensors[:count]]

    def attention(*args: Any, **_: Any) -> int:
        return int(sdpa_flop_count(*shapes(args, 3)))

    def attention_backward(*args: Any, **_: Any) -> int:
        return int(sdpa_backward_flop_count(*shapes(args, 4)))

    def segments(*args: Any, **_: Any) -> int:
        """Images packed into one sequence, each of which attends to itself."""
        return int(attention(*args) * share)

    def segments_backward(*args: Any, **_: Any) -> int:
        return int(attention_backward(*args) * share)

    def linear_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        """Each chunk: keys, queries and values among each other, and the state that they meet."""
        batch, tokens, heads, width = value.shape
        size = key.shape[-1]
        within = CHUNK * (4 * size + 2 * width)
        return 2 * batch * tokens * heads * (within + 3 * size * width)

    def linear_attention_backward(_: Tensor, *args: Any, **options: Any) -> int:
        """It is computed once more, and its gradient."""
        return 3 * linear_attention(*args, **options)

    return {
        **flop_registry,
        torch.ops.gracec.gated_delta_rule: linear_attention,
        torch.ops.gracec.gated_delta_rule_backward: linear_attention_backward,
        aten.addmm_: flop_registry[aten.addmm],
        torch.ops.gracec.segment_attention: segments,
        torch.ops.gracec.segment_attention_backward: segments_backward,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }


def block_numbers(program: Program) -> dict[fx.Node, int]:
    """Node -> number of the decoder block whose module it was traced in."""
    modules: dict[str, int] = {}
    for end in _ends(program):
        *_, (path, _) = (end.meta.get("nn_module_stack") or {"": ("", "")}).values()
        modules[path] = int(annotation(end)["block"])
    found = {}
    for node in program.graph.nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            if path and path in modules:
                found[node] = modules[path]
    return found


def _ends(program: Program) -> Iterator[fx.Node]:
    return program.nodes(role="block_output")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

"""A program that is trained or teaches, and its scores on data that is not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gracec.capture import family_of
from gracec.errors import GracecError
from gracec.ir.program import Program
from gracec.ir.queries import seen_through
from gracec.objective import LazyLogits, Outputs, in_chunks, kl_term
from gracec.passes.insert_taps import HIDDEN
from gracec.passes.return_head import HEAD, HEAD_BIAS, HEAD_INPUT, LOGITS, following
from gracec.passes.select_supervised import INDEX
from gracec.training.micro_batch import Batch, MicroBatch


@dataclass(frozen=True)
class Learner:
    """A program that is trained or teaches, and the model whose inputs it takes.

    Attributes:
        program: with logits at `supervised_index`, or what they are computed from (`return-head`),
            and, where L_RCKA is on, `hidden`.
        model: that it was captured from.
        vocabulary: of a teacher, how many of its logits, the first ones, its student learns from;
            None for all.
        graph: what runs, where that is not the graph of the program itself.
        owned: whether nobody but the training needs its tensors.
        narrow: whether its matmuls compute in bfloat16, by autocast.
    """

    program: Program
    model: PreTrainedModel
    vocabulary: int | None = None
    graph: Any = None
    owned: bool = False
    narrow: bool = False

    def __call__(self, micro: MicroBatch) -> Outputs:
        """What it says of a micro-batch."""
        graph = self.program.graph_module if self.graph is None else self.graph
        values = self.inputs(micro)
        with torch.autocast(self.model.device.type, torch.bfloat16, self.narrow):
            return self.outputs(graph(**values))

    def inputs(self, micro: MicroBatch) -> dict[str, Tensor]:
        """What the program takes, in order, in the dtype and on the device of the model."""
        found = family_of(self.model).cast(self.model, micro.inputs)
        values = {**found, INDEX: micro.index}
        return {name: values[name].to(self.model.device) for name in self.program.example_inputs}

    def outputs(self, values: Tensor | Sequence[Tensor]) -> Outputs:
        """What the program returned, by name."""
        values = [values] if isinstance(values, Tensor) else values
        named = dict(zip(self.program.output_names, values, strict=True))
        if LOGITS in named:
            return Outputs(named[LOGITS], named.get(HIDDEN))
        given = _as_a_linear_takes_it(named[HEAD_INPUT])
        logits = LazyLogits(given, named[HEAD], named.get(HEAD_BIAS), self._after)
        return Outputs(logits, named.get(HIDDEN))

    def tensors(self) -> Iterator[Tensor]:
        """Its parameters."""
        return self.program.graph_module.parameters()

    def head(self) -> LazyLogits | None:
        """Its head with no positions; None where the program returns logits."""
        if LOGITS in self.program.output_names:
            return None
        nodes = {name: self.program.outputs.get(name) for name in (HEAD, HEAD_BIAS)}
        weight, bias = (
            None if node is None else self.program.tensor(str(seen_through(node).target)).detach()
            for node in nodes.values()
        )
        assert weight is not None
        return LazyLogits(weight.new_empty(0, weight.shape[1]), weight, bias, self._after)

    @cached_property
    def _after(self) -> Callable[[Tensor], Tensor] | None:
        return following(self.program)


def compiled(learner: Learner) -> Learner:
    """The same with its graph through `torch.compile`, for batches of any size."""
    graph = learner.program.graph_module if learner.graph is None else learner.graph
    return replace(learner, graph=torch.compile(graph, dynamic=True))


def _as_a_linear_takes_it(x: Tensor) -> Tensor:
    """In the dtype that autocast gives the inputs of a linear, which the head is."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class Teacher(Protocol):
    """Whom a student learns from: a `Learner`, or what one has said (`teacher_cache`)."""

    @property
    def vocabulary(self) -> int | None:
        """As that of a `Learner`."""

    def tensors(self) -> Iterable[Tensor]:
        """What it holds in memory."""

    def __call__(self, micro: MicroBatch) -> Outputs:
        """What it says of a micro-batch, without a graph where nobody asks for one."""


@dataclass(frozen=True)
class LaterTeacher:
    """A teacher that is not in memory yet: it comes when its student holds no more than its rows.

    Attributes:
        make: the teacher, and the fingerprint of its tensors, or "" where nobody asks for it.
        nbytes: of what it holds in memory, where it is whole.
    """

    make: Callable[[], tuple[Teacher, str]]
    nbytes: int


@dataclass(frozen=True)
class HeldOut:
    """Scores on data that is not trained on.

    Attributes:
        loss: cross-entropy for each target, in nats.
        exact: share of samples whose every target is the likeliest token.
        kl: divergence of the student from the teacher for each target, in nats; with a teacher.
        top1: share of targets where both have the same likeliest token; with a teacher, and like
            `kl` over the ids that are learnt from it.
    """

    loss: float
    exact: float
    kl: float | None = None
    top1: float | None = None

    def row(self) -> dict[str, float | None]:
        """Its figures by name; None for one that is not finite.

        Where a teacher is what counts, exact samples do not: every token of a text would have to
        be.
        """
        by_labels = {"held_out_exact": self.exact} if self.kl is None else {}
        by_teacher = {} if self.kl is None else {"held_out_kl": self.kl, "held_out_top1": self.top1}
        found = {"held_out_loss": self.loss, **by_labels, **by_teacher}
        return {
            name: one if one is not None and math.isfinite(one) else None
            for name, one in found.items()
        }


@torch.no_grad()
def score(
    student: Learner,
    batches: Iterable[Batch],
    teacher: Teacher | None = None,
    *,
    everywhere: bool = False,
) -> HeldOut:
    """Loss and exact matches on batches with labels, and the distance from a teacher.

    Args:
        everywhere: whether every token of text is a target, whatever the labels say.

    Raises:
        GracecError: if there is none.
    """
    total, kl, tokens, same, exact, samples = 0.0, 0.0, 0, 0, 0, 0
    both: list[Teacher] = [student] if teacher is None else [student, teacher]
    for batch in batches:
        micro = MicroBatch.read(student.model, batch, everywhere=everywhere)
        said = [one(micro).logits for one in both]
        wrong = torch.zeros(micro.shape[0], dtype=torch.int64, device=micro.labels.device)
        for chunk, (logits, *taught) in in_chunks(*said):
            labels = micro.labels[chunk]
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            wrong.index_add_(0, micro.rows[chunk], (logits.argmax(-1) != labels).long())
            if teacher is not None:
                one, other = (x[:, : teacher.vocabulary] for x in (logits, *taught))
                kl += kl_term(one, other, labels, temperature=1.0).total.item()
                same += int((one.argmax(-1) == other.argmax(-1)).sum())
        tokens += len(micro.labels)
        exact += int((wrong == 0).sum())
        samples += len(wrong)
    if not tokens:
        raise GracecError("no sample of the held-out data can be used", fix="mend the data")
    found = HeldOut(total / tokens, exact / samples)
    return found if teacher is None else replace(found, kl=kl / tokens, top1=same / tokens)

"""Losses over a vocabulary in chunks of positions, with or without the matmul of the head.

    rows[l, i] = loss_l(s_i, t_i, y_i)        s = hidden @ weightᵀ, or s itself

A loss is stated for one chunk [C, V] as a value, a weight and a gradient in closed form. One
autograd function walks over the chunks, forward and backward, and keeps nothing of the size of the
vocabulary between the two: logits that are given as `LazyLogits` are computed again in backward.
Beside its inputs and the gradients that it returns, memory is a few copies of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gracec.errors import GracecError
from gracec.objective.labels import aligned
from gracec.objective.precision import no_autocast, wide
from gracec.objective.term import Term


class PositionLoss(Protocol):
    """A loss of one position, for a chunk of C positions.

    Student and teacher are logits [C, V], labels int64 [C] in [0, V). Nothing here needs autograd.
    """

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss looks at the teacher; if not, it is handed the student's logits."""

    def values(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The loss of each position [C], in nats."""

    def weights(self, teacher: Tensor) -> Tensor:
        """The weight of each position in the mean [C]."""

    def gradient(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Derivative of each value with respect to the student's logits, a new tensor [C, V]."""


@dataclass(frozen=True)
class LazyLogits:
    """Logits that are not computed yet: hidden @ weightᵀ.

    Stands wherever the objective takes logits. Gradients reach the hidden states and the weight,
    if they require them; a weight that is tied to the embedding needs nothing special.

    Attributes:
        hidden: [S, d] or [B, T, d], what the head sees, any float dtype.
        weight: [V, d], the head. It is cast to the dtype of `hidden`, which is that of the logits.

    Raises:
        GracecError: if the widths differ.
    """

    hidden: Tensor
    weight: Tensor

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.weight.shape[1] != self.hidden.shape[-1]:
            raise GracecError(
                f"hidden states {list(self.hidden.shape)} do not go with a head "
                f"{list(self.weight.shape)}",
                fix="the head is [V, d], as in torch.nn.Linear",
            )


Logits = Tensor | LazyLogits
"""Logits [S, V] or [B, T, V], or hidden states and head that they can be computed from."""


def position_terms(
    losses: Sequence[PositionLoss],
    student: Logits,
    teacher: Logits | None,
    labels: Tensor,
    *,
    ignore_index: int,
    chunk_size: int,
    vocabulary: int | None = None,
) -> list[Term]:
    """The terms of several losses, from one walk over the positions.

    Args:
        student: [S, V] or [B, T, V]; see `gracec.objective.labels` for the shift.
        teacher: the same positions and vocabulary; gets no gradient. None if no loss needs it.
        labels: int64 [S] or [B, T]; `ignore_index` where nothing is supervised.
        chunk_size: positions that are looked at in one go; bounds the temporary memory.
        vocabulary: how many logits, the first ones, a loss sees of both sides if it compares them,
            where student and teacher pad one vocabulary otherwise; labels of these positions are
            below it. What is beyond may hold anything and gets no gradient. A loss that needs no
            teacher sees all of the student's.

    Raises:
        GracecError: if shapes, vocabularies or the chunk size do not fit.
    """
    _check_chunk(chunk_size)
    source, targets = _source(student, labels, ignore_index, "student_logits")
    reference = None
    if teacher is not None:
        reference, _ = _source(teacher, labels, ignore_index, "teacher_logits")
        reference = reference.first(vocabulary)
        _check_vocabularies(source.first(vocabulary).vocabulary, reference.vocabulary)
    elif any(loss.needs_teacher for loss in losses):
        raise GracecError("distillation needs the teacher's logits", where="teacher_logits")
    values, weights = _Walk.apply(  # type: ignore[no-untyped-call]
        tuple(losses),
        targets,
        ignore_index,
        chunk_size,
        vocabulary,
        *source,
        *(reference or (None, None)),
    )
    totals = (values * weights).sum(1)
    return [Term(t, w) for t, w in zip(totals.unbind(), weights.sum(1).unbind(), strict=True)]


@torch.no_grad()
def position_weight(
    loss: PositionLoss,
    teacher: Logits,
    labels: Tensor,
    *,
    ignore_index: int,
    chunk_size: int,
    vocabulary: int | None = None,
) -> Tensor:
    """The weight that `position_terms` gives the term of one loss, before the student has run."""
    _check_chunk(chunk_size)
    source, targets = _source(teacher, labels, ignore_index, "teacher_logits")
    source = source.first(vocabulary)
    weights = wide(source.matrix.new_zeros(len(targets)))
    with no_autocast(source.matrix):
        for chunk in _chunks(len(targets), chunk_size):
            weights[chunk] = loss.weights(source.logits(chunk))
    return weights.masked_fill(targets == ignore_index, 0).sum()


class _Source(NamedTuple):
    """Logits [P, V]: the matrix itself, or hidden states [P, d] and a head [V, d]."""

    matrix: Tensor
    head: Tensor | None

    @property
    def vocabulary(self) -> int:
        return self.matrix.shape[1] if self.head is None else len(self.head)

    def first(self, count: int | None) -> _Source:
        """The same without the logits beyond the first so many."""
        if self.head is None:
            return _Source(self.matrix[:, :count], None)
        return _Source(self.matrix, self.head[:count])

    def logits(self, chunk: slice) -> Tensor:
        """Logits [C, V] of a chunk, rounded as the model would round them, then widened."""
        rows = self.matrix[chunk]
        return wide(rows if self.head is None else rows @ self.head.to(rows.dtype).T)


class _Walk(torch.autograd.Function):
    """Values and weights [L, P] of L losses at P positions; zero where nothing is supervised.

    Backward computes the logits of each chunk again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        losses: tuple[PositionLoss, ...],
        targets: Tensor,
        ignore_index: int,
        chunk_size: int,
        vocabulary: int | None,
        student: Tensor,
        head: Tensor | None,
        teacher: Tensor | None,
        teacher_head: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ignored = targets == ignore_index
        labels = targets.masked_fill(ignored, 0)
        values = wide(student.new_zeros(len(losses), len(targets)))
        weights = torch.zeros_like(values)
        source = _Source(student, head)
        reference = None if teacher is None else _Source(teacher, teacher_head)
        with no_autocast(student):
            for chunk in _chunks(len(targets), chunk_size):
                s = source.logits(chunk)
                t = s if reference is None else reference.logits(chunk)
                for row, loss in enumerate(losses):
                    seen = s[:, :vocabulary] if loss.needs_teacher else s
                    values[row, chunk] = loss.values(seen, t, labels[chunk])
                    weights[row, chunk] = loss.weights(t)
        values.masked_fill_(ignored, 0)
        weights.masked_fill_(ignored, 0)
        ctx.save_for_backward(ignored, labels, student, head, teacher, teacher_head)
        ctx.losses, ctx.chunk_size, ctx.vocabulary = losses, chunk_size, vocabulary
        ctx.mark_non_differentiable(weights)
        return values, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        ignored, labels, student, head, teacher, teacher_head = ctx.saved_tensors
        needs_student, needs_head = ctx.needs_input_grad[5:7]
        grad_student = torch.empty_like(student) if needs_student else None
        grad_head = torch.zeros_like(wide(head)) if needs_head else None
        source = _Source(student, head)
        reference = None if teacher is None else _Source(teacher, teacher_head)
        with no_autocast(student):
            for chunk in _chunks(len(labels), ctx.chunk_size):
                s = source.logits(chunk)
                t = s if reference is None else reference.logits(chunk)
                grad = torch.zeros_like(s)
                for loss, upstream in zip(ctx.losses, grad_values[:, chunk], strict=True):
                    count = ctx.vocabulary if loss.needs_teacher else None
                    one = loss.gradient(s[:, :count], t, labels[chunk])
                    grad[:, :count].addcmul_(one, upstream.unsqueeze(1))
                del s, t
                # A row that is ignored may hold anything, NaN too.
                grad = grad.masked_fill_(ignored[chunk].unsqueeze(1), 0).to(student.dtype)
                if grad_head is not None:
                    _add_product(grad_head, grad.T, student[chunk])
                if grad_student is not None:
                    grad_student[chunk] = grad if head is None else grad @ head.to(grad.dtype)
        if grad_head is not None:
            grad_head = grad_head.to(head.dtype)
        return None, None, None, None, None, grad_student, grad_head, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a temporary of the size of the total where dtypes allow it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _chunks(positions: int, size: int) -> Iterator[slice]:
    for start in range(0, positions, size):
        yield slice(start, min(start + size, positions))


def _source(
    logits: Logits, labels: Tensor, ignore_index: int, where: str
) -> tuple[_Source, Tensor]:
    """The logits of either form, and their targets int64 [P]."""
    if isinstance(logits, LazyLogits):
        matrix, targets = aligned(logits.hidden, labels, ignore_index, where)
        source = _Source(matrix, logits.weight)
    else:
        matrix, targets = aligned(logits, labels, ignore_index, where)
        source = _Source(matrix, None)
    if source.vocabulary < 2:
        raise GracecError(f"a vocabulary of {source.vocabulary} leaves no choice", where=where)
    return source, targets


def _check_vocabularies(student: int, teacher: int) -> None:
    if student != teacher:
        raise GracecError(
            f"the student has {student} logits, the teacher {teacher}",
            where="teacher_logits",
            fix="both need one tokenizer; if only the padding differs, give vocabulary=",
        )


def _check_chunk(chunk_size: int) -> None:
    if chunk_size < 1:
        raise GracecError(f"chunk_size is {chunk_size}", fix="use at least one position")

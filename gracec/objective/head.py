"""Losses over a vocabulary in chunks of positions, with or without the matmul of the head.

    rows[l, i] = loss_l(s_i, t_i, y_i)        s = after(hidden @ weightᵀ + bias), or s itself

A loss is stated for one chunk [C, V] as a value, a weight and a gradient in closed form. One
autograd function walks over the chunks, forward and backward. Logits that are given as `LazyLogits`
are computed again in backward, so that nothing of the size of positions times vocabulary is kept;
those of a single chunk are kept. Beside its inputs and the gradients that it returns, memory is a
few copies of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gracec.errors import GracecError
from gracec.objective.labels import aligned
from gracec.objective.precision import no_autocast, wide
from gracec.objective.term import Term

CHUNK_BYTES = 128 * 2**20
"""Of the logits of a chunk in float32, where no other size is asked for: 220 positions of 152,000
logits. A matmul of fewer rows would wait for the weight of the head."""


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
    """Logits that are not computed yet: after(hidden @ weightᵀ + bias).

    Stands wherever the objective takes logits. Gradients reach the hidden states, the weight and
    the bias, if they require them; a weight that is tied to the embedding needs nothing special.

    Attributes:
        hidden: [S, d] or [B, T, d], what the head sees, any float dtype.
        weight: [V, d], the head. It is cast to the dtype of `hidden`, which is that of the logits.
        bias: [V], cast likewise.
        after: what a model does to the logits of its head, element by element, as a soft-cap or a
            scale; autograd has to know its derivative.

    Raises:
        GracecError: if the sizes differ.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    after: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.weight.shape[1] != self.hidden.shape[-1]:
            raise GracecError(
                f"hidden states {list(self.hidden.shape)} do not go with a head "
                f"{list(self.weight.shape)}",
                fix="the head is [V, d], as in torch.nn.Linear",
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise GracecError(
                f"a bias {list(self.bias.shape)} does not go with a head {list(self.weight.shape)}"
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
    chunk_size: int | None = None,
    vocabulary: int | None = None,
) -> list[Term]:
    """The terms of several losses, from one walk over the positions.

    Args:
        student: [S, V] or [B, T, V]; see `gracec.objective.labels` for the shift.
        teacher: the same positions and vocabulary; gets no gradient. None if no loss needs it.
        labels: int64 [S] or [B, T]; `ignore_index` where nothing is supervised.
        chunk_size: positions that are looked at in one go; bounds the temporary memory. By default
            as many as `CHUNK_BYTES` take.
        vocabulary: how many logits, the first ones, a loss sees of both sides if it compares them,
            where student and teacher pad one vocabulary otherwise; labels of these positions are
            below it. What is beyond may hold anything and gets no gradient. A loss that needs no
            teacher sees all of the student's.

    Raises:
        GracecError: if shapes, vocabularies or the chunk size do not fit.
    """
    source, targets = _source(student, labels, ignore_index, "student_logits")
    size = _size(chunk_size, source.vocabulary)
    reference = None
    if teacher is not None:
        reference, _ = _source(teacher, labels, ignore_index, "teacher_logits")
        reference = reference.first(vocabulary)
        _check_vocabularies(source.first(vocabulary).vocabulary, reference.vocabulary)
    elif any(loss.needs_teacher for loss in losses):
        raise GracecError("distillation needs the teacher's logits", where="teacher_logits")
    after = source.after, None if reference is None else reference.after
    values, weights = _Walk.apply(  # type: ignore[no-untyped-call]
        _How(tuple(losses), ignore_index, size, vocabulary, *after),
        targets,
        *source.tensors,
        *((None, None, None) if reference is None else reference.tensors),
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
    chunk_size: int | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """The weight that `position_terms` gives the term of one loss, before the student has run."""
    source, targets = _source(teacher, labels, ignore_index, "teacher_logits")
    size = _size(chunk_size, source.vocabulary)
    source = source.first(vocabulary).cast()
    weights = wide(source.matrix.new_zeros(len(targets)))
    with no_autocast(source.matrix):
        for chunk in _chunks(len(targets), size):
            weights[chunk] = loss.weights(source.seen(source.raw(chunk)))
    return weights.masked_fill(targets == ignore_index, 0).sum()


@torch.no_grad()
def in_chunks(
    *logits: Logits, chunk_size: int | None = None
) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Several logits of the same positions, a few positions at a time, without a graph.

    Yields:
        Which of the flat positions, and of each of them float32 or float64 [C, V].
    """
    sources = [_Source.of(one) for one in logits]
    size = _size(chunk_size, max(source.vocabulary for source in sources))
    sources = [source.cast() for source in sources]
    for chunk in _chunks(len(sources[0].matrix), size):
        with no_autocast(sources[0].matrix):
            found = tuple(source.seen(source.raw(chunk)) for source in sources)
        yield chunk, found


class _Source(NamedTuple):
    """Logits [P, V]: the matrix itself, or hidden states [P, d] and a head [V, d]."""

    matrix: Tensor
    head: Tensor | None = None
    bias: Tensor | None = None
    after: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, logits: Logits) -> _Source:
        """Of either form."""
        if isinstance(logits, LazyLogits):
            hidden = logits.hidden.flatten(0, -2)
            return cls(hidden, logits.weight, logits.bias, logits.after)
        return cls(logits.flatten(0, -2))

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.matrix, self.head, self.bias

    @property
    def vocabulary(self) -> int:
        return self.matrix.shape[1] if self.head is None else len(self.head)

    def first(self, count: int | None) -> _Source:
        """The same without the logits beyond the first so many."""
        if self.head is None:
            return self._replace(matrix=self.matrix[:, :count])
        bias = None if self.bias is None else self.bias[:count]
        return self._replace(head=self.head[:count], bias=bias)

    def cast(self) -> _Source:
        """The same with a head in the dtype of the hidden states."""
        head, bias = (None if x is None else x.to(self.matrix.dtype) for x in self.tensors[1:])
        return self._replace(head=head, bias=bias)

    def raw(self, chunk: slice) -> Tensor:
        """What the head says of a chunk [C, V], rounded as the model would round it."""
        rows = self.matrix[chunk]
        return rows if self.head is None else F.linear(rows, self.head, self.bias)

    def seen(self, raw: Tensor) -> Tensor:
        """The logits, widened."""
        return wide(raw if self.after is None else self.after(raw))

    def before(self, raw: Tensor, grad: Tensor) -> Tensor:
        """The gradient of what the head says, from that of the logits."""
        if self.after is None:
            return grad.to(self.matrix.dtype)
        with torch.enable_grad():
            given = raw.detach().requires_grad_()
            found = self.after(given)
        return torch.autograd.grad(found, given, grad.to(found.dtype))[0]


class _How(NamedTuple):
    """What `_Walk` is told beside tensors."""

    losses: tuple[PositionLoss, ...]
    ignore_index: int
    chunk_size: int
    vocabulary: int | None
    after: Callable[[Tensor], Tensor] | None
    teacher_after: Callable[[Tensor], Tensor] | None

    def source(self, matrix: Tensor, head: Tensor | None, bias: Tensor | None) -> _Source:
        return _Source(matrix, head, bias, self.after).cast()

    def reference(
        self, matrix: Tensor | None, head: Tensor | None, bias: Tensor | None
    ) -> _Source | None:
        return None if matrix is None else _Source(matrix, head, bias, self.teacher_after).cast()


class _Walk(torch.autograd.Function):
    """Values and weights [L, P] of L losses at P positions; zero where nothing is supervised.

    Backward computes the logits of each chunk again, unless there is only one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        how: _How,
        targets: Tensor,
        student: Tensor,
        head: Tensor | None,
        bias: Tensor | None,
        teacher: Tensor | None,
        teacher_head: Tensor | None,
        teacher_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ignored = targets == how.ignore_index
        labels = targets.masked_fill(ignored, 0)
        values = wide(student.new_zeros(len(how.losses), len(targets)))
        weights = torch.zeros_like(values)
        source = how.source(student, head, bias)
        reference = how.reference(teacher, teacher_head, teacher_bias)
        raw = raw_t = None
        with no_autocast(student):
            for chunk in _chunks(len(targets), how.chunk_size):
                raw = source.raw(chunk)
                s = t = source.seen(raw)
                if reference is not None:
                    raw_t = reference.raw(chunk)
                    t = reference.seen(raw_t)
                for row, loss in enumerate(how.losses):
                    seen = s[:, : how.vocabulary] if loss.needs_teacher else s
                    values[row, chunk] = loss.values(seen, t, labels[chunk])
                    weights[row, chunk] = loss.weights(t)
        values.masked_fill_(ignored, 0)
        weights.masked_fill_(ignored, 0)
        kept = (raw, raw_t) if len(targets) <= how.chunk_size else (None, None)
        operands = student, head, bias, teacher, teacher_head, teacher_bias
        ctx.save_for_backward(ignored, labels, *kept, *operands)
        ctx.how = how
        ctx.mark_non_differentiable(weights)
        return values, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        ignored, labels, kept, kept_t, student, head, bias, *taught = ctx.saved_tensors
        needs_student, needs_head, needs_bias = ctx.needs_input_grad[2:5]
        grad_student = torch.empty_like(student) if needs_student else None
        grad_head = torch.zeros_like(wide(head)) if needs_head else None
        grad_bias = torch.zeros_like(wide(bias)) if needs_bias else None
        source, reference = how.source(student, head, bias), how.reference(*taught)
        with no_autocast(student):
            for chunk in _chunks(len(labels), how.chunk_size):
                raw = source.raw(chunk) if kept is None else kept
                s = t = source.seen(raw)
                if reference is not None:
                    t = reference.seen(reference.raw(chunk) if kept_t is None else kept_t)
                grad = torch.zeros_like(s)
                for loss, upstream in zip(how.losses, grad_values[:, chunk], strict=True):
                    count = how.vocabulary if loss.needs_teacher else None
                    one = loss.gradient(s[:, :count], t, labels[chunk])
                    grad[:, :count].addcmul_(one, upstream.unsqueeze(1))
                grad = source.before(raw, grad)
                del s, t, raw
                # A row that is ignored may hold anything, NaN too.
                grad.masked_fill_(ignored[chunk].unsqueeze(1), 0)
                if grad_head is not None:
                    _add_product(grad_head, grad.T, student[chunk])
                if grad_bias is not None:
                    grad_bias += grad.sum(0, dtype=grad_bias.dtype)
                if grad_student is not None:
                    grad_student[chunk] = grad if source.head is None else grad @ source.head
        if grad_head is not None:
            grad_head = grad_head.to(head.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return None, None, grad_student, grad_head, grad_bias, None, None, None


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
    shown = logits.hidden if isinstance(logits, LazyLogits) else logits
    _, targets = aligned(shown, labels, ignore_index, where)
    source = _Source.of(logits)
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


def _size(chunk_size: int | None, vocabulary: int) -> int:
    """Positions of a chunk."""
    if chunk_size is None:
        return max(1, CHUNK_BYTES // (4 * vocabulary))
    if chunk_size < 1:
        raise GracecError(f"chunk_size is {chunk_size}", fix="use at least one position")
    return chunk_size

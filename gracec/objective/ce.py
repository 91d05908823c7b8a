"""Cross-entropy with the labels: L_CE = mean over supervised positions of -log softmax(s)(y)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gracec.objective.head import Logits, position_terms
from gracec.objective.labels import IGNORE_INDEX
from gracec.objective.term import Term


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(s)(y), every position with weight 1: a `PositionLoss`."""

    needs_teacher: ClassVar[bool] = False

    def values(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return -student.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)

    def weights(self, teacher: Tensor) -> Tensor:
        return torch.ones_like(teacher[:, 0])

    def gradient(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        y = labels.unsqueeze(1)
        return student.softmax(1).scatter_add_(1, y, -torch.ones_like(y, dtype=student.dtype))


def ce_term(
    student_logits: Logits,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
) -> Term:
    """Cross-entropy in nats, in chunks of positions.

    Args:
        student_logits: [S, V] or [B, T, V], any float dtype, or `LazyLogits`.
        labels: int64 [S] aligned, or [B, T] as in `gracec.objective.labels`.

    Returns:
        The sum over the supervised positions, and their number.

    Raises:
        GracecError: if the shapes do not fit.
    """
    (term,) = position_terms(
        [CrossEntropy()],
        student_logits,
        None,
        labels,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
    )
    return term

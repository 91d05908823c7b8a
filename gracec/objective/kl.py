"""Classical distillation: the divergence of the student's softened distribution.

    L_i  = T² · KL(softmax(t / T) || softmax(s / T))
    L_KL = Σ_i g_i L_i / Σ_i g_i              g_i = 1, or the confidence gate

Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (arXiv 1503.02531). Here it
is the control for L_GDKD: without the gate it is the classical loss, with it the ablation
"no decoupling".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gracec.errors import GracecError
from gracec.objective.head import Logits, position_terms
from gracec.objective.labels import IGNORE_INDEX
from gracec.objective.term import Term


def confidence_gate(teacher_logits: Tensor) -> Tensor:
    """g = exp(-H(softmax(t)) / ln V): how sure the teacher is of each position.

    From arXiv 2601.22709. The entropy is in nats, at temperature 1.

    Args:
        teacher_logits: [..., V], float32 or float64.

    Returns:
        [...], between 1/e (uniform) and 1 (certain).
    """
    log_p = teacher_logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.exp(-(entropy / math.log(teacher_logits.shape[-1])).clamp(0, 1))


def check_temperature(temperature: float) -> None:
    """Raise `GracecError` for a temperature that softens nothing."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise GracecError(f"the temperature is {temperature}", fix="use a positive number")


@dataclass(frozen=True)
class Kl:
    """T² · KL(p_t || p_s) of each position: a `PositionLoss`.

    Attributes:
        temperature: T.
        gate: weigh positions by `confidence_gate`; otherwise each has weight 1.

    Raises:
        GracecError: if the temperature is not positive.
    """

    temperature: float = 2.0
    gate: bool = False
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def values(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_s = (student / self.temperature).log_softmax(1)
        log_t = (teacher / self.temperature).log_softmax(1)
        p_t = log_t.exp()
        return log_t.sub_(log_s).mul_(p_t).sum(1) * self.temperature**2

    def weights(self, teacher: Tensor) -> Tensor:
        return confidence_gate(teacher) if self.gate else torch.ones_like(teacher[:, 0])

    def gradient(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        p_s = (student / self.temperature).softmax(1)
        p_t = (teacher / self.temperature).softmax(1)
        return p_s.sub_(p_t).mul_(self.temperature)


def kl_term(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    gate: bool = False,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
    vocabulary: int | None = None,
) -> Term:
    """Σ g_i L_i and Σ g_i of L_KL; arguments, shapes and errors as in `kl_loss`."""
    (term,) = position_terms(
        [Kl(temperature, gate)],
        student_logits,
        teacher_logits,
        labels,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        vocabulary=vocabulary,
    )
    return term


def kl_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Tensor,
    temperature: float = 2.0,
    gate: bool = False,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
    vocabulary: int | None = None,
) -> Tensor:
    """L_KL = Σ g_i T² KL(p_t || p_s) / Σ g_i over the supervised positions, in nats.

    Args:
        student_logits: [S, V] or [B, T, V], any float dtype, or `LazyLogits`. float64 is computed
            in float64, everything else in float32.
        teacher_logits: the same positions, and vocabulary unless `vocabulary` says what is
            compared; gets no gradient.
        labels: int64 [S] aligned, or [B, T] as in `gracec.objective.labels`; they only say which
            positions are supervised.
        temperature: T.
        gate: weigh positions by the confidence gate of L_GDKD; otherwise each counts the same.
        ignore_index: label of positions without supervision.
        chunk_size: positions that are looked at in one go; bounds the temporary memory. By default
            as many as 128 MiB of logits are.
        vocabulary: how many logits of both, the first ones, are compared, where one vocabulary is
            padded otherwise; labels are below it, and what is beyond is ignored. By default all.

    Returns:
        A scalar; zero with a graph when nothing is supervised.

    Raises:
        GracecError: if shapes, vocabularies, the temperature or the chunk size do not fit.
    """
    return kl_term(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        gate=gate,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        vocabulary=vocabulary,
    ).mean()

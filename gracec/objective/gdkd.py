"""Confidence-gated decoupled distillation, L_GDKD of GRACE (arXiv 2601.22709).

    p_t = softmax(t / T)                      p_s = softmax(s / T)
    TCKD_i = KL([p_t(y), 1 - p_t(y)] || [p_s(y), 1 - p_s(y)])
    NCKD_i = KL(p̂_t || p̂_s)                   p̂ = p renormalised over the classes other than y
    L_i    = T² · (α · TCKD_i + β · NCKD_i)
    g_i    = exp(-H(softmax(t)) / ln V)
    L_GDKD = Σ_i g_i L_i / Σ_i g_i            over the supervised positions

Splitting the divergence into target and other classes is decoupled knowledge distillation (Zhao et
al., CVPR 2022): in KL(p_t || p_s) the second part is multiplied by 1 - p_t(y), so that a teacher
that is sure of the answer says nothing about the other classes. Here its weight is a constant.

Everything is computed from two quantities, neither of which forms 1 - p(y): log p̂, a log-softmax
that leaves out y, and the log-odds u of the target, with log p(y) = logsigmoid(u) and
log(1 - p(y)) = logsigmoid(-u). With q = p_s(y) and b = p_t(y) the gradient is

    ∂L_i/∂s_y = T · α (q - b)
    ∂L_i/∂s_j = T · ((β - α (q - b)) p̂_s(j) - β p̂_t(j))          j ≠ y
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gracec.objective.head import Logits, position_terms
from gracec.objective.kl import check_temperature, confidence_gate
from gracec.objective.labels import IGNORE_INDEX
from gracec.objective.term import Term


@dataclass(frozen=True)
class Gdkd:
    """L_i of each position, with the gate as its weight: a `PositionLoss`.

    Attributes:
        temperature: T.
        alpha: weight of the target class, α.
        beta: weight of the other classes, β.
        gate: weigh positions by `confidence_gate`; otherwise each has weight 1.

    Raises:
        GracecError: if the temperature is not positive.
    """

    temperature: float = 2.0
    alpha: float = 1.0
    beta: float = 4.0
    gate: bool = True
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_temperature(self.temperature)

    def values(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        odds_s, log_rest_s = self._decouple(student, labels)
        odds_t, log_rest_t = self._decouple(teacher, labels)
        tckd = odds_t.sigmoid() * (F.logsigmoid(odds_t) - F.logsigmoid(odds_s))
        tckd += (-odds_t).sigmoid() * (F.logsigmoid(-odds_t) - F.logsigmoid(-odds_s))
        rest_t = log_rest_t.exp()
        nckd = log_rest_t.sub_(log_rest_s).mul_(rest_t).sum(1)
        return (self.alpha * tckd + self.beta * nckd) * self.temperature**2

    def weights(self, teacher: Tensor) -> Tensor:
        return confidence_gate(teacher) if self.gate else torch.ones_like(teacher[:, 0])

    def gradient(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        odds_s, rest_s = self._decouple(student, labels)
        odds_t, rest_t = self._decouple(teacher, labels)
        excess = (self.alpha * (odds_s.sigmoid() - odds_t.sigmoid())).unsqueeze(1)
        grad = rest_s.exp_().mul_(self.beta - excess)
        grad.sub_(rest_t.exp_(), alpha=self.beta)
        return grad.scatter_(1, labels.unsqueeze(1), excess).mul_(self.temperature)

    def _decouple(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of the target [C], and log p̂ [C, V] whose exponential at y is zero."""
        y = labels.unsqueeze(1)
        soft = logits / self.temperature
        target = soft.gather(1, y)
        # Not -inf: the difference of two such entries is zero and not NaN.
        soft.scatter_(1, y, torch.finfo(soft.dtype).min)
        log_sum = soft.logsumexp(1, keepdim=True)
        return (target - log_sum).squeeze(1), soft.sub_(log_sum)


def gdkd_term(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Tensor,
    *,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    gate: bool = True,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
    vocabulary: int | None = None,
) -> Term:
    """Σ g_i L_i and Σ g_i of L_GDKD; arguments, shapes and errors as in `gdkd_loss`."""
    (term,) = position_terms(
        [Gdkd(temperature, alpha, beta, gate)],
        student_logits,
        teacher_logits,
        labels,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        vocabulary=vocabulary,
    )
    return term


def gdkd_loss(
    student_logits: Logits,
    teacher_logits: Logits,
    labels: Tensor,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    ignore_index: int = IGNORE_INDEX,
    chunk_size: int | None = None,
    gate: bool = True,
    vocabulary: int | None = None,
) -> Tensor:
    """L_GDKD = Σ g_i T² (α TCKD_i + β NCKD_i) / Σ g_i over the supervised positions, in nats.

    Without the gate, and with β = 1 - p_t(y) at each position, this would be T² KL(p_t || p_s).

    Args:
        student_logits: [S, V] or [B, T, V], any float dtype, or `LazyLogits`. float64 is computed
            in float64, everything else in float32.
        teacher_logits: the same positions, and vocabulary unless `vocabulary` says what is
            compared; gets no gradient.
        labels: int64 [S], the target of each row; or [B, T] as Hugging Face has them, when
            logits at t are matched with the label at t + 1 here.
        temperature: T, of both distributions but not of the gate.
        alpha: weight of the target class.
        beta: weight of the other classes.
        ignore_index: label of positions without supervision.
        chunk_size: positions that are looked at in one go; bounds the temporary memory in forward
            and backward. By default as many as 128 MiB of logits are.
        gate: weigh positions by the teacher's confidence; otherwise each counts the same.
        vocabulary: how many logits of both, the first ones, are compared, where one vocabulary is
            padded otherwise; labels are below it, and what is beyond is ignored. By default all.

    Returns:
        A scalar; zero with a graph when nothing is supervised.

    Raises:
        GracecError: if shapes, vocabularies, the temperature or the chunk size do not fit.
    """
    return gdkd_term(
        student_logits,
        teacher_logits,
        labels,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        gate=gate,
        ignore_index=ignore_index,
        chunk_size=chunk_size,
        vocabulary=vocabulary,
    ).mean()

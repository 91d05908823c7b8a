"""The GRACE objective (arXiv 2601.22709): L_CE + β · L_D + ω · L_RCKA.

Each term is a weighted mean over a whole optimizer step. Its normaliser needs labels, teacher and
images but not the student, so that it is summed first, and the step does not depend on how the
batch was cut into micro-batches m and ranks:

    L = Σ_m (total_CE,m / N_CE + β total_D,m / N_D + ω total_RCKA,m / N_RCKA)

    N_CE = supervised positions      N_D = Σ of the gates      N_RCKA = images

1. `normalisers` of all micro-batches are added, also over ranks.
2. `terms` and `loss` of each micro-batch, and its backward pass. Totals are added, also over ranks.
3. `means` of the step go into the log and to the controller of β.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gracec.errors import GracecError
from gracec.objective.ce import CrossEntropy
from gracec.objective.gdkd import Gdkd
from gracec.objective.head import Logits, PositionLoss, position_terms, position_weight
from gracec.objective.kl import Kl
from gracec.objective.labels import IGNORE_INDEX, next_token_labels
from gracec.objective.rcka import MIN_TOKENS, Relations, image_count, rcka_term
from gracec.objective.term import Term, divide, zero_with_graph

Distillation = Literal["gdkd", "kl", "none"]
TERMS = ("ce", "distillation", "rcka")


@dataclass(frozen=True)
class Outputs:
    """What a model says about one micro-batch.

    Attributes:
        logits: [S, V] or [B, T, V], or `LazyLogits`.
        hidden: [B, T, d], output of the penultimate decoder block; for L_RCKA. Of a teacher also
            the `Grams` of its images.
    """

    logits: Logits
    hidden: Relations | None = None


@dataclass(frozen=True)
class Targets:
    """What is known about one micro-batch before a model runs.

    Attributes:
        labels: int64, [S] for logits [S, V] and [B, T] for logits [B, T, V]; see
            `gracec.objective.labels`.
        image_index: int64 [B, T], the number of the image of each token, -1 for text; for L_RCKA.
        image_sizes: tokens of each image; without them L_RCKA waits for the device.
    """

    labels: Tensor
    image_index: Tensor | None = None
    image_sizes: Sequence[int] | None = None


@dataclass(frozen=True)
class Terms:
    """The terms of one micro-batch; one that is switched off is zero over zero."""

    ce: Term
    distillation: Term
    rcka: Term

    @property
    def totals(self) -> Tensor:
        """[3], without gradient: to be added over micro-batches and ranks."""
        return torch.stack([self.ce.total, self.distillation.total, self.rcka.total]).detach()

    @property
    def weights(self) -> Tensor:
        """[3]: the normalisers, when this micro-batch is all that a rank has in the step."""
        return torch.stack([self.ce.weight, self.distillation.weight, self.rcka.weight])


@dataclass(frozen=True)
class GraceObjective:
    """Options of L = c · L_CE + β · L_D + ω · L_RCKA. The defaults are those of GRACE.

    Attributes:
        ce: c, weight of the cross-entropy; 0 switches it off.
        distillation: L_D is "gdkd", or "kl" (classical, not decoupled), or "none".
        temperature: T of L_D.
        alpha: weight of the target class in L_GDKD.
        beta_dkd: weight of the other classes in L_GDKD.
        gate: weigh positions in L_D by the teacher's confidence.
        omega: ω after the warm-up; 0 switches L_RCKA off.
        omega_warmup: optimizer steps over which ω rises from 0, linearly.
        min_tokens: images with fewer visual tokens are left out of L_RCKA.
        ignore_index: label of positions without supervision.
        chunk_size: positions whose logits are looked at in one go; by default as many as 128 MiB
            of them are, in float32.
        vocabulary: how many logits of both sides, the first ones, L_D compares, where student and
            teacher pad one vocabulary otherwise; by default all. The cross-entropy sees all of the
            student's in any case, since it generates from all of them.

    Classical distillation is distillation="kl" with gate=False. β is the controller's.

    Raises:
        GracecError: if every term is off, or an option is out of its range.
    """

    ce: float = 1.0
    distillation: Distillation = "gdkd"
    temperature: float = 2.0
    alpha: float = 1.0
    beta_dkd: float = 4.0
    gate: bool = True
    omega: float = 3.0
    omega_warmup: int = 400
    min_tokens: int = MIN_TOKENS
    ignore_index: int = IGNORE_INDEX
    chunk_size: int | None = None
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.distillation not in get_args(Distillation):
            raise GracecError(
                f"unknown distillation {self.distillation!r}", fix=f"use {get_args(Distillation)}"
            )
        if self.ce < 0 or self.omega < 0:
            raise GracecError("the weight of a term is negative", fix="use 0 to switch it off")
        if self.ce == 0 and self.omega == 0 and self.distillation == "none":
            raise GracecError("every term of the objective is switched off")
        if self.omega_warmup < 0:
            raise GracecError(f"omega_warmup is {self.omega_warmup}", fix="use 0 for no warm-up")
        self._distillation()

    def omega_at(self, step: int) -> float:
        """ω · min(1, step / omega_warmup), for optimizer steps counted from 0."""
        if step >= self.omega_warmup:
            return self.omega
        return self.omega * step / self.omega_warmup

    @torch.no_grad()
    def normalisers(self, teacher: Outputs | None, targets: Targets) -> Tensor:
        """What one micro-batch adds to the normalisers [3] of CE, L_D and L_RCKA.

        Zero for a term that is off. `teacher` may be None if no term needs it.

        Raises:
            GracecError: if something that a term needs is missing, or does not fit.
        """
        labels = targets.labels
        shifted = labels if labels.dim() == 1 else next_token_labels(labels, self.ignore_index)
        count = (shifted != self.ignore_index).sum().to(torch.float32)
        loss = self._distillation()
        gates = images = torch.zeros_like(count)
        if loss is not None:
            gates = position_weight(
                loss,
                _required(teacher).logits,
                labels,
                ignore_index=self.ignore_index,
                chunk_size=self.chunk_size,
                vocabulary=self.vocabulary,
            )
        if self.omega:
            hidden, index = _visual(_required(teacher), targets)
            images = image_count(hidden, index, targets.image_sizes, self.min_tokens)
        return torch.stack([count if self.ce else torch.zeros_like(count), gates, images])

    def terms(self, student: Outputs, teacher: Outputs | None, targets: Targets) -> Terms:
        """The terms of one micro-batch, as sums. The teacher gets no gradient.

        Raises:
            GracecError: if something that a term needs is missing, or does not fit.
        """
        logits = student.logits
        zero = zero_with_graph(logits if isinstance(logits, Tensor) else logits.hidden).float()
        off = Term(zero, torch.zeros_like(zero))
        distillation = self._distillation()
        losses: list[PositionLoss] = [CrossEntropy()] if self.ce else []
        losses += [distillation] if distillation is not None else []
        found: list[Term] = []
        if losses:
            found = position_terms(
                losses,
                logits,
                _required(teacher).logits if distillation is not None else None,
                targets.labels,
                ignore_index=self.ignore_index,
                chunk_size=self.chunk_size,
                vocabulary=self.vocabulary,
            )
        return Terms(
            ce=found[0] if self.ce else off,
            distillation=found[-1] if distillation is not None else off,
            rcka=self._rcka(student, _required(teacher), targets) if self.omega else off,
        )

    def loss(self, terms: Terms, normalisers: Tensor, beta: float, step: int) -> Tensor:
        """What one micro-batch adds to the loss of the optimizer step.

        Args:
            terms: of the micro-batch.
            normalisers: [3], of the whole step.
            beta: of the controller.
            step: optimizer step, counted from 0; only the warm-up of ω depends on it.
        """
        parts = [terms.ce.total, terms.distillation.total, terms.rcka.total]
        factors = (self.ce, beta, self.omega_at(step))
        means = [divide(p, n) for p, n in zip(parts, normalisers.unbind(), strict=True)]
        return sum((f * m for f, m in zip(factors, means, strict=True)), torch.zeros_like(means[0]))

    def _distillation(self) -> PositionLoss | None:
        if self.distillation == "gdkd":
            return Gdkd(self.temperature, self.alpha, self.beta_dkd, self.gate)
        return Kl(self.temperature, self.gate) if self.distillation == "kl" else None

    def _rcka(self, student: Outputs, teacher: Outputs, targets: Targets) -> Term:
        student_hidden, index = _visual(student, targets)
        teacher_hidden, _ = _visual(teacher, targets)
        if not isinstance(student_hidden, Tensor):
            raise GracecError("L_RCKA needs the student's hidden states, not their Gram matrices")
        return rcka_term(
            student_hidden, teacher_hidden, index, targets.image_sizes, self.min_tokens
        )


def means(totals: Tensor, normalisers: Tensor) -> dict[str, float]:
    """The values of the terms in an optimizer step, by name; waits for the device once.

    Args:
        totals: [3], `Terms.totals` added over micro-batches and ranks.
        normalisers: [3], likewise.
    """
    return dict(zip(TERMS, divide(totals, normalisers).tolist(), strict=True))


def _required(teacher: Outputs | None) -> Outputs:
    if teacher is None:
        raise GracecError(
            "a term compares with the teacher, and there is none",
            fix='give one, or use distillation="none" and omega=0',
        )
    return teacher


def _visual(outputs: Outputs, targets: Targets) -> tuple[Relations, Tensor]:
    if outputs.hidden is None or targets.image_index is None:
        raise GracecError(
            "L_RCKA needs the hidden states of both models and image_index",
            fix="give them, or use omega=0",
        )
    return outputs.hidden, targets.image_index

"""The equations of the objective written out, one position or image at a time, with autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

IGNORED = -100


def random_logits(*shape: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    """float64, normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_labels(*shape: int, vocabulary: int, seed: int = 0) -> Tensor:
    """int64, about a third of them ignored, the last position never."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, shape, generator=generator)
    ignored = torch.rand(shape, generator=generator) < 1 / 3
    ignored[..., -1] = False
    return labels.masked_fill(ignored, IGNORED)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def decoupled(s: Tensor, t: Tensor, y: int, temperature: float) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of one position, logits [V]."""
    p_t, p_s = (t / temperature).softmax(0), (s / temperature).softmax(0)
    others = [j for j in range(len(s)) if j != y]
    tckd = kl(torch.stack([p_t[y], 1 - p_t[y]]), torch.stack([p_s[y], 1 - p_s[y]]))
    nckd = kl(p_t[others] / p_t[others].sum(), p_s[others] / p_s[others].sum())
    return tckd, nckd


def gate(t: Tensor) -> Tensor:
    p = t.softmax(0)
    return torch.exp((p * p.log()).sum() / math.log(len(t)))


def gdkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float = 2.0,
    alpha: float = 1.0,
    beta: float = 4.0,
    gated: bool = True,
) -> Tensor:
    """L_GDKD of logits [S, V] and aligned labels [S]."""
    total, weight = torch.zeros((), dtype=student.dtype), torch.zeros((), dtype=student.dtype)
    for s, t, y in zip(student, teacher, labels.tolist(), strict=True):
        if y != IGNORED:
            tckd, nckd = decoupled(s, t, y, temperature)
            g = gate(t) if gated else torch.ones((), dtype=t.dtype)
            total = total + g * temperature**2 * (alpha * tckd + beta * nckd)
            weight = weight + g
    return total / weight


def cka(x: Tensor, y: Tensor) -> Tensor:
    """CKA of the tokens of one image, [n, d_x] and [n, d_y], with the matrix that centres."""
    n = len(x)
    centre = torch.eye(n, dtype=x.dtype) - torch.ones(n, n, dtype=x.dtype) / n
    k_x, k_y = (
        centre @ (z / z.norm(dim=1, keepdim=True)) @ (z / z.norm(dim=1, keepdim=True)).T @ centre
        for z in (x, y)
    )
    return (k_x * k_y).sum() / (k_x.norm() * k_y.norm())


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)

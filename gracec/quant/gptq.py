"""Codes that make up for each other's rounding, column by column, and weights that make up for
rounding earlier in the model.

    U    = upper Cholesky factor of (H + damping mean(diag H) I)^-1
    e_j  = (w_j - s q_j) / U_jj,   W_{>j} -= e_j U_{j,>j}

That is GPTQ (Frantar et al., arXiv 2210.17323) on scales that are fixed beforehand: whatever the
order of the columns, no feature changes its group. Columns are taken in the order of falling H_kk,
so that the inputs that count most are rounded while all others can still make up for it.

    W*   = W + a W C (H + 0.05 mean(diag H) I)^-1,   C = (X_f - X)' X / n

is the weight of least error on the inputs X that the quantized model computes, where the original
had X_f; `a` is how much of the step is taken (asymmetric calibration, GPTAQ, arXiv 2504.02692).

All matrices that are factored are float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gracec.quant.codes import code_range

BLOCK = 128
"""Columns that are rounded before the others learn of it: one matmul instead of many products."""
COLUMNS = 512
"""Columns of a triangular matrix that are inverted at once."""
ASYMMETRIC_DAMPING = 0.05
ATTEMPTS = 5
"""Times that the damping is raised tenfold where a matrix cannot be factored."""


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of the inputs of a linear.

    Attributes:
        upper: float32 [K, K], U for the columns in `order`.
        order: int64 [K].
        damping: that the matrix could be factored with.
    """

    upper: Tensor
    order: Tensor
    damping: float


def factor(moments: Tensor, damping: float = 0.01, *, by_activation: bool = True) -> Factor | None:
    """The factor of H, or None if there is none even with a lot of damping.

    Args:
        moments: H, float32 [K, K]; a feature that is always 0 counts as 1.
        damping: added to the diagonal, as a share of its mean.
        by_activation: take the columns in the order of falling H_kk, and not as they come.
    """
    diagonal = moments.diagonal()
    diagonal = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).to(torch.float64)
    order = torch.arange(len(moments), device=moments.device)
    if by_activation:
        order = torch.argsort(diagonal, descending=True, stable=True)
    # H = R R' with R upper triangular, the factor of H turned by 180 degrees; U is R^-1.
    turned = order.flip(0)
    for attempt in range(ATTEMPTS):
        added = damping * 10**attempt
        matrix = moments[turned[:, None], turned].to(torch.float64)
        matrix.diagonal().copy_(diagonal[turned] + added * diagonal.mean())
        failed = torch.empty((), dtype=torch.int32, device=moments.device)
        # In its own place, column by column as LAPACK has it, which would otherwise copy it: these
        # are the largest tensors of a calibration.
        matrix = matrix.mT
        torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
        if not failed:
            upper = _turned_inverse(matrix)
            del matrix
            if torch.isfinite(torch.stack(upper.aminmax())).all():
                return Factor(upper, order, added)
    return None


def _turned_inverse(lower: Tensor) -> Tensor:
    """float32 inverse of a float64 lower triangular matrix turned by 180 degrees, some columns at
    a time."""
    size = len(lower)
    found = torch.empty(size, size, dtype=torch.float32, device=lower.device)
    for start in range(0, size, COLUMNS):
        end = min(start + COLUMNS, size)
        unit = torch.zeros_like(lower[:, start:end])
        unit[start:].diagonal().fill_(1)
        torch.linalg.solve_triangular(lower, unit, upper=False, out=unit)
        found[:, size - end : size - start] = unit.flip(0, 1)
    return found


def corrected_codes(
    weight: Tensor, scales: Tensor, bits: int, group_size: int, found: Factor
) -> Tensor:
    """Codes of least error of the output, one column after the other.

    Args:
        weight: float32 [N, K].
        scales: float32 [N, K / group_size], on their grid.

    Returns:
        int8 [N, K].
    """
    lowest, highest = code_range(bits)
    order, upper = found.order, found.upper
    left = weight.t()[order].contiguous()  # [K, N]: a column of the weight is a row
    by_group = scales.t().contiguous()
    groups = (order // group_size).tolist()
    diagonal = upper.diagonal().tolist()
    codes = torch.empty(left.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:end])
        for at in range(start, end):
            scale = by_group[groups[at]]
            code = (left[at] / scale).round_().clamp_(lowest, highest)
            codes[order[at]] = code.to(torch.int8)
            error = torch.addcmul(left[at], code, scale, value=-1).div_(diagonal[at])
            errors[at - start] = error
            left[at + 1 : end].addr_(upper[at, at + 1 : end], error, alpha=-1)
        left[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    return codes.t().contiguous()


def compensated(weight: Tensor, moments: Tensor, cross: Tensor, share: float) -> Tensor:
    """The weight that makes up for what the quantized model feeds it, float32 [N, K].

    Args:
        weight: float32 [N, K].
        moments: H of the inputs X of the quantized model, [K, K].
        cross: C = (X_f - X)' X / n, [K, K].
        share: `a`; 0 leaves the weight as it is.
    """
    if not share:
        return weight
    matrix = moments.to(torch.float64)
    mean = float(matrix.diagonal().mean())
    if not mean > 0:
        return weight
    matrix.diagonal().add_(ASYMMETRIC_DAMPING * mean)
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return weight
    step = torch.cholesky_solve(cross.to(torch.float64).t(), lower).t()  # C H^-1
    return torch.addmm(weight, weight, step.to(torch.float32), alpha=share)

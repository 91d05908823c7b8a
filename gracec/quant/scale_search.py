"""Scales by grid search: of least squared error, plain or as the inputs of the linear weigh it.

    plain       sum_k            (w_k - w^_k)^2          the GRACE paper (arXiv 2601.22709)
    importance  sum_k  H_kk      (w_k - w^_k)^2          the diagonal of the inputs' second moments
    blocks      (w - w^)' H_gg (w - w^)                  the block of them that a group reads

Candidates lie between `lowest` and `highest` times max|w| / q_max. A scale may be negative where
`signed` says so: the codes reach one further below zero than above, and the sign decides which side
of the weights that is. Both signs of every candidate are tried, and the scales that put the largest
weight of either sign on the lowest code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gracec.errors import GracecError
from gracec.quant.codes import code_range, grouped, round_scale, row_chunks


def search_scales(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    scale_grid: str = "bf16",
    candidates: int = 64,
    lowest: float = 0.3,
    highest: float = 1.2,
    signed: bool = False,
    importance: Tensor | None = None,
    blocks: Tensor | None = None,
) -> Tensor:
    """Scales of least error per group, by grid search.

    Args:
        weight: [N, K], any float dtype; K must be a multiple of `group_size`.
        candidates: points of the grid between `lowest` and `highest` times max|w| / q_max.
        signed: whether a scale may be negative.
        importance: float32 [K], what an error of each input feature counts; not negative.
        blocks: float32 [K / group_size, group_size, group_size], symmetric and not indefinite: what
            the products of two errors of a group count; instead of `importance`.

    Returns:
        float32 [N, K / group_size] on the grid of `scale_grid`.

    Raises:
        GracecError: if the group does not divide K or the weight is not finite.
    """
    grouped(weight[:0], group_size)
    factors = torch.linspace(lowest, highest, candidates, device=weight.device)
    shape = len(weight), weight.shape[1] // group_size
    scales = torch.empty(shape, dtype=torch.float32, device=weight.device)
    if blocks is not None:
        for group, block in enumerate(blocks):
            columns = weight.detach()[:, group * group_size :][:, :group_size]
            root = _root(block)
            for part, target in row_chunks(columns, scales[:, group : group + 1]):
                found = part.to(torch.float32).contiguous()
                best = _best_scales(found, factors, bits, scale_grid, signed, root=root)
                target.copy_(best.unsqueeze(1))
        return scales
    weights = None if importance is None else importance.clamp_min(0).sqrt().view(-1, group_size)
    for part, target in row_chunks(weight.detach(), scales):
        groups = part.to(torch.float32).reshape(-1, group_size)
        each = None if weights is None else weights.repeat(len(part), 1)
        best = _best_scales(groups, factors, bits, scale_grid, signed, each=each)
        target.copy_(best.reshape(target.shape))
    return scales


def _best_scales(
    groups: Tensor,
    factors: Tensor,
    bits: int,
    scale_grid: str,
    signed: bool,
    *,
    each: Tensor | None = None,
    root: Tensor | None = None,
) -> Tensor:
    """[G] scales of least error for groups [G, group_size], float32.

    Args:
        each: [G, group_size], what each error is multiplied with before it is squared.
        root: [group_size, group_size], what the errors of a group are multiplied with instead.
    """
    q_min, q_max = code_range(bits)
    largest = groups.abs().amax(-1)
    if not torch.isfinite(largest).all():
        raise GracecError("the weight holds NaN or infinity", fix="check the checkpoint")
    scales = factors.unsqueeze(1) * (largest / q_max)  # [candidates, G]
    if signed:
        scales = torch.cat([scales, (largest / -q_min).unsqueeze(0)])
    scales = round_scale(scales, scale_grid)
    errors = _errors(groups, scales, (q_min, q_max), each, root)
    if signed:  # w / -s is -(w / s): the same search with the ends of the codes exchanged
        errors = torch.cat([errors, _errors(groups, scales, (-q_max, -q_min), each, root)])
        scales = torch.cat([scales, -scales])
    return scales.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def _errors(
    groups: Tensor,
    scales: Tensor,
    code_range: tuple[int, int],
    each: Tensor | None,
    root: Tensor | None,
) -> Tensor:
    """[candidates, G]: the root of the error of every positive scale [candidates, G]."""
    inverse = scales.reciprocal()
    errors = torch.empty_like(scales)
    # |q - w / s| * s in two buffers that stay in the cache: this loop is all of the time.
    ratio, code = torch.empty_like(groups), torch.empty_like(groups)
    for candidate in range(len(scales)):
        torch.mul(groups, inverse[candidate].unsqueeze(1), out=ratio)
        torch.round(ratio, out=code).clamp_(*code_range).sub_(ratio)
        if each is not None:
            code.mul_(each)
        if root is not None:
            torch.matmul(code, root, out=ratio)
        torch.linalg.vector_norm(code if root is None else ratio, dim=1, out=errors[candidate])
    return errors.mul_(scales)


def _root(block: Tensor) -> Tensor:
    """R with R R' = block, which may be singular."""
    values, vectors = torch.linalg.eigh(block.to(torch.float64))
    root: Tensor = vectors * values.clamp_min(0).sqrt()
    return root.to(torch.float32)

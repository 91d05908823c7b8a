"""Second moments of the inputs of a linear, H = X'X / n: what an error of its weight costs.

    |X (W - W^)'|^2 / n  =  tr (W - W^) H (W - W^)'

A weight may consist of several matrices, each with inputs of its own: one for each routed expert,
one for each group of a convolution. Sums are float32 and added up one sample after the other, so
that they are the same every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gracec.errors import GracecError

COLUMNS = 512
"""Of X'X that are computed in one go."""
DEAD = 1e-6
"""Of the mean of H's diagonal: the least that a feature counts in a search of scales."""


class SecondMoments:
    """Sums of products of rows [n, K], of each of P matrices.

    Args:
        features: K.
        parts: P.
        full: all of X'X [P, K, K]; otherwise its diagonal alone [P, K].
    """

    def __init__(
        self, features: int, parts: int = 1, *, full: bool, device: torch.device | None = None
    ) -> None:
        shape = (parts, features, features) if full else (parts, features)
        self.full = full
        self.sums = torch.zeros(shape, dtype=torch.float32, device=device)
        self.counts = [0] * parts

    def add(self, part: int, rows: Tensor) -> None:
        """Rows [n, K], any float dtype, of one matrix."""
        rows = rows.detach().to(torch.float32)
        if self.full:  # what is below the diagonal is what is above it
            sums = self.sums[part]
            for start in range(0, len(sums), COLUMNS):
                end = start + COLUMNS
                sums[start:end, start:].addmm_(rows[:, start:end].t(), rows[:, start:])
        else:
            self.sums[part] += rows.square().sum(0)
        self.counts[part] += len(rows)

    @property
    def seen(self) -> bool:
        """Whether there was any row."""
        return any(self.counts)

    @property
    def unseen_parts(self) -> int:
        """How many matrices no row was for."""
        return self.counts.count(0)

    def means(self, *, inplace: bool = False) -> Tensor:
        """H of each matrix, [P, K, K] or [P, K]; that of all rows where a matrix saw none.

        Args:
            inplace: the sums become the means, where there is hardly room for both; nothing can be
                added or asked afterwards.

        Raises:
            GracecError: if there was no row at all, or a sum is not finite.
        """
        total = sum(self.counts)
        if not total:
            raise GracecError("no input was observed", fix="give calibration data")
        if not torch.isfinite(self.sums).all():
            raise GracecError("an input holds NaN or infinity", fix="check the checkpoint")
        found = self.sums if inplace else self.sums.clone()
        overall = self.sums.sum(0) / total if 0 in self.counts else None
        for part, count in enumerate(self.counts):
            found[part] = found[part].div_(count) if overall is None or count else overall
            for start in range(COLUMNS, len(found[part]), COLUMNS) if self.full else ():
                end = start + COLUMNS
                found[part, start:end, :start] = found[part, :start, start:end].t()
        return found


def importance(moments: Tensor) -> Tensor:
    """What an error of each feature counts, [..., K], from diagonals [..., K] of H.

    A feature that is always 0 counts a little, so that its weights decide where nothing else does.
    """
    mean = moments.mean(-1, keepdim=True)
    least = torch.where(mean > 0, mean * DEAD, torch.ones_like(mean))
    return torch.maximum(moments, least)


def blocks_of(moments: Tensor, group_size: int) -> Tensor:
    """[K / group_size, group_size, group_size]: the block of H [K, K] that each group reads."""
    starts = range(0, len(moments), group_size)
    found = torch.stack([moments[s : s + group_size, s : s + group_size] for s in starts])
    diagonals = importance(moments.diagonal()).view(-1, group_size)
    found.diagonal(dim1=1, dim2=2).copy_(diagonals)
    return found

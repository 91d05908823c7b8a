"""Weighted means that are kept as two sums, so that parts of a batch can be added.

    term = total / weight        total = Σ_i w_i x_i,   weight = Σ_i w_i

Over micro-batches and ranks totals add and weights add; the quotient of the sums is the term of the
whole batch, while the mean of the quotients is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One term of a loss over some positions or images.

    Attributes:
        total: scalar, Σ w_i x_i, with a graph; float32, or float64 for float64 inputs.
        weight: scalar of the same dtype, Σ w_i, without a gradient: the normaliser of this part.
    """

    total: Tensor
    weight: Tensor

    def mean(self) -> Tensor:
        """total / weight; where the weight is 0 a zero with a graph."""
        return divide(self.total, self.weight)


def divide(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight by element; a total without weight is divided by one, and so stays zero."""
    return total / torch.where(weight > 0, weight, torch.ones_like(weight))


def zero_with_graph(x: Tensor) -> Tensor:
    """A scalar zero that depends on `x`: backward gives zeros, whatever `x` holds."""
    return x.flatten()[:0].sum()

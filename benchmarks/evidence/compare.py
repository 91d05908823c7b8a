"""Accuracies and paired differences of runs, with standard errors that count concepts and seeds.

Two questions about the same concept are not independent, and neither are two questions that were
answered by the same training. So for runs of S seeds, over n questions about C concepts,

    x_q  = difference in right answers to question q, averaged over the seeds
    V_c  = C / (C - 1) · Σ_c (Σ_{q in c} (x_q - mean x))² / n²        concepts are drawn anew
    V_s  = variance over the seeds of the mean difference / S         the training is repeated
    SE   = √(V_c + V_s)

which is on the safe side: V_c already holds a part of what seeds change. An accuracy is the
difference from nothing. With one seed V_s is unknown and left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Z = 1.96
"""Half of a 95 % interval, in standard errors."""


class Estimate(NamedTuple):
    """A share or a difference of shares, its standard error, and the seeds behind it."""

    value: float
    error: float
    seeds: int

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - Z * self.error

    @property
    def high(self) -> float:
        return self.value + Z * self.error


def estimate(runs: Sequence[Tensor], clusters: Tensor, baseline: Sequence[Tensor] = ()) -> Estimate:
    """Mean accuracy of some runs, less that of a baseline.

    Args:
        runs: right answers of each seed, bool [n].
        clusters: int64 [n], the number of the concept that each question is about.
        baseline: nothing; one model, bool [n]; or as many seeds as there are runs, in their order.

    Raises:
        ValueError: if the seeds do not pair.
    """
    if len(baseline) not in (0, 1, len(runs)):
        raise ValueError(f"{len(runs)} seeds do not pair with {len(baseline)}")
    hits = torch.stack([run.double() for run in runs])
    if baseline:
        hits = hits - torch.stack([run.double() for run in baseline])
    by_question = hits.mean(0)
    deviations = by_question - by_question.mean()
    count = int(clusters.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, clusters, deviations)
    occupied = len(clusters.unique())
    variance = sums.square().sum().item() / len(clusters) ** 2 * occupied / max(occupied - 1, 1)
    if len(runs) > 1:
        variance += hits.mean(1).var().item() / len(runs)
    return Estimate(by_question.mean().item(), math.sqrt(variance), len(runs))


def numbered(names: Sequence[str]) -> Tensor:
    """Clusters by number, int64 [n]."""
    known = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([known[name] for name in names])

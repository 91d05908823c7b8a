"""From rounds of measurements to medians, ratios with their intervals, and verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Round = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Variant -> threads -> what a worker measured."""
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A median, and two order statistics that hold the true one with the stated probability."""

    median: float
    low: float
    high: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def interval(values: Sequence[float]) -> Interval:
    """The narrowest such interval of 95 %, or the whole range where the values are too few.

    No distribution is assumed: the true median lies below the k-th smallest of n values with the
    probability that fewer than k of n fair coins show heads, and above the k-th largest with the
    same.
    """
    ordered, n = sorted(values), len(values)
    best, tail = 0, 0.5**n
    covered = 1 - 2 * tail
    for k in range(1, (n + 1) // 2):
        tail += math.comb(n, k) * 0.5**n
        if 1 - 2 * tail < CONFIDENCE:
            break
        best, covered = k, 1 - 2 * tail
    return Interval(statistics.median(ordered), ordered[best], ordered[-1 - best], covered)


def figures(rounds: Sequence[Round], name: str, threads: str, metric: str) -> list[Any]:
    """A figure in each round that has the variant."""
    return [one[name][threads][metric] for one in rounds if threads in one.get(name, {})]


def best_threads(rounds: Sequence[Round], name: str, metric: str) -> str:
    """The number of threads with the largest median."""
    tried = dict.fromkeys(threads for one in rounds for threads in one.get(name, {}))
    return max(tried, key=lambda t: statistics.median(figures(rounds, name, t, metric)))


def ratios(rounds: Sequence[Round], name: str, reference: str, metric: str) -> list[float]:
    """Variant over reference in each round that has both, each at its best number of threads."""
    own, other = (best_threads(rounds, one, metric) for one in (name, reference))
    return [
        one[name][own][metric] / one[reference][other][metric]
        for one in rounds
        if own in one.get(name, {}) and other in one.get(reference, {})
    ]


def verdict(found: Interval, target: float) -> str:
    """Whether a target is reached, missed, or the rounds do not say."""
    if found.confidence < CONFIDENCE:
        return "inconclusive"
    if found.low >= target:
        return "reached"
    return "missed" if found.high < target else "inconclusive"


def same_tokens(found: Sequence[int], expected: Sequence[int]) -> int:
    """Tokens until the two differ."""
    pairs = zip(found, expected, strict=True)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), len(expected))

"""Means with their standard errors, and the difference of two models on the same items."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rwkv_cli.engine.scoring import Mean


@dataclass(frozen=True)
class Paired:
    """The difference of two models on the same items, the first minus the other."""

    other: float
    """The other model's mean."""
    difference: float
    stderr: float
    """Standard error of the difference. NaN for fewer than two items."""
    p: float
    """How often a difference this large or larger comes by chance between equal models. NaN if it cannot be said."""


def mean_of(values: Sequence[float]) -> Mean:
    """Return the mean of values with its standard error. That of a share is √(p (1 − p) / (n − 1))."""
    mean = Mean()
    mean.add(np.array(values, np.float64))
    return mean


def paired(ours: Sequence[float], others: Sequence[float]) -> Paired:
    """Compare values of the same items. Shares, whose values are 0 and 1, take McNemar's test, others Student's."""
    difference = mean_of(np.subtract(ours, others).tolist())
    if set(ours) | set(others) <= {0.0, 1.0}:
        won = sum(a > b for a, b in zip(ours, others, strict=True))
        lost = sum(a < b for a, b in zip(ours, others, strict=True))
        p = mcnemar(won, lost)
    else:
        p = student(difference)
    return Paired(mean_of(others).mean, difference.mean, difference.stderr, p)


def mcnemar(won: int, lost: int) -> float:
    """McNemar's exact test: items that one model alone has right are tosses of a fair coin if the models are equal."""
    n = won + lost
    ways = tail = 1  # to have one right k times, and up to k times
    for k in range(min(won, lost)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << n))


def student(difference: Mean) -> float:
    """Student's test of a mean of differences against 0, on both sides. NaN for fewer than two of them.

    The distribution is a finite sum for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    n = difference.count - 1
    if n < 1:
        return math.nan
    if difference.stderr == 0:
        return 1.0 if difference.mean == 0 else 0.0
    angle = math.atan(abs(difference.mean) / difference.stderr / math.sqrt(n))
    sin, cos = math.sin(angle), math.cos(angle)
    term = cos if n % 2 else 1.0
    total = 0.0
    for k in range(2 + n % 2, n + 1, 2):
        total += term
        term *= cos * cos * (k - 1) / k
    inside = (angle + sin * total) * 2 / math.pi if n % 2 else sin * total
    return max(0.0, 1.0 - inside)

"""Racing: when to give up a candidate before it was scored on all examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

__all__ = ["is_hopeless", "student_t_quantile"]

_MIN_BATCHES = 6


def is_hopeless(
    candidate: Sequence[float],
    incumbent: Sequence[float],
    num_examples: Sequence[int],
    error_rate: float = 1e-4,
) -> bool:
    """Whether a candidate is behind the incumbent by more than chance explains.

    Both are scored on the same batches in the same order, which holds the examples at random (not
    class by class), so that only their differences matter:
    the one-sided t bound on the mean of what the batches differ by, corrected for the examples that
    are left (a finite population). Maron and Moore 1994 ("Hoeffding Races") race on bounds for each
    candidate by itself, which takes many times the examples.

    Args:
        candidate: Its running score after each batch so far, higher is better: at least one.
        incumbent: The running score of the best complete one, after *all* batches.
        num_examples: Examples seen after each of all batches.
        error_rate: Probability that a look gives up a candidate which would have won, in (0, .5).

    Returns:
        False with fewer than 6 batches, too few to know their spread.

    Examples:
        >>> sizes = [100 * n for n in range(1, 11)]
        >>> incumbent = [0.90, 0.91, 0.90, 0.90, 0.91, 0.90, 0.90, 0.90, 0.90, 0.90]
        >>> is_hopeless([0.50, 0.55, 0.53, 0.54, 0.55, 0.54], incumbent, sizes)
        True
        >>> is_hopeless([0.88, 0.91, 0.89, 0.89, 0.90, 0.90], incumbent, sizes)
        False
    """
    seen = len(candidate)
    if seen < _MIN_BATCHES or seen >= len(num_examples):
        return False
    behind = [theirs - ours for ours, theirs in zip(candidate, incumbent, strict=False)]
    per_batch, weights = _increments(behind, num_examples[:seen])
    total = num_examples[seen - 1]
    mean = behind[-1]
    variance = sum(w * (d - mean) ** 2 for d, w in zip(per_batch, weights, strict=True)) / total
    variance *= seen / (seen - 1)
    left = 1 - total / num_examples[-1]
    error = math.sqrt(variance / seen * left)
    return mean > student_t_quantile(1 - error_rate, seen - 1) * error


def student_t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution, by the expansion around the normal one.

    Args:
        probability: In (.5, 1).
        degrees: Of freedom, at least 5, for which it is within 6 % at 1 - 1e-4.

    Source: Abramowitz and Stegun 1964, formula 26.7.5.

    Examples:
        >>> round(student_t_quantile(0.975, 10), 2)
        2.23
    """
    z = NormalDist().inv_cdf(probability)
    n = degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    )


def _increments(running: Sequence[float], sizes: Sequence[int]) -> tuple[list[float], list[int]]:
    """What each batch by itself came to, and its examples, from running means."""
    values, weights = [], []
    before, seen = 0.0, 0
    for mean, size in zip(running, sizes, strict=True):
        weight = size - seen
        values.append((mean * size - before * seen) / weight)
        weights.append(weight)
        before, seen = mean, size
    return values, weights

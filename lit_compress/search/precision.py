"""Decide whether a lower precision scores candidates faster and ranks them alike."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

__all__ = ["lower_precision_pays", "ranks_alike"]

_GAIN = 0.9  # less is lost in the noise of timing
_TOLERANCE = 0.1


def lower_precision_pays(
    full_scores: Sequence[float],
    lower_scores: Sequence[float],
    full_seconds: float,
    lower_seconds: float,
) -> bool:
    """Whether to search in the lower precision.

    Args:
        full_scores: Of a few candidates of different worth, in full precision; at least one.
        lower_scores: Of the same ones, in the lower precision.
        full_seconds: What the former took.
        lower_seconds: What the latter took.

    Returns:
        True where the lower precision takes less than nine tenths of the time, and ranks alike.
    """
    return lower_seconds < _GAIN * full_seconds and ranks_alike(full_scores, lower_scores)


def ranks_alike(full: Sequence[float], lower: Sequence[float]) -> bool:
    """Whether scores in a lower precision tell candidates apart as those in full precision do.

    Args:
        full: Scores in full precision, at least one.
        lower: Scores of the same candidates in the lower one.

    Returns:
        True where no two change places, and no score is off by more than a tenth of the distance
        between the best and the worst; False where a score is NaN.

    Examples:
        >>> ranks_alike([0.90, 0.75, 0.40], [0.89, 0.76, 0.41])
        True
        >>> ranks_alike([0.90, 0.89, 0.40], [0.88, 0.89, 0.40])
        False
    """
    spread = max(full) - min(full)
    near = all(abs(a - b) <= _TOLERANCE * spread for a, b in zip(full, lower, strict=True))
    pairs = itertools.combinations(zip(full, lower, strict=True), 2)
    return near and all((a - b) * (c - d) >= 0 for (a, c), (b, d) in pairs)

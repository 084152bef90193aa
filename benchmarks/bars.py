"""Bars on time: the median of ratios of the same round, its confidence interval, and a verdict.

A machine's speed drifts, and one machine is not another, so no bar is on seconds. What is compared
runs in turns, each round gives one ratio, and the median over the rounds has an interval. A bar is
missed only if the whole interval is beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

CONFIDENCE = 0.95
Verdict = Literal["holds", "not decided", "missed"]


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Confidence interval of the median of what the values are drawn from.

    Between the k-th smallest and the k-th largest of n values lies the median with probability
    ``1 - 2 P(B <= k - 1)``, B binomial with n draws of 1/2, whatever the distribution (David and
    Nagaraja, Order Statistics, 3rd ed. 2003, section 7.1). k is the largest with which that is at
    least ``confidence``; for fewer than 6 values and 95 % there is none, and nothing is excluded.

    Args:
        values: Independent, at least one.
        confidence: In (0, 1).

    Returns:
        Lower and upper end; ``(-inf, inf)`` where there are too few values.

    Examples:
        >>> median_interval([5, 1, 4, 2, 3, 6])
        (1, 6)
        >>> median_interval([1, 2, 3, 4, 5])
        (-inf, inf)
        >>> median_interval(range(101))
        (40, 60)
    """
    if not values:
        raise ValueError("values is empty; expected at least one.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a number in (0, 1).")
    ordered, n = sorted(values), len(values)
    k, below = 0, 0  # below: ways of n draws to have at most k - 1 successes
    while k < (n + 1) // 2:
        below += math.comb(n, k)
        if 1 - 2 * below / 2**n < confidence:
            break
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else (-math.inf, math.inf)


@dataclass(frozen=True)
class Ratio:
    """How many times as long one thing takes as another.

    Attributes:
        estimate: Median over the rounds.
        low: Lower end of its interval.
        high: Upper end.
        rounds: How many there were; 0 where a file of an earlier run does not say.
    """

    estimate: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, numerator: Sequence[float], denominator: Sequence[float]) -> Ratio:
        """Of times that were taken in the same rounds, one of each a round."""
        return cls.of_rounds([a / b for a, b in zip(numerator, denominator, strict=True)])

    @classmethod
    def of_rounds(cls, ratios: Sequence[float]) -> Ratio:
        """Of the ratio of each round."""
        return cls(median(ratios), *median_interval(ratios), len(ratios))

    def as_json(self) -> dict[str, Any]:
        """Plain data; JSON has no infinity, so an open end is ``None``."""
        low, high = (round(v, 5) if math.isfinite(v) else None for v in (self.low, self.high))
        return {
            "ratio": round(self.estimate, 5),
            "low": low,
            "high": high,
            "rounds": self.rounds,
        }

    @classmethod
    def from_json(cls, found: float | Mapping[str, Any]) -> Ratio:
        """What :meth:`as_json` wrote, or a plain number of a file from before there were intervals.

        A plain number is taken as it is: with an interval of no width.
        """
        if not isinstance(found, Mapping):
            return cls(found, found, found, 0)
        low = -math.inf if found["low"] is None else found["low"]
        high = math.inf if found["high"] is None else found["high"]
        return cls(found["ratio"], low, high, found["rounds"])

    def __str__(self) -> str:
        if not self.rounds:
            return f"{self.estimate:.3f}"
        return f"{self.estimate:.3f} ({self.low:.3f}–{self.high:.3f})"


@dataclass(frozen=True)
class TimeBar:
    """A ratio of times that must not be larger than a limit.

    Attributes:
        what: What is compared.
        limit: The largest ratio that is allowed.
        ratio: What was measured; ``None`` if there was nothing to compare.
        reason: Why there is no ratio.
    """

    what: str
    limit: float
    ratio: Ratio | None
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """``"missed"`` and ``"holds"`` only if the whole interval is on that side of the limit."""
        if self.ratio is None:
            return "not decided"
        if self.ratio.low > self.limit:
            return "missed"
        return "holds" if self.ratio.high <= self.limit else "not decided"

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.what}: not decided ({self.reason})"
        found = self.ratio
        numbers = (
            f"ratio {found.estimate:.4f}, interval {found.low:.4f} to {found.high:.4f}, "
            f"bar {self.limit:g}"
        )
        noisy = "; the machine is too noisy" if self.verdict == "not decided" else ""
        return f"{self.what}: {self.verdict} ({numbers}{noisy})"


def missed(bars: Iterable[TimeBar]) -> list[str]:
    """The bars that are missed, one line each."""
    return [str(bar) for bar in bars if bar.verdict == "missed"]

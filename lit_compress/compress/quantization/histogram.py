"""Choose the range of a grid from a histogram: three methods.

A histogram here is a vector of counts of equal bins between two ends; values count as spread evenly
over their bin. All of it is computed on the CPU in float64, whatever the counts are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from lit_compress.compress.quantization.affine import Grid, affine_parameters

__all__ = [
    "check_finite",
    "check_grid",
    "check_percentile",
    "entropy_range",
    "mse_range",
    "percentile_range",
    "squared_error",
]

_Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # lows, highs -> what each range costs

# Ends are tried at these parts of the outermost value, then more closely around the best; below
# 1/1024 an end lies within the first bin or two.
_COARSE = 2.0 ** (-torch.arange(81, dtype=torch.float64) / 8)
_FINE = 2.0 ** (torch.arange(-8, 9, dtype=torch.float64) / 64)
_MAX_ROUNDS = 4
_SKEW = 0.01  # Lee 2001, "On the Effectiveness of the Skew Divergence": alpha = .99


def mse_range(counts: Tensor, low: float, high: float, grid: Grid) -> tuple[float, float]:
    """The range whose rounding and clipping costs the least expected squared error.

    The ends are searched between zero and the outermost bins that hold a value: together for a
    signed grid, which covers both sides alike; each in turn, until neither moves, for an unsigned
    one. No result is worse than the whole histogram.

    Args:
        counts: Values in each bin, shape ``[bins]``.
        low: Lower end of the first bin.
        high: Upper end of the last bin.
        grid: The integers.

    Returns:
        The ends of the range, ``low <= 0 <= high``.

    Raises:
        ValueError: If ``counts`` has another shape, holds nothing or negative numbers, or the ends
            are not finite and in order.
    """
    histogram = _Histogram(counts, low, high)
    return _search(
        lambda lows, highs: histogram.squared_error(lows, highs, grid), *histogram.ends, grid
    )


def entropy_range(counts: Tensor, low: float, high: float, grid: Grid) -> tuple[float, float]:
    """The range that loses the least information (Migacz 2017, "8-bit Inference with TensorRT").

    The distribution clipped to the range is compared, by the Kullback-Leibler divergence, with
    that of its rounded values: the unclipped counts, those of the bins that share an integer made
    equal. We differ from the talk in three points. Where it widens a symmetric range bin by bin, we
    search as :func:`mse_range` does, so that both ends of an unsigned grid are found. So that it is
    finite, 1 % of the clipped distribution is mixed into the rounded one. And zero being always
    exact, a bin full of zeros (behind a ReLU) counts like its neighbour.

    Args:
        counts: As in :func:`mse_range`.
        low: Likewise.
        high: Likewise.
        grid: Likewise.

    Returns:
        The ends of the range, ``low <= 0 <= high``.

    Raises:
        ValueError: As :func:`mse_range`.
    """
    histogram = _Histogram(counts, low, high).without_spike_at_zero()
    return _search(
        lambda lows, highs: histogram.divergence(lows, highs, grid), *histogram.ends, grid
    )


def percentile_range(
    counts: Tensor, low: float, high: float, percentile: float
) -> tuple[float, float]:
    """The range that leaves at most ``100 - percentile`` percent of the values out on either side.

    Args:
        counts: As in :func:`mse_range`.
        low: Likewise.
        high: Likewise.
        percentile: Above 50, up to 100, which keeps every bin that holds a value.

    Returns:
        The ends of the range; both may lie on the same side of zero.

    Raises:
        ValueError: If ``percentile`` is outside of (50, 100]; or as :func:`mse_range`.
    """
    check_percentile(percentile)
    histogram = _Histogram(counts, low, high)
    below = _bins_up_to(histogram.counts.flip(0), percentile / 100)
    above = _bins_up_to(histogram.counts, percentile / 100)
    first, last = float(histogram.edges[0]), float(histogram.edges[-1])
    return last - below * histogram.width, first + above * histogram.width


def squared_error(
    counts: Tensor, low: float, high: float, grid: Grid, range_low: Tensor, range_high: Tensor
) -> Tensor:
    """Mean squared error of the values of a histogram, rounded to ``grid`` over each range.

    Args:
        counts: As in :func:`mse_range`.
        low: Likewise.
        high: Likewise.
        grid: Likewise.
        range_low: Lower ends, shape ``[ranges]``.
        range_high: Upper ends, shape ``[ranges]``.

    Returns:
        float64, shape ``[ranges]``.

    Raises:
        ValueError: As :func:`mse_range`.
    """
    return _Histogram(counts, low, high).squared_error(range_low, range_high, grid)


def check_percentile(percentile: float) -> None:
    """Refuse what is no number in (50, 100].

    Raises:
        ValueError: If it is not.
    """
    is_number = isinstance(percentile, (int, float)) and not isinstance(percentile, bool)
    if not is_number or not 50 < percentile <= 100:
        raise ValueError(
            f"percentile is {percentile!r}; expected a number above 50 and up to 100, as in 99.99."
        )


def check_grid(grid: Grid) -> None:
    """Refuse what is no grid.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(grid, Grid):
        raise ValueError(f"grid is {grid!r}; expected a Grid, as in Grid(8, signed=False).")


def check_finite(low: float, high: float) -> None:
    """Refuse values of which an end is NaN or infinite.

    Raises:
        ValueError: If one is.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"values from {low} to {high} came, which are NaN or infinite. Look at the input data "
            "and at the loss."
        )


class _Histogram:
    """Counts and edges of the bins from the first to the last that holds a value."""

    def __init__(self, counts: Tensor, low: float, high: float) -> None:
        if counts.dim() != 1:
            raise ValueError(
                f"counts has the shape {list(counts.shape)}; expected [bins], a number each."
            )
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(
                f"the histogram goes from {low} to {high}; expected finite ends, low below high."
            )
        counts = counts.detach().cpu().double()
        if bool((counts < 0).any()) or not 0 < float(counts.sum()) < math.inf:
            raise ValueError(
                f"counts sum to {float(counts.sum())} with a least one of {float(counts.min())}; "
                "expected values to have been counted, and no negative numbers."
            )
        self.width = (high - low) / len(counts)
        filled = torch.nonzero(counts).flatten()
        first, last = int(filled[0]), int(filled[-1])
        self.counts = counts[first : last + 1]
        self.edges = low + self.width * torch.arange(first, last + 2, dtype=torch.float64)

    @property
    def ends(self) -> tuple[float, float]:
        """The widest range worth trying; zero is always in it, and float32 can hold it."""
        largest = torch.finfo(torch.float32).max
        first, last = float(self.edges[0]), float(self.edges[-1])
        return max(min(first, 0.0), -largest), min(max(last, 0.0), largest)

    def without_spike_at_zero(self) -> _Histogram:
        """The same with no more values in the bin above zero than in the next one."""
        at_zero = int((self.edges <= 0).sum()) - 1
        if 0 <= at_zero < len(self.counts) - 1 and self.counts[at_zero + 1] > 0:
            self.counts = self.counts.clone()
            self.counts[at_zero] = torch.minimum(self.counts[at_zero], self.counts[at_zero + 1])
        return self

    def squared_error(self, lows: Tensor, highs: Tensor, grid: Grid) -> Tensor:
        """Exact for values spread evenly over their bins; shape ``[ranges]``."""
        scale, zero_point = (p[:, None].double() for p in affine_parameters(lows, highs, grid))
        rounded = torch.round(self.edges / scale)
        rounded.clamp_(grid.low - zero_point, grid.high - zero_point)
        # An antiderivative of (x - rounded * scale)^2: each whole step adds scale^3 / 12.
        area = (self.edges - rounded * scale).pow_(3).div_(3)
        area.addcmul_(rounded, scale**3, value=1 / 12)
        return area.diff(dim=1) @ self.counts / (self.width * self.counts.sum())

    def divergence(self, lows: Tensor, highs: Tensor, grid: Grid) -> Tensor:
        """Kullback-Leibler divergence of rounded from clipped values; shape ``[ranges]``."""
        scale, zero_point = (p[:, None].double() for p in affine_parameters(lows, highs, grid))
        middles = (self.edges[1:] + self.edges[:-1]) / 2
        integers = torch.round(middles / scale) + zero_point
        inside = (integers >= grid.low) & (integers <= grid.high)
        levels = (integers.clamp_(grid.low, grid.high) - grid.low).long()
        kept = self.counts * inside
        clipped = self._with_outliers_at_the_ends(kept, inside)
        held = (clipped > 0).double()
        per_level = kept.new_zeros(len(kept), grid.high - grid.low + 1)
        mass = per_level.scatter_add(1, levels, kept)
        bins = per_level.scatter_add(1, levels, held)
        rounded = (mass / bins.clamp_min(1)).gather(1, levels) * held
        rounded /= rounded.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        clipped = clipped / clipped.sum(1, keepdim=True)
        # Where values are clipped to and none is rounded to, the divergence would be infinite.
        rounded = (1 - _SKEW) * rounded + _SKEW * clipped
        divergence = (torch.xlogy(clipped, clipped) - torch.xlogy(clipped, rounded)).sum(1)
        # With steps finer than bins nothing is rounded, and there is nothing to compare.
        return divergence.where(scale[:, 0] >= self.width, math.inf)

    def _with_outliers_at_the_ends(self, kept: Tensor, inside: Tensor) -> Tensor:
        """Counts with those left out added to the first and the last bin of each range."""
        last = len(self.counts) - 1
        first_in = inside.double().argmax(1, keepdim=True)
        last_in = last - inside.flip(1).double().argmax(1, keepdim=True)
        places = torch.arange(last + 1)
        below = (self.counts * (places < first_in)).sum(1, keepdim=True)
        above = (self.counts * (places > last_in)).sum(1, keepdim=True)
        return kept.scatter_add(1, first_in, below).scatter_add(1, last_in, above)


def _search(loss: _Loss, low: float, high: float, grid: Grid) -> tuple[float, float]:
    """Ends between zero and the given ones at which the loss is least."""
    if grid.signed:
        bound = torch.tensor(max(-low, high), dtype=torch.float64)
        part, _ = _least(lambda parts: loss(-bound * parts, bound * parts), _COARSE)
        return max(low, -float(bound) * part), min(high, float(bound) * part)
    ends, parts, best = (low, high), [1.0, 1.0], math.inf
    for _ in range(_MAX_ROUNDS):
        before = best
        for side in (1, 0):
            other = ends[1 - side] * parts[1 - side]
            if ends[side] == 0:
                continue

            def along(tried: Tensor, side: int = side, other: float = other) -> Tensor:
                fixed = torch.full_like(tried, other)
                moved = tried * ends[side]
                return loss(fixed, moved) if side else loss(moved, fixed)

            one_sided = torch.zeros(1 if other else 0, dtype=torch.float64)
            part, least = _least(along, torch.cat([_COARSE, one_sided]))
            if least < best:
                parts[side], best = part, least
        if not best < before:
            break
    return low * parts[0], high * parts[1]


def _least(loss_at: Callable[[Tensor], Tensor], coarse: Tensor) -> tuple[float, float]:
    """The part, of the coarse ones and the fine ones around the best, with the least loss."""
    losses = loss_at(coarse)
    best = coarse[losses.argmin()]
    fine = torch.cat([best[None], (best * _FINE).clamp_max(1)])
    losses = loss_at(fine)
    return float(fine[losses.argmin()]), float(losses.min())


def _bins_up_to(counts: Tensor, share: float) -> float:
    """How many bins, from the first on, hold that share of the values."""
    total = counts.cumsum(0)
    wanted = share * float(total[-1])
    bin_ = min(int(torch.searchsorted(total, wanted)), len(counts) - 1)
    return bin_ + 1 - float((total[bin_] - wanted) / counts[bin_])

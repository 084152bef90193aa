"""Range observers for activations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_compress.compress.quantization.affine import Grid
from lit_compress.compress.quantization.histogram import (
    check_finite,
    check_grid,
    check_percentile,
    entropy_range,
    mse_range,
    percentile_range,
)
from lit_compress.compress.quantization.weight_scales import mse_weight_scale

__all__ = [
    "HistogramObjective",
    "HistogramRange",
    "MinMaxRange",
    "MovingAverageRange",
    "RangeKind",
    "RangeObserver",
    "mse_weight_scale",
    "range_observer",
]

RangeKind = Literal["minmax", "moving_average", "histogram", "percentile", "mse"]
HistogramObjective = Literal["entropy", "percentile", "mse"]

NUM_BINS = 2048
_LEAST_EXPONENT = -126  # of a bin's width, so that dividing by it stays finite in float32
_VALUES_AT_ONCE = 2**17


class RangeObserver(nn.Module, ABC):
    """Sees tensors and says from where to where their values reach.

    All it knows is in buffers of fixed shape, so a state_dict carries it exactly into a fresh
    observer. It moves to the device of what it sees, and stays in float32 whatever dtype the
    network around it is cast to.

    Attributes:
        num_batches: Tensors seen, empty ones left out; int64 scalar.
    """

    num_batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))

    @property
    def seen(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.num_batches > 0)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take the values of a tensor into account.

        Args:
            x: Real numbers, any shape and floating dtype; an empty tensor changes nothing.

        Raises:
            ValueError: If ``x`` holds no floating numbers, or NaN or infinity. On an accelerator
                only :class:`HistogramRange` looks; so that no step waits for the device, the
                others' range becomes NaN or infinite, which ``affine_parameters`` refuses.
        """
        if not x.is_floating_point():
            raise ValueError(
                f"a tensor of {x.dtype} came to be observed; expected floating numbers. Quantize "
                "only tensors of real numbers."
            )
        if x.numel() == 0:
            return
        if self.num_batches.device != x.device:
            self.to(x.device)
        low, high = (end.float() for end in torch.aminmax(x))
        if x.device.type == "cpu":
            check_finite(float(low), float(high))
        self._take(x, low, high)
        self.num_batches += 1

    def range(self) -> tuple[Tensor, Tensor]:
        """Low and high end, scalars in float32.

        Raises:
            ValueError: If nothing was seen.
        """
        if not self.seen:
            raise ValueError(
                "no values were observed; run at least one batch through the network before its "
                "ranges are asked for."
            )
        return self._range()

    @abstractmethod
    def _take(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Update the buffers in place; ``x`` is not empty, ``low`` and ``high`` are its ends."""

    @abstractmethod
    def _range(self) -> tuple[Tensor, Tensor]:
        """The range, something having been seen."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


class MinMaxRange(RangeObserver):
    """From the least to the largest value ever seen.

    Attributes:
        low: The least; float32 scalar.
        high: The largest.
    """

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(math.inf, dtype=torch.float32))
        self.register_buffer("high", torch.tensor(-math.inf, dtype=torch.float32))

    def _take(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.low.clone(), self.high.clone()


class MovingAverageRange(RangeObserver):
    """Exponential moving averages of the ends of each batch (Jacob et al. 2018, section 3.1).

    The first batch sets both; ``end <- (1 - momentum) * end + momentum * end of the batch`` later.

    Args:
        momentum: Weight of the newest batch, in (0, 1].

    Attributes:
        low: Average of the least values; float32 scalar.
        high: Average of the largest.

    Raises:
        ValueError: If ``momentum`` is no number in (0, 1].
    """

    low: Tensor
    high: Tensor

    def __init__(self, momentum: float = 0.01) -> None:
        super().__init__()
        is_number = isinstance(momentum, (int, float)) and not isinstance(momentum, bool)
        if not is_number or not 0 < momentum <= 1:
            raise ValueError(
                f"momentum is {momentum!r}; expected a number above 0 and up to 1, the weight of "
                "the newest batch, as in 0.01."
            )
        self.momentum = float(momentum)
        self.register_buffer("low", torch.zeros((), dtype=torch.float32))
        self.register_buffer("high", torch.zeros((), dtype=torch.float32))

    def _take(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        first = self.num_batches == 0
        self.low.copy_(torch.where(first, low, self.low.lerp(low, self.momentum)))
        self.high.copy_(torch.where(first, high, self.high.lerp(high, self.momentum)))

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.low.clone(), self.high.clone()

    def extra_repr(self) -> str:
        """What differs from instance to instance."""
        return f"momentum={self.momentum}"


class HistogramRange(RangeObserver):
    """The part of all values seen that a grid does best to cover.

    Bins are as wide as a power of two, and zero is an edge, so that a histogram that must reach
    farther merges bins two by two: what was counted stays counted, and the result does not depend
    on how values came in batches or in which order (1e-30 of the largest value is as good as
    zero). Of the 2048 bins more than half lie between
    zero, the least and the largest value.

    Args:
        grid: The integers that the values are rounded to.
        objective: ``"entropy"``, ``"mse"`` or ``"percentile"``; what is best, see
            :mod:`~lit_compress.compress.quantization.histogram`.
        percentile: For ``"percentile"``: above 50, up to 100, where it is the least and the
            largest value.

    Attributes:
        counts: Values in each bin; int64, shape ``[2048]``.
        first: Index of the first bin: bin ``i`` begins at ``(first + i) * 2 ** exponent``.
        exponent: Of two, the width of a bin.
        low: The least value; float32 scalar.
        high: The largest.

    Raises:
        ValueError: If an argument is of another kind or out of range.
    """

    counts: Tensor
    first: Tensor
    exponent: Tensor
    low: Tensor
    high: Tensor

    def __init__(
        self,
        grid: Grid,
        objective: HistogramObjective = "mse",
        *,
        percentile: float = 99.99,
    ) -> None:
        super().__init__()
        check_grid(grid)
        if objective not in get_args(HistogramObjective):
            raise ValueError(
                f"objective is {objective!r}; expected one of "
                f"{', '.join(get_args(HistogramObjective))}."
            )
        check_percentile(percentile)
        self.grid = grid
        self.objective = objective
        self.percentile = float(percentile)
        self.register_buffer("counts", torch.zeros(NUM_BINS, dtype=torch.int64))
        self.register_buffer("first", torch.zeros((), dtype=torch.int64))
        self.register_buffer("exponent", torch.tensor(_LEAST_EXPONENT, dtype=torch.int64))
        self.register_buffer("low", torch.tensor(math.inf, dtype=torch.float32))
        self.register_buffer("high", torch.tensor(-math.inf, dtype=torch.float32))

    def _take(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        check_finite(float(low), float(high))
        low, high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self._reach(min(float(low), 0.0), max(float(high), 0.0))
        self.low.copy_(low)
        self.high.copy_(high)
        # On the CPU a part at a time, so that it stays in the cache.
        at_once = _VALUES_AT_ONCE if x.device.type == "cpu" else x.numel()
        for part in torch.split(x.flatten(), at_once):
            # Exact, bins being powers of two wide; floor, since integers are cut towards zero.
            places = (part.float() * 2.0 ** -int(self.exponent)).floor_().sub_(int(self.first))
            self.counts += torch.bincount(places.to(torch.int32), minlength=NUM_BINS)

    def _reach(self, low: float, high: float) -> None:
        """Widen the bins until both ends are in one, moving what was counted along."""
        before, first = int(self.exponent), int(self.first)
        exponent = before
        if high > low:
            exponent = max(before, math.frexp(high - low)[1] - int(math.log2(NUM_BINS)) - 1)
        while _bin(high, exponent) - _bin(low, exponent) >= NUM_BINS:
            exponent += 1
        if exponent == before and _bin(low, exponent) == first:
            return
        old = first + torch.arange(NUM_BINS, device=self.counts.device)
        # Shifting integers to the right halves and floors; bins that are left out hold nothing.
        new = (old >> min(exponent - before, 62)) - _bin(low, exponent)
        moved = torch.zeros_like(self.counts)
        moved.index_add_(0, new.clamp_(0, NUM_BINS - 1), self.counts)
        self.counts.copy_(moved)
        self.first.fill_(_bin(low, exponent))
        self.exponent.fill_(exponent)

    def _range(self) -> tuple[Tensor, Tensor]:
        width, first = 2.0 ** int(self.exponent), int(self.first)
        ends = (first * width, (first + NUM_BINS) * width)
        # The outermost bins reach beyond the outermost values.
        least, largest = float(self.low), float(self.high)
        if self.objective == "percentile":
            low, high = percentile_range(self.counts, *ends, self.percentile)
        else:
            best_range = mse_range if self.objective == "mse" else entropy_range
            low, high = best_range(self.counts, *ends, self.grid)
            least, largest = min(least, 0.0), max(largest, 0.0)
        low, high = (min(max(end, least), largest) for end in (low, high))
        return self.low.new_tensor(low), self.low.new_tensor(high)

    def extra_repr(self) -> str:
        """What differs from instance to instance."""
        return f"grid={self.grid}, objective={self.objective!r}, percentile={self.percentile}"


def range_observer(kind: RangeKind, grid: Grid, *, percentile: float = 99.99) -> RangeObserver:
    """A fresh observer.

    - ``"minmax"``: :class:`MinMaxRange`. One outlier decides.
    - ``"moving_average"``: :class:`MovingAverageRange`; follows weights that are being trained.
    - ``"histogram"``: :class:`HistogramRange` that loses the least information (entropy).
    - ``"percentile"``: the same, leaving out a fixed share of the values on either side.
    - ``"mse"``: the same, with the least squared error.

    Args:
        kind: One of the above.
        grid: The integers that the values are rounded to.
        percentile: For ``"percentile"``: above 50, up to 100.

    Raises:
        ValueError: If an argument is of another kind, unknown or out of range.
    """
    check_grid(grid)
    check_percentile(percentile)
    if kind == "minmax":
        return MinMaxRange()
    if kind == "moving_average":
        return MovingAverageRange()
    if kind == "histogram":
        return HistogramRange(grid, "entropy")
    if kind == "percentile":
        return HistogramRange(grid, "percentile", percentile=percentile)
    if kind == "mse":
        return HistogramRange(grid, "mse")
    raise ValueError(f"range kind is {kind!r}; expected one of {', '.join(get_args(RangeKind))}.")


def _bin(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))

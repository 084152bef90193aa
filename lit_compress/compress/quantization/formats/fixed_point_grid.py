"""Fixed-point and related number formats: round float32 to the values of a few bits.

Four kinds of numbers, ``x`` a value and ``v`` the largest magnitude that must fit:

- ``"linear"``: ``k * 2^-f`` with ``f = bits - 1 - ceil(log2 v)``: true fixed point, shifts only.
- ``"minmax"``: ``2^bits`` even steps from the least to the largest value.
- ``"log"``: a sign, and even steps of ``log |x|`` from the least to the largest magnitude, but
  none wider than a factor of 2: what lies below all of them becomes zero.
- ``"tanh"``: even steps of ``tanh(2x / v)``: fine near zero, coarse far out.

Zero becomes exactly zero in all of them, so that sparse weights stay sparse and padding stays
padding. The usual forms of the last three lack that: the range from the least to the largest value
need not meet zero, the log of zero needs a floor that stretches the range, and an even number of
steps of tanh straddles it. Usual, too, is tanh of the value as it is: it saturates in float32
beyond 9 and comes back infinite, hence the division by ``v``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["FixedPointGrid", "FixedPointMethod", "fixed_point_grid", "round_to_fixed_point"]

FixedPointMethod = Literal["linear", "minmax", "log", "tanh"]

MIN_BITS, MAX_BITS = 2, 32

_TANH_SPAN = 2.0
"""``v`` over the unit of tanh: steps at ``v`` are 14 times as wide as those at zero."""

_MAX_SHIFT = 126
"""Steps below ``2^-126``, the least normal number of float32, are not taken."""

_BITS_OF_FLOAT32 = 16
"""With more bits, logarithms and tanh are taken in float64."""


@dataclass(frozen=True)
class FixedPointGrid:
    """The numbers that the values of a tensor are rounded to; plain data.

    Attributes:
        method: How the numbers lie, see the module's head.
        bits: Bits of a number, the sign included, 2 to 32.
        low: The lower end of the range: ``-high`` for ``"linear"`` and ``"tanh"``, at most 0 for
            ``"minmax"``, the smallest magnitude other than zero for ``"log"``.
        high: The upper end, ``v``; where it and ``low`` are 0, every value becomes zero.

    Raises:
        ValueError: If the method or the bits are unknown, or the range is none.
    """

    method: FixedPointMethod
    bits: int
    low: float
    high: float

    def __post_init__(self) -> None:
        check_method(self.method)
        check_bits("bits", self.bits)
        fits = {
            "linear": self.low == -self.high,
            "minmax": self.low <= 0,
            "log": self.low > 0 or self.high == 0,
            "tanh": self.low == -self.high,
        }[self.method]
        if not (fits and math.isfinite(self.low) and self.low <= self.high < math.inf):
            raise ValueError(
                f"the range of a {self.method!r} grid is {self.low} to {self.high}; take the one "
                "that fixed_point_grid finds in a tensor."
            )

    @property
    def fractional_bits(self) -> int:
        """``f`` of a ``"linear"`` grid, whose step is ``2^-f``; may be negative.

        Raises:
            ValueError: If the grid is another one.
        """
        if self.method != "linear":
            raise ValueError(f"a {self.method!r} grid has no fractional bits; a 'linear' one has.")
        mantissa, exponent = math.frexp(self.high)  # v = mantissa * 2^exponent, mantissa in [.5, 1)
        integer_bits = exponent - 1 if mantissa == 0.5 else exponent  # ceil(log2 v)
        return min(self.bits - 1 - integer_bits, _MAX_SHIFT)

    def round(self, x: Tensor) -> Tensor:
        """The nearest numbers of the grid, for ``"log"`` and ``"tanh"`` as their scale has it.

        Args:
            x: Real numbers, any shape; those beyond the range go to its end.

        Returns:
            Numbers of the grid, shape and dtype of ``x``.
        """
        if self.low == self.high == 0:
            return torch.zeros_like(x)
        companding = self.method in ("log", "tanh") and self.bits > _BITS_OF_FLOAT32
        wide = x.to(torch.float64 if companding else torch.float32)
        return _ROUND[self.method](wide, self).to(x.dtype)

    def num_overflow(self, x: Tensor) -> int:
        """How many values lie beyond the range and are clipped.

        A ``"linear"`` grid ends one step below the power of two that ``high`` is rounded up to;
        values within half a step of its ends do not count.

        Args:
            x: Real numbers, any shape.
        """
        low, high = self.low, self.high
        if self.method == "linear" and high > 0:
            step, half = 2.0**-self.fractional_bits, 2.0 ** (self.bits - 1)
            low, high = (-half - 0.5) * step, (half - 0.5) * step
        elif self.method == "log":
            low = -high
        return int(((x > high) | (x < low)).sum())

    def union(self, other: FixedPointGrid) -> FixedPointGrid:
        """The grid of the same method and bits that holds the ranges of both."""
        if self.method == "log" and 0 in (self.high, other.high):
            return self if other.high == 0 else other
        return replace(self, low=min(self.low, other.low), high=max(self.high, other.high))


def fixed_point_grid(
    x: Tensor, bits: int, method: FixedPointMethod = "linear", overflow_rate: float = 0.0
) -> FixedPointGrid:
    """The grid that fits the values of a tensor.

    Args:
        x: Floating point, any shape; an empty tensor has the range of one that is all zero.
        bits: Bits of a number, 2 to 32.
        method: How the numbers lie, see the module's head.
        overflow_rate: The share of values, in [0, 1), that may lie beyond the range, so that the
            others get finer steps: ``"linear"`` and ``"tanh"`` leave out the largest magnitudes,
            ``"minmax"`` half of it at each end, ``"log"`` all of it at each end (small magnitudes
            then become zero or the least that is left, whichever is nearer).

    Raises:
        ValueError: If the tensor holds NaN or infinite values, or an argument is out of range.
    """
    check_method(method)
    check_bits("bits", bits)
    check_overflow_rate(overflow_rate)
    values = x.detach().flatten().float()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("it holds NaN or infinite values; find out where they arise.")
    if method == "minmax":
        low = min(_ranked(values, overflow_rate / 2, from_above=False), 0.0)
        high = max(_ranked(values, overflow_rate / 2, from_above=True), 0.0)
    elif method == "log":
        magnitudes = values[values != 0].abs()
        low = _ranked(magnitudes, overflow_rate, from_above=False)
        high = max(_ranked(magnitudes, overflow_rate, from_above=True), low)
    else:
        high = _ranked(values.abs(), overflow_rate, from_above=True)
        low = -high
    return FixedPointGrid(method, bits, low, high)


def round_to_fixed_point(
    x: Tensor, bits: int, method: FixedPointMethod = "linear", overflow_rate: float = 0.0
) -> Tensor:
    """A tensor rounded to the grid that fits it; arguments as in :func:`fixed_point_grid`.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: As :func:`fixed_point_grid` does.

    >>> round_to_fixed_point(torch.tensor([0.0, 0.3, -0.9]), bits=3)
    tensor([ 0.0000,  0.2500, -1.0000])
    """
    return fixed_point_grid(x, bits, method, overflow_rate).round(x)


def check_method(method: object) -> None:
    """Refuse what is no method.

    Raises:
        ValueError: As it says.
    """
    if method not in get_args(FixedPointMethod):
        expected = ", ".join(map(repr, get_args(FixedPointMethod)))
        raise ValueError(f"method is {method!r}, expected one of {expected}.")


def check_bits(name: str, bits: object) -> None:
    """Refuse what is no whole number from 2 to 32.

    Raises:
        ValueError: As it says.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"{name} is {bits!r}, expected a whole number from 2 to 32.")


def check_overflow_rate(rate: object) -> None:
    """Refuse what is no share.

    Raises:
        ValueError: As it says.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"overflow_rate is {rate!r}, expected a share of the values in [0, 1).")


def _ranked(values: Tensor, rate: float, *, from_above: bool) -> float:
    """The outermost value once a share of them, rounded down to whole ones, is left out."""
    num = values.numel()
    if num == 0:
        return 0.0
    num_out = int(rate * num)
    if num_out == 0:
        return float(values.amax() if from_above else values.amin())
    rank = num - num_out if from_above else num_out + 1
    return float(values.kthvalue(min(max(rank, 1), num)).values)


def _round_linear(x: Tensor, grid: FixedPointGrid) -> Tensor:
    step: float = 2.0**-grid.fractional_bits
    half: int = 2 ** (grid.bits - 1)
    return (x / step).round().clamp(-half, half - 1) * step


def _round_minmax(x: Tensor, grid: FixedPointGrid) -> Tensor:
    num_steps: int = 2**grid.bits - 1
    step = max((grid.high - grid.low) / num_steps, 2.0**-_MAX_SHIFT)
    below_zero = min(round(-grid.low / step), num_steps)  # the steps that lie there
    return (x / step).round().clamp(-below_zero, num_steps - below_zero) * step


def _round_log(x: Tensor, grid: FixedPointGrid) -> Tensor:
    num_levels = 2 ** (grid.bits - 1) - 1  # of each sign; one code more is zero
    high = math.log2(grid.high)
    low = max(math.log2(grid.low), high - (num_levels - 1))  # steps of a factor of 2 at most
    step = (high - low) / (num_levels - 1) if high > low else 1.0
    level = ((x.abs().log2() - low) / step).round().clamp(0, round((high - low) / step))
    magnitude = _decoded(level, num_levels, lambda k: torch.exp2(k * step + low))
    is_zero = x.abs() < 2.0 ** (low - 1)  # nearer to zero than to the least level
    return torch.where(is_zero, 0.0, magnitude.copysign(x))


def _round_tanh(x: Tensor, grid: FixedPointGrid) -> Tensor:
    num_steps = 2 ** (grid.bits - 1) - 1  # on each side of zero
    unit, top = grid.high / _TANH_SPAN, math.tanh(_TANH_SPAN)
    steps = (torch.tanh(x.abs() / unit) * (num_steps / top)).round().clamp_max(num_steps)
    magnitude = _decoded(steps, num_steps + 1, lambda k: torch.atanh(k * (top / num_steps)) * unit)
    return magnitude.copysign(x)


def _decoded(codes: Tensor, num_codes: int, value_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The values of whole numbers; NaN stays NaN.

    Up to 16 bits they are looked up: torch's vectorised functions and those for the odd elements at
    a tensor's end differ in the last bit, so that one code would have two values.
    """
    if codes.dtype == torch.float64:
        return value_of(codes)
    table = value_of(torch.arange(num_codes, dtype=codes.dtype, device=codes.device))
    return torch.where(codes.isnan(), codes, table[codes.nan_to_num().long()])


_ROUND: dict[str, Callable[[Tensor, FixedPointGrid], Tensor]] = {
    "linear": _round_linear,
    "minmax": _round_minmax,
    "log": _round_log,
    "tanh": _round_tanh,
}

"""QuantizationPlan: the steps at which rounding starts and statistics and ranges freeze."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Moment", "QuantizationPlan", "check_moments"]

Moment: TypeAlias = int | float
"""A float is a fraction of the run, in [0, 1]; an int a number of steps or epochs."""


@dataclass(frozen=True)
class QuantizationPlan:
    """Moments of one run, in steps or epochs.

    Attributes:
        begin: Rounding begins.
        freeze_batch_norm: Batch norms use their running statistics; ``None`` for never.
        freeze_ranges: Observed ranges stop moving; ``None`` for never.
        bits_end: Weights have their last bits.
        first_bits: Bits of weights when rounding begins.
        last_bits: Bits in the end, at most ``first_bits``.
    """

    begin: int
    freeze_batch_norm: int | None
    freeze_ranges: int | None
    bits_end: int
    first_bits: int
    last_bits: int

    def rounds(self, now: int) -> bool:
        """Whether values are rounded in the step after ``now`` steps."""
        return now >= self.begin

    def batch_norm_frozen(self, now: int) -> bool:
        """Whether batch norms use their running statistics in that step."""
        return self.freeze_batch_norm is not None and now >= self.freeze_batch_norm

    def ranges_frozen(self, now: int) -> bool:
        """Whether observed ranges stay in that step."""
        return self.freeze_ranges is not None and now >= self.freeze_ranges

    def least_bits(self, now: int) -> int:
        """Bits of weights in that step: one less at equal distances, the last at ``bits_end``.

        >>> plan = QuantizationPlan(0, None, None, bits_end=40, first_bits=8, last_bits=4)
        >>> [plan.least_bits(now) for now in (0, 9, 10, 20, 30, 40, 99)]
        [8, 8, 7, 6, 5, 4, 4]
        """
        if now >= self.bits_end or self.first_bits == self.last_bits:
            return self.last_bits
        passed = max(now - self.begin, 0) / max(self.bits_end - self.begin, 1)
        return self.first_bits - int(passed * (self.first_bits - self.last_bits) + 1e-9)


def check_moments(begin: Any, freeze_batch_norm: Any, freeze_ranges: Any, unit: Any) -> None:
    """Refuse moments that are none.

    Raises:
        ValueError: If one is negative, a fraction above 1, or of the wrong kind; or ``unit`` is
            unknown.
    """
    if unit not in ("step", "epoch"):
        raise ValueError(f"unit is {unit!r}; choose 'step' or 'epoch'.")
    moments = {"begin": begin, "freeze_batch_norm": freeze_batch_norm,
               "freeze_ranges": freeze_ranges}  # fmt: skip
    for name, moment in moments.items():
        if moment is None and name != "begin":
            continue
        is_number = isinstance(moment, int | float) and not isinstance(moment, bool)
        if not is_number or moment < 0 or (isinstance(moment, float) and not moment <= 1):
            raise ValueError(
                f"{name} is {moment!r}; expected a fraction of the run from 0.0 to 1.0, or a whole "
                f"number of {unit}s."
            )

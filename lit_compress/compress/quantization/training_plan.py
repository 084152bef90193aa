"""QuantizationPlan: the steps at which rounding starts and statistics and ranges freeze."""

from __future__ import annotations

from dataclasses import dataclass

from lit_compress.compress.schedules import Moment, Unit, check_moment, check_unit

__all__ = ["QuantizationMoments", "QuantizationPlan"]

_END = "the end of the run"


@dataclass(frozen=True)
class QuantizationMoments:
    """When what happens, as a user declares it: a fraction of the run or a number of ``unit``.

    Attributes:
        begin: Rounding begins.
        freeze_batch_norm: Batch norms use their running statistics; ``None`` for never.
        freeze_ranges: Observed ranges stop moving; ``None`` for never.
        initial_weight_bits: Bits of weights when rounding begins, up to 8; ``None`` for those in
            the end, which come with ``freeze_ranges`` or the end of the run.
        unit: ``"step"`` or ``"epoch"``.

    Raises:
        ValueError: If a value is out of range or of the wrong kind.
    """

    begin: Moment
    freeze_batch_norm: Moment | None
    freeze_ranges: Moment | None
    initial_weight_bits: int | None
    unit: Unit

    def __post_init__(self) -> None:
        check_unit(self.unit)
        for name, moment in self.moments.items():
            check_moment(name, moment, unit=self.unit)

    @property
    def moments(self) -> dict[str, Moment]:
        """The moments that were given, by name; and the end of the run where bits need it."""
        given: dict[str, Moment | None] = {
            "begin": self.begin,
            "freeze_batch_norm": self.freeze_batch_norm,
            "freeze_ranges": self.freeze_ranges,
        }
        if self.initial_weight_bits is not None and self.freeze_ranges is None:
            given[_END] = 1.0
        return {name: m for name, m in given.items() if m is not None or name == "begin"}  # type: ignore[misc]

    def check_bits(self, final: int) -> None:
        """Check that weights begin with as many bits as they end with, or more.

        Args:
            final: Bits in the end, 2 to 8.

        Raises:
            ValueError: If they do not, or with more than 8.
        """
        initial = self.initial_weight_bits
        if initial is None:
            return
        if isinstance(initial, bool) or not isinstance(initial, int) or not final <= initial <= 8:
            raise ValueError(
                f"initial_weight_bits is {initial!r}; expected a whole number from weight_bits "
                f"({final}) to 8, or nothing."
            )

    def plan(self, moments: dict[str, int], unit: Unit, last_bits: int) -> QuantizationPlan:
        """The plan of one run.

        Args:
            moments: Those of :attr:`moments`, as whole numbers.
            unit: What they count.
            last_bits: The lowest number of bits that weights have in the end.

        Raises:
            ValueError: If bits would have no time to go.
        """
        begin, freeze_ranges = moments["begin"], moments.get("freeze_ranges")
        first = last_bits if self.initial_weight_bits is None else self.initial_weight_bits
        end = begin
        if first > last_bits:
            end = moments[_END] if freeze_ranges is None else freeze_ranges
            if end <= begin:
                raise ValueError(
                    f"weights lose bits from begin ({unit} {begin}) to freeze_ranges ({unit} "
                    f"{end}), which is not later. Begin earlier, freeze ranges later, or leave "
                    "initial_weight_bits out."
                )
        frozen = moments.get("freeze_batch_norm")
        return QuantizationPlan(begin, frozen, freeze_ranges, end, first, last_bits, unit)


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
        unit: What the moments count.
    """

    begin: int
    freeze_batch_norm: int | None
    freeze_ranges: int | None
    bits_end: int
    first_bits: int
    last_bits: int
    unit: Unit = "step"

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

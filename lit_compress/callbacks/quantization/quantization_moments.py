"""When quantization-aware training rounds and freezes: as declared, resolved for one run."""

from __future__ import annotations

from dataclasses import dataclass

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_compress.callbacks.lightning.run_clock import resolved_moment
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.compress.quantization.training_plan import Moment, QuantizationPlan, check_moments

__all__ = ["QuantizationMoments"]


@dataclass(frozen=True)
class QuantizationMoments:
    """What a user declares; a float is a fraction of the run, an int a number of ``unit``.

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
    unit: str

    def __post_init__(self) -> None:
        check_moments(self.begin, self.freeze_batch_norm, self.freeze_ranges, self.unit)

    def check_bits(self, final: int) -> None:
        """Make sure that weights begin with as many bits as they end with, or more.

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

    def resolve(
        self, trainer: pl.Trainer, scheme: QuantizationScheme, callback: str
    ) -> QuantizationPlan:
        """The moments of this run.

        Args:
            trainer: A Trainer whose ``fit`` has begun.
            scheme: What is quantized.
            callback: The callback's name, for messages.

        Raises:
            MisconfigurationException: If one is a fraction of a run of unknown length, or bits
                would have no time to go.
        """

        def at(name: str, moment: Moment) -> int:
            return resolved_moment(trainer, moment, self.unit, callback, name)

        def maybe(name: str, moment: Moment | None) -> int | None:
            return None if moment is None else at(name, moment)

        begin = at("begin", self.begin)
        freeze_batch_norm = maybe("freeze_batch_norm", self.freeze_batch_norm)
        freeze_ranges = maybe("freeze_ranges", self.freeze_ranges)
        last = min((scheme.weight_bits, *scheme.layer_bits.values()))
        first = last if self.initial_weight_bits is None else self.initial_weight_bits
        end = begin
        if first > last:
            end = at("the end of the run", 1.0) if freeze_ranges is None else freeze_ranges
            if end <= begin:
                raise MisconfigurationException(
                    f"{callback}: weights lose bits from begin ({self.unit} {begin}) to "
                    f"freeze_ranges ({self.unit} {end}), which is not later. Begin earlier, freeze "
                    "ranges later, or leave initial_weight_bits out."
                )
        return QuantizationPlan(begin, freeze_batch_norm, freeze_ranges, end, first, last)

"""FixedPoint, the user's settings, and the record of what was rounded in a network."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lit_compress.compress.quantization.formats.fixed_point_grid import (
    FixedPointGrid,
    FixedPointMethod,
    check_bits,
    check_method,
    check_overflow_rate,
)

__all__ = ["FixedPoint", "FixedPointRecord", "FixedPointTensor", "TensorKind"]

TensorKind = Literal["parameter", "running_stat", "activation"]


@dataclass(frozen=True)
class FixedPoint:
    """What is rounded, and to how many bits.

    Args:
        method: ``"linear"``, ``"minmax"``, ``"log"`` or ``"tanh"``; see
            :mod:`~lit_compress.compress.quantization.formats.fixed_point_grid`.
        param_bits: Bits of parameters, 2 to 32; ``None`` leaves them as they are.
        running_stat_bits: Likewise, of the running statistics of norms.
        activation_bits: Likewise, of the outputs of layers.
        overflow_rate: The share of values, in [0, 1), that may lie beyond a tensor's range.

    Raises:
        ValueError: If an argument is out of range, or nothing is to be rounded.
    """

    method: FixedPointMethod = "linear"
    param_bits: int | None = 8
    running_stat_bits: int | None = 16
    activation_bits: int | None = 8
    overflow_rate: float = 0.0

    def __post_init__(self) -> None:
        check_method(self.method)
        check_overflow_rate(self.overflow_rate)
        given = {
            "param_bits": self.param_bits,
            "running_stat_bits": self.running_stat_bits,
            "activation_bits": self.activation_bits,
        }
        for name, bits in given.items():
            if bits is not None:
                check_bits(name, bits)
        if all(bits is None for bits in given.values()):
            raise ValueError(
                f"{', '.join(given)} are all None, so nothing is rounded; give one of them bits."
            )

    def bits_of(self, kind: TensorKind) -> int | None:
        """Bits of one kind of tensors; ``None`` if they are left as they are."""
        if kind == "parameter":
            return self.param_bits
        return self.running_stat_bits if kind == "running_stat" else self.activation_bits


@dataclass(frozen=True)
class FixedPointTensor:
    """One tensor that was rounded.

    Attributes:
        name: Of a parameter or running statistic, or of the layer whose outputs are rounded.
        kind: Which of the three it is.
        grid: The numbers that it was rounded to.
        num_values: How many values were seen; of activations, over all calibration batches.
        num_overflow: How many of them lay beyond the range.
    """

    name: str
    kind: TensorKind
    grid: FixedPointGrid
    num_values: int
    num_overflow: int


@dataclass(frozen=True)
class FixedPointRecord:
    """What was rounded in a network, and how; with it another network of its kind does the same.

    Attributes:
        fixed_point: What was asked for.
        tensors: All that was rounded: parameters, then running statistics, then activations.
    """

    fixed_point: FixedPoint
    tensors: tuple[FixedPointTensor, ...]

    def __str__(self) -> str:
        width = max((len(t.name) for t in self.tensors), default=6)
        lines = [f"{'tensor':<{width}}  {'kind':<12}  bits  {'range':<23}  overflow"]
        for t in self.tensors:
            ends = f"{t.grid.low:.4g} to {t.grid.high:.4g}"
            share = t.num_overflow / max(t.num_values, 1)
            lines.append(
                f"{t.name:<{width}}  {t.kind:<12}  {t.grid.bits:>4}  {ends:<23}  {share:.4%}"
            )
        return "\n".join(lines)

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries, lists, numbers and strings, for JSON or a checkpoint."""
        return {
            "fixed_point": asdict(self.fixed_point),
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }

    @classmethod
    def from_plain(cls, plain: Any) -> FixedPointRecord:
        """What :meth:`to_plain` gave, also after a turn through JSON.

        Raises:
            ValueError: If it is anything else.
        """
        try:
            tensors = tuple(
                FixedPointTensor(**{**tensor, "grid": FixedPointGrid(**tensor["grid"])})
                for tensor in plain["tensors"]
            )
            return cls(FixedPoint(**plain["fixed_point"]), tensors)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{str(plain)[:200]!r} is no fixed-point record ({error}); expected "
                "{'fixed_point': {...}, 'tensors': [...]} as FixedPointRecord.to_plain has it."
            ) from error

"""Schedules: formulas from the step of a run to a value, and what a user declares.

Two layers. :func:`constant`, :func:`linear` and :func:`cubic` are the formulas. :class:`Schedule`
is what a user declares (fractions of the run or absolute numbers, in steps or epochs) and
:class:`Ramp` is what it becomes once the length of the run is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

__all__ = ["Moment", "Ramp", "Schedule", "Unit", "constant", "cubic", "linear"]

Moment: TypeAlias = int | float
"""A float is a fraction of the run, in [0, 1]; an int a number of steps or epochs."""

Unit: TypeAlias = Literal["step", "epoch"]
"""What whole numbers count: optimizer steps (under manual optimization, batches) or epochs."""


def constant(progress: float, initial: float, final: float) -> float:
    """The final value from the first moment on.

    Args:
        progress: How much of the ramp has passed, in [0, 1].
        initial: Ignored; it is there so that the three formulas are interchangeable.
        final: The value returned.

    Raises:
        ValueError: If ``progress`` is outside [0, 1].

    Examples:
        >>> constant(0.0, 0.1, 0.9)
        0.9
    """
    _check_progress(progress)
    return final


def linear(progress: float, initial: float, final: float) -> float:
    """A straight line: ``initial + (final - initial) * progress``.

    Args:
        progress: How much of the ramp has passed, in [0, 1].
        initial: The value at ``progress = 0``, without rounding error.
        final: The value at ``progress = 1``, without rounding error.

    Raises:
        ValueError: If ``progress`` is outside [0, 1].

    Examples:
        >>> linear(0.0, 0.5, 0.75), linear(0.5, 0.5, 0.75), linear(1.0, 0.5, 0.75)
        (0.5, 0.625, 0.75)
    """
    _check_progress(progress)
    if progress == 0.0:
        return initial
    return final + (initial - final) * (1.0 - progress)


def cubic(progress: float, initial: float, final: float) -> float:
    """Fast at first, gently at the end: ``final + (initial - final) * (1 - progress)**3``.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", equation 1. The equation's ``t0`` and
    ``n * dt`` are the begin and the length of the ramp; ``progress`` is ``(t - t0) / (n * dt)``.

    Args:
        progress: How much of the ramp has passed, in [0, 1].
        initial: The value at ``progress = 0``, without rounding error.
        final: The value at ``progress = 1``, without rounding error.

    Raises:
        ValueError: If ``progress`` is outside [0, 1].

    Examples:
        >>> cubic(0.0, 0.0, 0.8), cubic(0.5, 0.0, 0.8), cubic(1.0, 0.0, 0.8)
        (0.0, 0.7000000000000001, 0.8)
    """
    _check_progress(progress)
    if progress == 0.0:
        return initial
    return final + (initial - final) * (1.0 - progress) ** 3


def _check_progress(progress: float) -> None:
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}, expected a number in [0, 1].")


_FORMULAS: dict[str, Callable[[float, float, float], float]] = {
    "constant": constant,
    "linear": linear,
    "cubic": cubic,
}


@dataclass(frozen=True)
class Schedule:
    """When a quantity moves from its initial to its final value, as a user declares it.

    A ``float`` is a fraction of the run, in [0, 1]; an ``int`` is absolute, in ``unit``. So
    ``end=0.5`` is half-way through the run and ``end=500`` is step (or epoch) 500.

    Attributes:
        kind: ``"cubic"`` (Zhu & Gupta 2017), ``"linear"``, or ``"constant"`` (the final value from
            ``begin`` on).
        begin: When the ramp begins. Before it nothing happens.
        end: When the final value is reached. There is always an update at the end, whatever
            ``update_every`` is. After it nothing changes any more.
        update_every: The distance between updates; at least one ``unit``.
        unit: ``"step"`` (optimizer steps) or ``"epoch"``.

    Raises:
        ValueError: If a value is out of range, or ``begin`` lies after ``end``.
    """

    kind: Literal["cubic", "linear", "constant"] = "cubic"
    begin: Moment = 0.1
    end: Moment = 0.5
    update_every: Moment = 0.01
    unit: Unit = "step"

    def __post_init__(self) -> None:
        if self.kind not in _FORMULAS:
            raise ValueError(f"kind is {self.kind!r}, expected one of {sorted(_FORMULAS)}.")
        check_unit(self.unit)
        for name, moment in self.moments.items():
            check_moment(name, moment, unit=self.unit)
        if self.update_every == 0:
            raise ValueError(
                "update_every is 0, expected a positive fraction of the run or a number of "
                f"{self.unit}s of at least 1."
            )
        if type(self.begin) is type(self.end) and self.begin > self.end:
            raise ValueError(
                f"begin={self.begin} lies after end={self.end}; give a begin that is not later "
                "than the end."
            )

    @classmethod
    def at(cls, begin: Moment, unit: Unit = "step") -> Schedule:
        """All of it at one moment."""
        return cls("constant", begin, begin, 1, unit)

    @property
    def moments(self) -> dict[str, Moment]:
        """``begin``, ``end`` and ``update_every``."""
        return {"begin": self.begin, "end": self.end, "update_every": self.update_every}

    def resolve(self, run_length: float, unit: Unit | None = None) -> Ramp:
        """Turn fractions into absolute numbers.

        Args:
            run_length: The run's length in ``unit``; ``math.inf`` where it is not known.
            unit: What the numbers of the result count; by default what those of the schedule do.

        Returns:
            The same schedule in absolute numbers.

        Raises:
            ValueError: If a fraction other than 0 is given and the length is infinite, or if
                ``begin`` lies after ``end`` once both are absolute.
        """
        unit = unit or self.unit
        begin, end, every = (absolute_moment(m, run_length, n) for n, m in self.moments.items())
        if begin > end:
            raise ValueError(
                f"begin={self.begin} is {unit} {begin} of this run and lies after "
                f"end={self.end}, {unit} {end}; give both as fractions or move one of them."
            )
        return Ramp(kind=self.kind, begin=begin, end=end, every=max(1, every), unit=unit)


@dataclass(frozen=True)
class Ramp:
    """A schedule in absolute numbers.

    Attributes:
        kind: The name of the formula.
        begin: The first update.
        end: The last update.
        every: The distance between the updates from ``begin`` on; the one at ``end`` comes anyway.
        unit: What the numbers count.

    Examples:
        >>> ramp = Ramp("linear", begin=10, end=25, every=10)
        >>> [ramp.update_point(now) for now in (9, 10, 19, 20, 25, 99)]
        [None, 10, 10, 20, 25, 25]
        >>> ramp.value(10, 0.0, 0.6), ramp.value(25, 0.0, 0.6)
        (0.0, 0.6)
    """

    kind: Literal["cubic", "linear", "constant"]
    begin: int
    end: int
    every: int
    unit: Unit = "step"

    def update_point(self, now: int) -> int | None:
        """The latest moment, not after ``now``, at which an update is due.

        Comparing it with the point of the last update tells whether one is outstanding, also when
        several steps passed in between (several optimizers, a resumed run).

        Returns:
            The moment, or ``None`` before the ramp begins.
        """
        if now < self.begin:
            return None
        if now >= self.end:
            return self.end
        return self.begin + (now - self.begin) // self.every * self.every

    def next_point(self, now: int) -> int:
        """The first moment after ``now`` at which an update is due, or the end if there is none.

        Examples:
            >>> ramp = Ramp("linear", begin=10, end=25, every=10)
            >>> [ramp.next_point(now) for now in (0, 10, 20, 25)]
            [10, 20, 25, 25]
        """
        if now < self.begin:
            return self.begin
        return min(self.end, self.begin + ((now - self.begin) // self.every + 1) * self.every)

    def value(self, now: int, initial: float, final: float) -> float:
        """The scheduled value, constant outside of the ramp.

        Args:
            now: A moment in the ramp's unit.
            initial: The value up to ``begin``.
            final: The value from ``end`` on.
        """
        if now >= self.end:
            return final
        progress = max(0, now - self.begin) / (self.end - self.begin)
        return _FORMULAS[self.kind](progress, initial, final)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint; ``Ramp(**data)`` is the way back."""
        return asdict(self)


def check_unit(unit: object) -> None:
    """Check a unit of time.

    Raises:
        ValueError: If it is neither ``"step"`` nor ``"epoch"``.
    """
    if unit not in ("step", "epoch"):
        raise ValueError(f"unit is {unit!r}, expected 'step' or 'epoch'.")


def check_moment(name: str, moment: object, *, unit: str = "step") -> None:
    """Check that something is a fraction of the run or an absolute moment.

    Raises:
        ValueError: If ``moment`` is not a float in [0, 1] or an int of at least 0.
    """
    if isinstance(moment, bool) or not isinstance(moment, (int, float)):
        raise ValueError(
            f"{name} is {moment!r}, expected a fraction of the run (a float in [0, 1]) or a whole "
            f"number of {unit}s."
        )
    if isinstance(moment, float) and not 0.0 <= moment <= 1.0:
        fix = f" For {unit} {moment:.0f} write {name}={moment:.0f}." if moment > 1 else ""
        raise ValueError(
            f"{name} is {moment}, expected a fraction of the run in [0, 1] because it is a "
            f"float.{fix if math.isfinite(moment) else ''}"
        )
    if moment < 0:
        raise ValueError(f"{name} is {moment}, expected a number of {unit}s of at least 0.")


def absolute_moment(moment: Moment, run_length: float, name: str = "the moment") -> int:
    """A moment as a whole number of steps or epochs.

    Args:
        moment: A float is a fraction of the run, an int is absolute already.
        run_length: Steps or epochs of the run; ``math.inf`` where that is not known.
        name: The argument's name, for the message.

    Raises:
        ValueError: If it is a fraction other than 0 of a run of unknown length.

    Examples:
        >>> absolute_moment(0.5, 9), absolute_moment(7, 9), absolute_moment(0.0, math.inf)
        (4, 7, 0)
    """
    if not isinstance(moment, float) or moment == 0:
        return int(moment)
    if math.isinf(run_length):
        raise ValueError(
            f"{name} is {moment}, a fraction of the run, and the run has no known length. Set "
            "max_epochs or max_steps on the Trainer, or give a whole number."
        )
    return round(moment * run_length)

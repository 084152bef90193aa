"""The run's time: how long it is, where it stands, and when a schedule's next update is due."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_compress.callbacks.lightning.weight_averages import num_extra_epochs
from lit_compress.compress.schedules import Moment, Ramp, Schedule, Unit, absolute_moment

__all__ = ["ScheduleClock", "current_moment", "resolve_moments", "run_length"]


class ScheduleClock:
    """A schedule in the moments of one run, and how far it has come.

    Args:
        schedule: What the user declared.
        callback: The callback's name, for messages.

    Attributes:
        ramp: The schedule in the moments of this run; ``None`` before the first fit.
        last_point: The moment of the last update; ``None`` before the first one.
    """

    def __init__(self, schedule: Schedule, callback: str) -> None:
        self.schedule = schedule
        self.ramp: Ramp | None = None
        self.last_point: int | None = None
        self._callback = callback

    @property
    def active_ramp(self) -> Ramp:
        """The ramp, once the fit has begun."""
        assert self.ramp is not None, "the fit has not begun"
        return self.ramp

    @property
    def is_done(self) -> bool:
        """Whether the last update of the schedule was made."""
        return self.last_point is not None and self.last_point >= self.active_ramp.end

    def start(
        self, trainer: pl.Trainer, missing: str, others: Mapping[str, Moment] | None = None
    ) -> dict[str, int]:
        """Fix the schedule's moments for the run that begins.

        Args:
            trainer: A Trainer whose ``fit`` has begun.
            missing: What a run that ends before the schedule does not reach, for the warning.
            others: Other moments in the schedule's unit, by the names of their arguments.

        Returns:
            The other moments, in the unit of :attr:`ramp`.

        Raises:
            MisconfigurationException: If a fraction is given of a run that has no known length, or
                moments are out of order in this run.
        """
        moments = {**self.schedule.moments, **(others or {})}
        unit, length = _unit_and_length(trainer, moments, self.schedule.unit, self._callback)
        try:
            self.ramp = self.schedule.resolve(length, unit)
        except ValueError as error:
            raise MisconfigurationException(f"{self._callback}: {error}") from error
        self.last_point = None
        if self.ramp.end > length:
            rank_zero_warn(
                f"{self._callback}: the schedule ends at {unit} {self.ramp.end}, the run at "
                f"{length}: it will not reach its {missing}."
            )
        return {name: absolute_moment(moment, length) for name, moment in (others or {}).items()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on with the moments of the run that is resumed, also when ``max_epochs`` has grown.

        Args:
            state: What :meth:`state_dict` gave; or the one moment ``begin_step``, as callbacks
                with one moment wrote it in earlier versions.
        """
        if "begin_step" in state:
            self.ramp = Schedule.at(state["begin_step"]).resolve(math.inf)
        else:
            self.ramp = Ramp(**{"unit": self.schedule.unit, **state["ramp"]})
        self.last_point = state.get("last_point")

    def state_dict(self) -> dict[str, Any]:
        """The moments of the run and the last update, as plain data."""
        return {"ramp": self.active_ramp.to_dict(), "last_point": self.last_point}

    def now(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        """How much of the run is done, in the ramp's unit; see :func:`current_moment`."""
        return current_moment(trainer, pl_module, self.active_ramp.unit)

    def due(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int | None:
        """The moment of the update that is due between two batches; ``None`` if none is."""
        point = self.active_ramp.update_point(self.now(trainer, pl_module))
        if point is None or (self.last_point is not None and point <= self.last_point):
            return None
        return point


def run_length(trainer: pl.Trainer, unit: str) -> float:
    """The length of the run as far as the Trainer knows it.

    Args:
        trainer: A Trainer whose ``fit`` has begun.
        unit: ``"step"`` or ``"epoch"``.

    Returns:
        Steps or epochs; ``math.inf`` if there is neither ``max_epochs`` nor ``max_steps``, or the
        length of an epoch is not known.
    """
    extra_epochs = num_extra_epochs(trainer)
    steps: float = trainer.estimated_stepping_batches
    if steps < 0:  # an iterable data set without a length, and no max_steps
        steps = math.inf
    steps_per_epoch = (
        math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if math.isfinite(trainer.num_training_batches)
        else math.inf
    )
    if unit == "step":
        full = (max(trainer.max_epochs or 0, 1) - extra_epochs) * steps_per_epoch
        return steps if trainer.max_epochs == -1 else min(steps, full)
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        epochs: float = trainer.max_epochs - extra_epochs
    else:
        epochs = math.inf
    if trainer.max_steps >= 0 and math.isfinite(steps_per_epoch):
        epochs = min(epochs, math.ceil(trainer.max_steps / steps_per_epoch))
    return epochs


def resolve_moments(
    trainer: pl.Trainer, moments: Mapping[str, Moment], unit: Unit, callback: str
) -> tuple[dict[str, int], Unit]:
    """Moments of this run, in steps or epochs.

    Args:
        trainer: A Trainer whose ``fit`` has begun.
        moments: By the names of their arguments.
        unit: What whole numbers count.
        callback: The callback's name, for messages.

    Returns:
        The moments as whole numbers, and what they count: epochs where fractions are given of a run
        of which only the number of epochs is known.

    Raises:
        MisconfigurationException: If one is a fraction of a run that has no known length.
    """
    unit, length = _unit_and_length(trainer, moments, unit, callback)
    return {name: absolute_moment(moment, length) for name, moment in moments.items()}, unit


def _unit_and_length(
    trainer: pl.Trainer, moments: Mapping[str, Moment], unit: Unit, callback: str
) -> tuple[Unit, float]:
    """What to count in, and the run's length in it."""
    length = run_length(trainer, unit)
    relative = {n: m for n, m in moments.items() if isinstance(m, float) and m > 0}
    if math.isfinite(length) or not relative:
        return unit, length
    # An update every so many epochs is at least one; a moment in steps has no epoch.
    steps = [n for n, m in moments.items() if isinstance(m, int) and m > (n == "update_every")]
    if unit == "step" and not steps and math.isfinite(epochs := run_length(trainer, "epoch")):
        rank_zero_info(
            f"{callback}: the length of an epoch is not known, so fractions of the run are rounded "
            f"to whole epochs of {epochs:.0f}."
        )
        return "epoch", epochs
    name, moment = next(iter(relative.items()))
    raise MisconfigurationException(
        f"{callback}: {name} is {moment}, a fraction of the run, and the run has no known length. "
        f"Set max_epochs or max_steps on the Trainer, or give whole numbers of {unit}s."
    )


def current_moment(trainer: pl.Trainer, pl_module: pl.LightningModule, unit: str) -> int:
    """How much of the run is done, between two batches.

    Args:
        trainer: The Trainer, in ``on_train_start`` or ``on_train_batch_end``.
        pl_module: The module that is trained.
        unit: ``"step"`` or ``"epoch"``.

    Returns:
        Whole epochs done; or optimizer steps done, which under manual optimization are training
        batches, since a module may step several optimizers there.
    """
    if unit == "epoch":
        # A resumed run still has the progress of the batch after which it was saved, which may be
        # the last of its epoch, when on_train_start asks; so the hook tells, not the progress.
        in_batch_end = pl_module._current_fx_name == "on_train_batch_end"
        is_last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        return trainer.current_epoch + (is_last_batch and in_batch_end)
    if pl_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx + 1

"""The current moment and the length of a run, in optimizer steps or in epochs."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lit_compress.callbacks.lightning.weight_averages import num_extra_epochs
from lit_compress.compress.schedules import Ramp, Schedule, absolute_moment

__all__ = ["current_moment", "resolved_moment", "resolved_schedule", "run_length"]


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


def resolved_schedule(trainer: pl.Trainer, schedule: Schedule, callback: str, missing: str) -> Ramp:
    """A schedule in the moments of this run.

    Args:
        trainer: A Trainer whose ``fit`` has begun.
        schedule: What the user declared.
        callback: The callback's name, for messages.
        missing: What a run that ends before the schedule does not reach, for the warning.

    Raises:
        MisconfigurationException: If it needs a run length that the Trainer does not know, or its
            moments are out of order in this run.
    """
    length = run_length(trainer, schedule.unit)
    try:
        ramp = schedule.resolve(length)
    except ValueError as error:
        raise MisconfigurationException(f"{callback}: {error}") from error
    if ramp.end > length:
        rank_zero_warn(
            f"{callback}: the schedule ends at {schedule.unit} {ramp.end}, the run at {length}: it "
            f"will not reach its {missing}."
        )
    return ramp


def resolved_moment(
    trainer: pl.Trainer, moment: int | float, unit: str, callback: str, name: str = "begin"
) -> int:
    """A moment of this run, in steps or epochs.

    Args:
        trainer: A Trainer whose ``fit`` has begun.
        moment: A float is a fraction of the run, an int is absolute.
        unit: ``"step"`` or ``"epoch"``.
        callback: The callback's name, for the message.
        name: The argument's name, for the message.

    Raises:
        MisconfigurationException: If it is a fraction of a run that has no known length.
    """
    length = run_length(trainer, unit)
    if isinstance(moment, float) and math.isinf(length):
        raise MisconfigurationException(
            f"{callback}: {name} is {moment} of a run that has no known length. Set max_epochs or "
            f"max_steps on the Trainer, or give {name} as a whole number of {unit}s."
        )
    return absolute_moment(moment, length)


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

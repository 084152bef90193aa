"""Where a run stands and how long it is, in optimizer steps or in epochs."""

from __future__ import annotations

import math

import lightning.pytorch as pl

from lit_compress.callbacks._weight_averages import num_extra_epochs

__all__ = ["current_moment", "run_length"]


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

"""Lightning's weight-averaging callbacks, and how to be there when they update their average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import wraps
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import nn

__all__ = ["AverageWatch", "averaged_modules", "num_extra_epochs"]


def averaged_module(callback: Callback) -> nn.Module | None:
    """The average that a callback keeps of the LightningModule, parameters named as in it."""
    if isinstance(callback, WeightAveraging) and callback._average_model is not None:
        return callback._average_model.module
    if isinstance(callback, StochasticWeightAveraging):
        return callback._average_model
    return None


def averaged_modules(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """The averages that the Trainer's callbacks keep of the LightningModule."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (average := averaged_module(callback)) is not None:
            yield average


def num_extra_epochs(trainer: pl.Trainer) -> int:
    """Epochs that SWA added to the run to refresh batch-norm statistics; they train nothing."""
    extra = 0
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging) and hasattr(callback, "_max_epochs"):
            extra += (trainer.max_epochs or 0) - callback._max_epochs
    return extra


class AverageWatch:
    """Calls a function after each update of an average, whatever the order of the callbacks.

    Args:
        trainer: The Trainer whose callbacks keep averages.
        after_update: Called with the averaged module.
    """

    def __init__(self, trainer: pl.Trainer, after_update: Callable[[nn.Module], None]) -> None:
        self._after_update = after_update
        self._wrapped: list[Any] = []
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if averaged_module(callback) is not None:
                self._wrap(callback)

    def _wrap(self, callback: Callback) -> None:
        # SWA updates by a method of its own, WeightAveraging by one of its AveragedModel.
        owner: Any = callback
        if isinstance(callback, WeightAveraging):
            owner = callback._average_model
        update = owner.update_parameters

        @wraps(update)
        def update_and_call(*args: Any, **kwargs: Any) -> None:
            update(*args, **kwargs)
            average = averaged_module(callback)
            assert average is not None
            self._after_update(average)

        owner.update_parameters = update_and_call  # on the instance; the class stays as it is
        self._wrapped.append(owner)

    def remove(self) -> None:
        """Undo, leaving no trace on the callbacks."""
        for owner in self._wrapped:
            with suppress(AttributeError):
                del owner.update_parameters
        self._wrapped.clear()

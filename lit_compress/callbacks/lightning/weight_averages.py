"""Find Lightning's weight-averaging callbacks, and act when they update their averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import nn

from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper

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
        self._wrappers: list[MethodWrapper] = []
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if averaged_module(callback) is None:
                continue
            # SWA updates by a method of its own, WeightAveraging by one of its AveragedModel.
            weight_averaging = isinstance(callback, WeightAveraging)
            owner = callback._average_model if weight_averaging else callback
            around = partial(_update_then, partial(_with_average, callback, after_update))
            self._wrappers.append(MethodWrapper(owner, "update_parameters", around))

    def remove(self) -> None:
        """Undo, leaving no trace on the callbacks."""
        for wrapper in self._wrappers:
            wrapper.remove()
        self._wrappers.clear()


def _update_then(
    then: Callable[[], None], update: Callable[..., None], *args: Any, **kwargs: Any
) -> None:
    update(*args, **kwargs)
    then()


def _with_average(callback: Callback, function: Callable[[nn.Module], None]) -> None:
    average = averaged_module(callback)
    assert average is not None
    function(average)

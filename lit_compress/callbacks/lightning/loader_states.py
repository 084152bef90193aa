"""Training loaders that are looked at before a checkpoint takes them to its place in the data."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils._pytree import tree_map

from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper

__all__ = ["fresh_loaders", "restore_loader_states"]

_FRESH: weakref.WeakKeyDictionary[CombinedLoader, Any] = weakref.WeakKeyDictionary()


def fresh_loaders(trainer: pl.Trainer) -> tuple[CombinedLoader | None, Any]:
    """The run's training loaders, and copies of them from the beginning of the run.

    A loader that is known by ``state_dict`` alone cannot be taken back to its first batch later.

    Args:
        trainer: A Trainer in ``on_fit_start``, for the first time, or later.

    Returns:
        ``None`` for both where the run has no training data (``limit_train_batches=0``).
    """
    trainer.fit_loop.setup_data()  # as Lightning does it in a moment
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        return None, None
    if combined not in _FRESH:
        _FRESH[combined] = tree_map(copy.copy, combined.iterables)
    return combined, _FRESH[combined]


def restore_loader_states(trainer: pl.Trainer) -> MethodWrapper:
    """Have loaders take a checkpoint's place also where they were set up before it was restored.

    Lightning restores the loops after ``on_fit_start``, and loads the states of loaders where it
    sets them up only: whoever asks for ``trainer.estimated_stepping_batches`` before, as learning
    rate schedules do, has a resumed run begin its epoch again.

    Args:
        trainer: A Trainer in ``on_fit_start``.

    Returns:
        The wrapper around the fit loop's ``setup_data``, to be removed when the run ends.
    """
    loop = trainer.fit_loop

    def set_up_and_load(set_up: Callable[[], None]) -> None:
        set_up()
        if loop.restarting and loop._combined_loader_states_to_load and loop._data_fetcher:
            loop._load_combined_loader_states()
            iter(loop._data_fetcher)

    return MethodWrapper(loop, "setup_data", set_up_and_load)

"""What a search found, handed to the callbacks that wait for it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_compress.search.search_result import SearchResult, Space

__all__ = ["SEARCHED", "TakesSearched", "hand_over", "refuse_waiting_in_vain"]

SEARCHED = "searched"
"""What a user writes in the place of numbers that ``RatioSearch`` is to find."""

_ARGUMENTS: dict[Space, str] = {
    "channels": 'ChannelPruning(plan="searched")',
    "sparsity": 'MagnitudeSparsity(final_sparsity="searched")',
    "bits": 'QuantizationAwareTraining(layer_bits="searched")',
}


@runtime_checkable
class TakesSearched(Protocol):
    """A callback that can take what a search found."""

    searched_space: Space

    @property
    def waits_for_search(self) -> bool:
        """Whether it was told to."""

    def take_searched(self, result: SearchResult) -> None:
        """Work with what was found from now on."""


def refuse_waiting_in_vain(trainer: pl.Trainer, callback: TakesSearched) -> None:
    """Refuse a callback that waits for a search which does not come before it.

    To be called in the ``setup`` of a fit.

    Raises:
        MisconfigurationException: If no search of its space is listed before it.
    """
    if not callback.waits_for_search:
        return
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is callback:
            break
        if getattr(other, "space", None) == callback.searched_space:
            return
    space = callback.searched_space
    raise MisconfigurationException(
        f"{_ARGUMENTS[space].replace('QuantizationAwareTraining', type(callback).__name__)} waits "
        f'for a RatioSearch(space="{space}") and none is listed before it; add one, or give the '
        "numbers themselves."
    )


def hand_over(trainer: pl.Trainer, result: SearchResult) -> list[str]:
    """Give a result to all callbacks that wait for one of its space.

    Returns:
        The names of their classes.
    """
    taken = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (
            isinstance(callback, TakesSearched)
            and callback.waits_for_search
            and callback.searched_space == result.space
        ):
            callback.take_searched(result)
            taken.append(type(callback).__name__)
    return taken

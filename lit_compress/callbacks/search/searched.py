"""Hand what a search found to the callbacks that were told to wait for it."""

from __future__ import annotations

import glob
from typing import Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn

from lit_compress.callbacks.lightning.network_calls import find_layer, find_uncompiled_network
from lit_compress.compress.channels.importance import Importance
from lit_compress.search.search_result import SearchResult, Space
from lit_compress.search.settings import CandidateSettings
from lit_compress.search.sparsity_space import exact_sparsities

__all__ = [
    "SEARCHED",
    "LayerBits",
    "TakesSearched",
    "WayToCut",
    "check_no_layers",
    "check_search_before",
    "declared_bits",
    "found_bits",
    "found_sparsities",
    "hand_over",
]

SEARCHED = "searched"
"""What a user writes in the place of numbers that ``RatioSearch`` is to find."""

LayerBits: TypeAlias = dict[str, int] | Literal["searched"]
"""Bits of weights by name pattern of the layer, or what a search is to find."""

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

    def take_searched(self, result: SearchResult, candidates: CandidateSettings) -> None:
        """Work with what was found from now on.

        Args:
            result: What was found.
            candidates: How the networks were made that it was found with.
        """


def check_search_before(trainer: pl.Trainer, callback: TakesSearched) -> None:
    """Check that a callback which waits for a search is listed after one.

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


def hand_over(
    trainer: pl.Trainer, result: SearchResult, candidates: CandidateSettings
) -> list[str]:
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
            callback.take_searched(result, candidates)
            taken.append(type(callback).__name__)
    return taken


class WayToCut(NamedTuple):
    """How channels are cut, as far as the user said.

    Attributes:
        importance: Which channels stay.
        reconstruct: Whether the layers behind get new weights by least squares.
        num_calibration_batches: Training batches for both.
    """

    importance: Importance | None
    reconstruct: bool | None
    num_calibration_batches: int | None

    def filled(self, candidates: CandidateSettings | None = None) -> tuple[Importance, bool, int]:
        """The same with nothing left open.

        Args:
            candidates: How those were cut that a plan was found with: so is the model, where the
                user says nothing. Where he says something else, he is warned that the model scores
                otherwise than the search says.
        """
        usual: tuple[Importance, bool, int] = ("l2", False, 8)
        if candidates is not None:
            batches = candidates.num_calibration_batches
            usual = (candidates.importance, batches > 0, batches or 8)  # type: ignore[assignment]
        importance = usual[0] if self.importance is None else self.importance
        reconstruct = usual[1] if self.reconstruct is None else self.reconstruct
        number = usual[2] if self.num_calibration_batches is None else self.num_calibration_batches
        if candidates is not None and (importance, reconstruct) != usual[:2]:
            theirs = f"importance={usual[0]!r} and reconstruct={usual[1]}"
            ours = f"importance={importance!r} and reconstruct={reconstruct}"
            rank_zero_warn(
                f"ChannelPruning: the plan was found with candidates cut by {theirs}, and the "
                f"model is cut by {ours}, so that it scores otherwise than the search says. Leave "
                "both out, or give the search the same in "
                "RatioSearch(candidates=CandidateSettings(...))."
            )
        return importance, reconstruct, number


def check_no_layers(*given: object) -> None:
    """Refuse a choice of layers beside ``final_sparsity="searched"``.

    Args:
        given: What is said of them; ``None`` for nothing.

    Raises:
        ValueError: If anything is said.
    """
    if any(choice is not None for choice in given):
        raise ValueError(
            f"final_sparsity is {SEARCHED!r} and layers, ignored_layers or layer_types is given "
            "too; the layers are those of the search. Say there which ones stay dense, in "
            "RatioSearch(candidates=CandidateSettings(ignored_layers=[...]))."
        )


def found_sparsities(
    result: SearchResult | None, pl_module: pl.LightningModule
) -> dict[str, float]:
    """What a search over sparsity found, as ``MagnitudeSparsity(final_sparsity=...)`` takes it.

    Args:
        result: Of the network of this module, before any cut.
        pl_module: The module.

    Returns:
        By name patterns, each of which matches one layer of the network: zeros / weights, with
        which all these layers together have exactly the zeros that the search was told.
    """
    assert result is not None, "setup has seen to a search"
    assert result.budget is not None, "a search over sparsity has one"
    network = find_uncompiled_network(pl_module)
    layers = {name: find_layer(network, name) for name in result.sparsities}
    sizes = {name: layer.get_parameter("weight").numel() for name, layer in layers.items()}
    target = 1 - result.budget[1] / sum(sizes.values())
    exact = exact_sparsities(result.sparsities, sizes, target)
    return {glob.escape(name): value for name, value in exact.items()}


def declared_bits(layer_bits: LayerBits | None, network: str | None) -> dict[str, int]:
    """The ``layer_bits`` of a scheme as they are known before a search.

    Args:
        layer_bits: As the user declares them.
        network: The user's name of the network that is quantized, if any.

    Raises:
        ValueError: If they are another word, or to be searched and a network is named.
    """
    if isinstance(layer_bits, str) and layer_bits != SEARCHED:
        raise ValueError(
            f"layer_bits is {layer_bits!r}; give a mapping from name patterns to bits, as in "
            f"{{'layer4.*': 4}}, or {SEARCHED!r}."
        )
    if not isinstance(layer_bits, str):
        return layer_bits or {}
    if network is not None:
        raise ValueError(
            f"layer_bits is {SEARCHED!r} and network is {network!r}; the search has the bits of "
            "the module's whole network. Leave network out."
        )
    return {}


def found_bits(result: SearchResult) -> dict[str, int]:
    """What a search over bits found, as the ``layer_bits`` of quantization take it.

    Returns:
        Bits by name patterns, each of which matches one layer of the network.
    """
    return {glob.escape(name): bits for name, bits in result.layer_bits.items()}

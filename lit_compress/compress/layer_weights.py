"""Look up the weights of layers by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from lit_compress.compress.layers import check_is_list

__all__ = ["layer_weights"]


def layer_weights(network: nn.Module, layers: Sequence[str]) -> dict[str, nn.Parameter]:
    """The weight of each layer, by the layer's name and in the order given.

    Args:
        network: The network.
        layers: Qualified names of modules whose ``weight`` is a parameter of two or more
            dimensions.

    Raises:
        ValueError: If there are no names, one is given twice, is that of no such module (the
            nearest names are given), or two layers share their weight.
    """
    check_is_list("layers", layers)
    if not layers:
        raise ValueError("layers is empty; give the name of at least one layer with a weight.")
    known = {
        name: module._parameters["weight"]
        for name, module in network.named_modules(remove_duplicate=False)
        if getattr(module._parameters.get("weight"), "ndim", 0) >= 2
    }
    weights: dict[str, nn.Parameter] = {}
    owners: dict[int, str] = {}
    for layer in layers:
        weight = known.get(layer)
        if weight is None:
            nearest = difflib.get_close_matches(layer, known, n=3, cutoff=0.3) or list(known)[:3]
            raise ValueError(
                f"layers holds {layer!r}, which is no module whose weight is a parameter of two or "
                f"more dimensions; the nearest are {', '.join(map(repr, nearest)) or 'none'}."
            )
        if id(weight) in owners:
            raise ValueError(
                f"the weight of {layer!r} is also that of {owners[id(weight)]!r}; name only one."
            )
        owners[id(weight)] = layer
        weights[layer] = weight
    return weights

"""The features of a layer that an agent sees: AMC's, scaled over the layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

__all__ = ["layer_features"]


def layer_features(
    network: nn.Module, layers: Sequence[str], layer_macs: Mapping[str, int]
) -> list[tuple[float, ...]]:
    """Describe layers (He et al. 2018, "AMC", section 3.1).

    Args:
        network: The network.
        layers: Names of modules in it, in forward order; a ``#2`` after a name, as channel groups
            have it where one layer makes several, does not count.
        layer_macs: MACs of each for one example; 0 where not known.

    Returns:
        For each layer: whether it is linear, inputs, outputs, kernel size, stride, weights and
        MACs, each scaled over the layers to [0, 1] (sizes by their logarithms); 0 where
        all are the same.
    """
    names = [layer.partition("#")[0] for layer in layers]
    raw = [_raw(network, name, layer_macs.get(name, 0)) for name in names]
    columns = [_scaled(column) for column in zip(*raw, strict=True)]
    return [tuple(row) for row in zip(*columns, strict=True)]


def _raw(network: nn.Module, name: str, macs: int) -> tuple[float, ...]:
    module = dict(network.named_modules()).get(name)
    weight = getattr(module, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else (1, 1)
    inputs = shape[1] if len(shape) > 1 else 1
    kernel = math.prod(shape[2:]) ** (1 / max(len(shape) - 2, 1)) if len(shape) > 2 else 1.0
    stride = getattr(module, "stride", 1)
    first = stride[0] if isinstance(stride, tuple) else stride
    is_linear = float(isinstance(module, nn.Linear))
    sizes = (inputs, shape[0], math.prod(shape), macs)
    logs = [math.log1p(size) for size in sizes]
    return (is_linear, logs[0], logs[1], kernel, float(first), logs[2], logs[3])


def _scaled(column: Sequence[float]) -> list[float]:
    low, high = min(column), max(column)
    return [(value - low) / (high - low) if high > low else 0.0 for value in column]

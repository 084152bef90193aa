"""Run a quantized network with and without rounding, with a handle called at each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lit_compress.compress.calibration import Forward, evaluation_mode
from lit_compress.compress.quantization.calls import (
    layer_arguments,
    seen_calls,
    with_layer_arguments,
)
from lit_compress.compress.quantization.network import Quantization, quantized_network

__all__ = ["LayerCall", "LayerHandle", "StopHere", "calibrated", "run_layers", "without_rounding"]


@dataclass(frozen=True)
class LayerCall:
    """A quantized layer's call, about to happen.

    Attributes:
        name: The call's name.
        function: torch's function.
        args: Its positional arguments, the input and the weight rounded if the run is.
        kwargs: Its keyword arguments.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def input(self) -> Tensor:
        """What the layer reads."""
        return layer_arguments(self.args, self.kwargs)[0]

    def result(self) -> Tensor:
        """What it gives."""
        given: Tensor = self.function(*self.args, **self.kwargs)
        return given


LayerHandle: TypeAlias = Callable[[LayerCall], Tensor]
"""What is done in place of a layer's call."""


class StopHere(Exception):
    """Raised by a handle that wants nothing of the rest of the run."""


def calibrated(network: nn.Module) -> Quantization:
    """The quantizers of a network that rounds.

    Raises:
        ValueError: If it is not quantized, or not calibrated.
    """
    quantization = quantized_network(network)
    if not quantization.quantizing or quantization.unready():
        raise ValueError(
            f"{type(network).__name__} has quantizers but no ranges yet; calibrate it first."
        )
    return quantization


def run_layers(
    network: nn.Module,
    forward: Forward,
    batch: Any,
    handle: LayerHandle,
    *,
    rounded: bool,
    float_weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Run a quantized network in evaluation mode, the calls of its quantized layers by a handle.

    Args:
        network: Calibrated.
        forward: Runs it on a batch.
        batch: The batch.
        handle: Sees each of these calls; :class:`StopHere` from it ends the run.
        rounded: Whether activations and weights are rounded.
        float_weights: By name: what weights were before they were changed, for runs that are not
            rounded.
    """
    quantization = quantized_network(network)
    weights = quantization.placement.weights
    originals = {} if rounded or float_weights is None else float_weights

    def through(
        name: str,
        op: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if name not in weights:
            return func(*args, **kwargs)
        original = originals.get(weights[name])
        if original is not None:
            bias = layer_arguments(args, kwargs)[2]
            args, kwargs = with_layer_arguments(args, kwargs, original, bias)
        return handle(LayerCall(name, func, args, kwargs))

    with torch.no_grad(), evaluation_mode(network), _rounding(quantization, rounded):
        try:
            with seen_calls(network, through):
                forward(network, batch)
        except StopHere:
            pass


@contextmanager
def without_rounding(network: nn.Module) -> Iterator[None]:
    """Inside, a quantized network computes in floating point."""
    with _rounding(quantized_network(network), False):
        yield


@contextmanager
def _rounding(quantization: Quantization, rounded: bool) -> Iterator[None]:
    modes = [(q, q.observing, q.quantizing) for q in quantization.quantizers]
    quantization.set_mode(observing=False, quantizing=rounded)
    try:
        yield
    finally:
        for quantizer, observing, quantizing in modes:
            quantizer.observing, quantizer.quantizing = observing, quantizing

"""Watch the inputs and outputs of some layers while a model runs a batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from lit_compress.compress.calibration import Forward, evaluation_mode
from lit_compress.compress.channels.output_samples import Layer

__all__ = ["See", "in_forward_order", "watch_calls"]

See: TypeAlias = Callable[[str, int, Layer, Tensor, Tensor], None]
"""Is shown one call of a layer: its name, the number of the call from 0, the module, x and y."""


class _SeenEnoughError(Exception):
    """Ends a forward pass of which nothing more is wanted."""


def watch_calls(
    layers: Sequence[str],
    model: nn.Module,
    batch: Any,
    forward: Forward,
    see: See,
    num_calls: int | None = None,
) -> int:
    """Run one batch and show each call of some layers: name, number of the call, module, x, y.

    Stops after ``num_calls`` calls of them, if given. Returns the calls there were.
    """
    calls: Counter[str] = Counter()

    def hook_for(layer: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            inputs = args[0] if args else kwargs["input"]
            see(layer, calls[layer], cast(Layer, module), inputs, output)
            calls[layer] += 1
            if calls.total() == num_calls:
                raise _SeenEnoughError

        return hook

    with ExitStack() as hooks:
        for layer in layers:
            handle = model.get_submodule(layer).register_forward_hook(
                hook_for(layer), with_kwargs=True
            )
            hooks.callback(handle.remove)
        with suppress(_SeenEnoughError):
            forward(model, batch)
    return calls.total()


def in_forward_order(
    layers: Sequence[str], model: nn.Module, batch: Any, forward: Forward
) -> list[str]:
    """The layers that are called, in the order of their first calls."""
    order: dict[str, None] = {}

    def note(layer: str, call: int, module: Layer, x: Tensor, y: Tensor) -> None:
        order.setdefault(layer)

    with evaluation_mode(model), torch.no_grad():
        watch_calls(layers, model, batch, forward, note)
    return list(order)

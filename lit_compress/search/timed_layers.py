"""Convolutions and linear layers as a network calls them, to be timed at other sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import skip_init

from lit_compress.measure.inputs import prepared

__all__ = ["LayerCall", "layer_calls", "sizes_between"]

_KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
_MULTIPLE = 8  # kernels are made for multiples of it, and plans are rounded to it by default


@dataclass(frozen=True)
class LayerCall:
    """What the time of a call depends on, except the number of channels.

    Sizes are those of the first two dimensions of the weight; so a cut changes nothing else.

    Attributes:
        kind: The layer of torch that it is.
        options: Its other arguments (kernel, stride, padding, dilation, bias), by name.
        num_groups: Of a grouped convolution; 0 where each channel is treated on its own.
        multiplier: Output channels for each input channel where ``num_groups`` is 0.
        input_shape: The shape of the input.
        num_outputs: Numbers that a call makes.
        dtype: What it computes in.
        device: Where.
        channels_last: Whether its tensors have the channels last in memory.
    """

    kind: type[nn.Module]
    options: tuple[tuple[str, Any], ...]
    num_groups: int
    multiplier: int
    input_shape: tuple[int, ...]
    num_outputs: int
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    @property
    def unit(self) -> int:
        """What the size of the weight's first dimension is a multiple of."""
        transposed = issubclass(self.kind, _ConvTransposeNd)
        return self.num_groups or (1 if transposed else self.multiplier)

    @property
    def output_dim(self) -> int:
        """Which of the two dimensions holds the channels that the layer makes."""
        return int(issubclass(self.kind, _ConvTransposeNd) and self.num_groups > 0)

    def key(self, first: int, second: int) -> str:
        """All that the time at this size depends on, as text."""
        layer = self.kind(**self._arguments(first, second), device="meta")
        layout = ", channels last" if self.channels_last else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{layer} of {list(self._input_shape(layer))} {dtype}{layout}"

    def at(self, first: int, second: int) -> tuple[nn.Module, Tensor]:
        """A layer of this size and an input for it; torch's random state stays as it is.

        Args:
            first: Size of the weight's first dimension, a multiple of ``unit``.
            second: Size of its second dimension.
        """
        arguments = self._arguments(first, second)
        layer = skip_init(self.kind, **arguments, device=self.device)  # type: ignore[no-untyped-call]
        layer = layer.to(self.dtype).eval()
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.empty(self._input_shape(layer), dtype=self.dtype, device=self.device)
        with torch.no_grad():
            for tensor in (x, *layer.parameters()):
                tensor.uniform_(-0.1, 0.1, generator=generator)
        if self.channels_last:
            layout = _LAYOUTS[x.dim()]
            layer, x = layer.to(memory_format=layout), x.contiguous(memory_format=layout)
        return layer, x

    def _arguments(self, first: int, second: int) -> dict[str, Any]:
        options = dict(self.options)
        if issubclass(self.kind, nn.Linear):
            return {**options, "in_features": second, "out_features": first}
        transposed = issubclass(self.kind, _ConvTransposeNd)
        if self.num_groups:
            inputs, outputs = (first, second) if transposed else (second, first)
            inputs *= 1 if transposed else self.num_groups
            outputs *= self.num_groups if transposed else 1
            groups = self.num_groups
        else:
            inputs = groups = first if transposed else first // self.multiplier
            outputs = inputs * self.multiplier
        return {**options, "in_channels": inputs, "out_channels": outputs, "groups": groups}

    def _input_shape(self, layer: nn.Module) -> tuple[int, ...]:
        shape = list(self.input_shape)
        if isinstance(layer, _ConvNd):
            shape[-1 - len(layer.kernel_size)] = layer.in_channels
        else:
            assert isinstance(layer, nn.Linear)
            shape[-1] = layer.in_features
        return tuple(shape)


def layer_calls(
    network: nn.Module, run: Callable[[nn.Module], object]
) -> Counter[tuple[str, LayerCall]]:
    """Run a network once and see how it calls its convolutions and linear layers.

    In evaluation mode without gradients; the modes are restored. A layer whose weight is no
    parameter (computed by a parametrization, quantized) is not among them.

    Args:
        network: Any module that runs.
        run: Calls it on one batch.

    Returns:
        How often each layer, by name, is called in each way, in the order of the first calls.

    Raises:
        ValueError: If the network raises.
    """
    calls: Counter[tuple[str, LayerCall]] = Counter()

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], y: Tensor) -> None:
            if isinstance(module.weight, nn.Parameter):
                x = args[0] if args else kwargs["input"]
                calls[name, _call_of(module, x, y)] += 1

        return hook

    with prepared(network), ExitStack() as hooks:
        for name, module in network.named_modules():
            if isinstance(module, _KINDS):
                handle = module.register_forward_hook(hook_for(name), with_kwargs=True)
                hooks.callback(handle.remove)
        try:
            run(network)
        except Exception as error:
            raise ValueError(
                f"{type(network).__name__} raised {type(error).__name__} when it was run to see "
                f"its layers: {error}. Expected a call on one batch that the network takes, as in "
                "lambda network: network(images)."
            ) from error
    return calls


def sizes_between(full: int, unit: int, num_points: int) -> tuple[int, ...]:
    """Sizes at which to time: up to ``num_points``, evenly spaced, rising, the last one ``full``.

    All but the last are multiples of ``unit``, and of 8 where the layer is large enough.

    Args:
        full: Size in the dense network, a multiple of ``unit``.
        unit: What sizes must be a multiple of, at least 1.
        num_points: How many at most, at least 2.

    Example:
        >>> sizes_between(256, 1, num_points=5)
        (8, 64, 128, 192, 256)
        >>> sizes_between(10, 2, num_points=3)
        (2, 4, 10)
    """
    step = math.lcm(_MULTIPLE, unit)
    step = step if 2 * step <= full else unit
    spaced = (full * k / (num_points - 1) for k in range(num_points - 1))
    points = {max(step, round(wish / step) * step) for wish in spaced}
    return (*sorted(point for point in points if point < full), full)


def _call_of(layer: nn.Module, x: Tensor, y: Tensor) -> LayerCall:
    kind = next(kind for kind in _KINDS if isinstance(layer, kind))
    options: dict[str, Any] = {"bias": layer.bias is not None}
    num_groups, multiplier = 1, 1
    if isinstance(layer, _ConvNd):
        names = ["kernel_size", "stride", "padding", "dilation", "padding_mode"]
        names += ["output_padding"] if isinstance(layer, _ConvTransposeNd) else []
        options |= {name: getattr(layer, name) for name in names}
        num_groups = layer.groups
        if 1 < layer.groups == layer.in_channels:
            num_groups, multiplier = 0, layer.out_channels // layer.in_channels
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return LayerCall(
        kind,
        tuple(options.items()),
        num_groups,
        multiplier,
        tuple(x.shape),
        y.numel(),
        torch.get_autocast_dtype(device) if autocast else x.dtype,
        x.device,
        isinstance(layer, _ConvNd) and (_is_channels_last(x) or _is_channels_last(layer.weight)),
    )


def _is_channels_last(tensor: Tensor) -> bool:
    layout = _LAYOUTS.get(tensor.dim())
    return (
        layout is not None
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=layout)
    )

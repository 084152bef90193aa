"""Sample the inputs and outputs of a layer in the quantized and in the float network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress.compress.calibration import Forward
from lit_compress.compress.quantization.calls import layer_arguments
from lit_compress.compress.quantization.corrections.layer_runs import (
    LayerCall,
    StopHere,
    run_layers,
)

__all__ = ["LayerSamples", "gather_samples"]


@dataclass(frozen=True)
class LayerSamples:
    """Pairs of what a rounded layer reads and what it should give.

    Attributes:
        patches: float32, ``[groups, samples, inputs]``: what each group of output channels reads in
            the quantized network, in the order of ``weight.flatten(1)``.
        outputs: float32, ``[samples, channels]``: the layer's outputs in floating point.
        bias: Its bias, float32, ``[channels]``, or ``None``.
    """

    patches: Tensor
    outputs: Tensor
    bias: Tensor | None


def gather_samples(
    network: nn.Module,
    forward: Forward,
    batches: Sequence[Any],
    call: str,
    float_weights: Mapping[str, Tensor],
    num_samples: int,
    max_bytes: int,
    generator: torch.Generator,
) -> LayerSamples | None:
    """Run a quantized network up to one layer, with and without rounding, and keep some positions.

    Args:
        network: Calibrated.
        forward: Runs it on a batch.
        batches: At least one.
        call: The layer's call: a convolution or a linear layer.
        float_weights: What weights were before they were changed; by name.
        num_samples: Positions in all, spread evenly over batches and images.
        max_bytes: Bound on what is kept; at least one position of each image is.
        generator: Chooses positions.

    Returns:
        ``None`` where no batch reached the layer.
    """
    taker = _Taker(
        call, math.ceil(num_samples / len(batches)), max_bytes // len(batches), generator
    )
    for batch in batches:
        taker.begin_batch()
        run_layers(
            network, forward, batch, taker.take_output, rounded=False, float_weights=float_weights
        )
        if taker.found:
            run_layers(network, forward, batch, taker.take_input, rounded=True)
    if not taker.patches:
        return None
    bias = None if taker.bias is None else taker.bias.detach().float()
    return LayerSamples(torch.cat(taker.patches, 1), torch.cat(taker.outputs), bias)


class _Taker:
    def __init__(self, call: str, num_a_batch: int, bytes_a_batch: int, generator: torch.Generator):
        self._call = call
        self._num = num_a_batch
        self._bytes = bytes_a_batch
        self._generator = generator
        self._positions: Tensor | None = None
        self.patches: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.bias: Tensor | None = None

    @property
    def found(self) -> bool:
        """Whether the layer ran on this batch."""
        return self._positions is not None

    def begin_batch(self) -> None:
        """Forget the positions of the batch before."""
        self._positions = None

    def take_output(self, call: LayerCall) -> Tensor:
        """The float layer's outputs at new positions."""
        result = call.result()
        if call.name != self._call:
            return result
        at_end = _channels_at_end(call, result)
        if at_end.numel():
            _, weight, self.bias = layer_arguments(call.args, call.kwargs)
            groups = _geometry(call).groups
            row_bytes = 4 * (groups * weight[0].numel() + len(weight))
            num = min(self._num, max(self._bytes // row_bytes, 1))
            self._positions = self._sample(at_end.shape[:-1], num)
            self.outputs.append(at_end[tuple(self._positions.to(at_end.device))].float())
        raise StopHere

    def take_input(self, call: LayerCall) -> Tensor:
        """What the rounded layer reads at the same positions."""
        if call.name != self._call:
            return call.result()
        assert self._positions is not None
        self.patches.append(_patches(call, self._positions.to(call.input.device)))
        raise StopHere

    def _sample(self, shape: Sequence[int], num: int) -> Tensor:
        """Positions, as many in each image: int64, ``[dims, samples]``; none twice."""
        images, size = shape[0], math.prod(shape[1:])
        each = min(max(num // images, 1), size)
        chosen = torch.rand(images, size, generator=self._generator).topk(each).indices
        flat = chosen + size * torch.arange(images).unsqueeze(1)
        return torch.stack(torch.unravel_index(flat.flatten(), tuple(shape)))


@dataclass(frozen=True)
class _Geometry:
    """How a convolution's call moves over its input; of a linear layer: no dimensions."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int


def _geometry(call: LayerCall) -> _Geometry:
    if call.function.__name__ == "linear":
        return _Geometry((), (), (), (), 1)
    # (input, weight, bias, stride, padding, dilation, groups)
    names = ("stride", "padding", "dilation", "groups")
    given = dict(zip(names, call.args[3:], strict=False)) | call.kwargs
    kernel = tuple(layer_arguments(call.args, call.kwargs)[1].shape[2:])
    dilation = _each(given.get("dilation", 1), len(kernel))
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        wide = [step * (size - 1) if padding == "same" else 0
                for step, size in zip(dilation, kernel, strict=True)]  # fmt: skip
        pairs = tuple((total // 2, total - total // 2) for total in wide)
    else:
        pairs = tuple((size, size) for size in _each(padding, len(kernel)))
    stride = _each(given.get("stride", 1), len(kernel))
    return _Geometry(kernel, stride, dilation, pairs, int(given.get("groups", 1)))


def _each(value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * dims
    values = tuple(int(size) for size in value)
    return values * dims if len(values) == 1 else values


def _channels_at_end(call: LayerCall, y: Tensor) -> Tensor:
    """A layer's output as ``[images, *positions, channels]``."""
    dims = len(_geometry(call).kernel)
    if y.dim() < dims + 2:  # without a dimension for images
        y = y.unsqueeze(0)
    return y.movedim(-1 - dims, -1)


def _patches(call: LayerCall, positions: Tensor) -> Tensor:
    """What the layer reads at positions of its output: ``[groups, samples, inputs]``."""
    at, x = _geometry(call), call.input
    dims = len(at.kernel)
    if x.dim() < dims + 2:
        x = x.unsqueeze(0)
    if dims == 0:
        return x[tuple(positions)].float().unsqueeze(0)
    if any(map(any, at.padding)):
        x = nn.functional.pad(x, [size for pair in reversed(at.padding) for size in pair])
    index: list[Any] = [positions[0].view(-1, *[1] * dims), slice(None)]
    for dim in range(dims):
        taps = torch.arange(at.kernel[dim], device=x.device) * at.dilation[dim]
        shape = [1] * dims
        shape[dim] = -1
        places = (positions[1 + dim] * at.stride[dim]).unsqueeze(1) + taps
        index.append(places.view(len(places), *shape))
    gathered = x[
        tuple(index)
    ].float()  # [samples, *kernel, channels]: indexed dimensions come first
    by_group = gathered.movedim(-1, 1).reshape(len(gathered), at.groups, -1)
    return by_group.transpose(0, 1).contiguous()

"""Layer times at a grid of sizes, interpolated for the sizes between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_compress.compress.channels.axis_sizes import AxisSizes
from lit_compress.compress.channels.groups import ChannelAxis, ChannelGroups

__all__ = ["LayerGrids", "LayerLatency", "RestLatency"]


@dataclass(frozen=True, eq=False)
class LayerLatency:
    """The times of one layer as the network calls it.

    Attributes:
        name: The layer's name.
        calls: How often the network calls it in this way.
        axes: The first two dimensions of its weight; -1 for the channels of one that stays.
        sizes: The sizes at which it was timed, for each of the two: rising, the last one its size
            in the dense network.
        ms: Times of one call, float64 ``[len(sizes[0]), len(sizes[1])]``, never falling along
            either dimension.
        output_dim: Which of the two dimensions holds the channels that it makes.
        output_size: Numbers that one call makes for each index of that dimension.
    """

    name: str
    calls: int
    axes: tuple[ChannelAxis, ChannelAxis]
    sizes: tuple[Sequence[int], Sequence[int]]
    ms: Tensor
    output_dim: int
    output_size: float


@dataclass(frozen=True)
class RestLatency:
    """What a network takes beside its convolutions and linear layers.

    Norms, activations and sums work on what those make, so the time depends on how much that is.

    Attributes:
        outputs: Numbers that all calls of the layers make, for some plans, rising.
        ms: What is left of the network's time with each of them, at least 0 and never falling.
    """

    outputs: Sequence[float]
    ms: Sequence[float]

    def __call__(self, outputs: Tensor) -> Tensor:
        """The times, interpolated linearly; outside of ``outputs`` those at its ends.

        Args:
            outputs: Numbers made, float64, any shape.

        Returns:
            Milliseconds, float64, the same shape; never lower where more is made.
        """
        known = torch.tensor(self.outputs, dtype=torch.float64)
        ms = torch.tensor(self.ms, dtype=torch.float64)
        if len(known) == 1:
            return ms.expand(outputs.shape)
        below = (torch.searchsorted(known, outputs, right=True) - 1).clamp_(0, len(known) - 2)
        steps = known[1:] - known[:-1]
        part = ((outputs - known[below]) / steps[below]).clamp_(0, 1)
        return torch.lerp(ms[below], ms[below + 1], part)


class LayerGrids:
    """The times of all layers, ready to be read for many plans at once.

    Args:
        groups: The channels of the model.
        layers: Its layers.

    Raises:
        ValueError: If a layer was not timed at the size that an axis has.
    """

    def __init__(self, groups: ChannelGroups, layers: Sequence[LayerLatency]) -> None:
        for layer in layers:
            for axis, sizes in zip(layer.axes, layer.sizes, strict=True):
                if sizes[-1] != axis.channels.numel():
                    raise ValueError(
                        f"the layer {layer.name!r} was timed up to {sizes[-1]} indices in "
                        f"dimension {axis.dim} of its weight, which has {axis.channels.numel()}; "
                        "expected its size in the dense network last."
                    )
        self._sizes = AxisSizes(groups, [axis for layer in layers for axis in layer.axes])
        # Points beyond the last, of the same time, so that every size has a cell that it begins.
        width = 1 + max(len(sizes) for layer in layers for sizes in layer.sizes)
        points = [
            [*sizes, *range(sizes[-1] + 1, sizes[-1] + 1 + width - len(sizes))]
            for layer in layers
            for sizes in layer.sizes
        ]
        self._points = torch.tensor(points)
        self._steps = self._points.diff(dim=1)
        ms = torch.stack([layer.calls * _padded(layer.ms, width) for layer in layers])
        corners = [ms[:, :-1, :-1], ms[:, :-1, 1:], ms[:, 1:, :-1], ms[:, 1:, 1:]]
        self._cells = torch.stack(corners, 3).view(-1, 2, 2)
        self._columns = width - 1
        self._first_cells = torch.arange(len(layers))[:, None] * self._columns**2
        makes = [2 * index + layer.output_dim for index, layer in enumerate(layers)]
        self._makes = torch.tensor(makes)
        self._numbers = torch.tensor(
            [layer.calls * layer.output_size for layer in layers], dtype=torch.float64
        )

    def __call__(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Times of all calls of each layer, and how many numbers they make together.

        Args:
            kept: Channels kept, int64, shape ``[num_plans, num_groups]``.

        Returns:
            Milliseconds, float64 ``[num_plans, num_layers]``, and numbers, float64 ``[num_plans]``.
        """
        sizes = self._sizes(kept)[:, :-1].T.contiguous()
        below = (torch.searchsorted(self._points, sizes, right=True) - 1).clamp_(min=0)
        beyond = (sizes - self._points.gather(1, below)).clamp_(min=0).to(torch.float64)
        part = (beyond / self._steps.gather(1, below)).view(-1, 2, len(kept))
        row, column = below.view(-1, 2, len(kept)).unbind(1)
        cells = self._cells[self._first_cells + row * self._columns + column]
        between_rows = torch.lerp(cells[..., 0, :], cells[..., 1, :], part[:, 0, :, None])
        ms = torch.lerp(between_rows[..., 0], between_rows[..., 1], part[:, 1])
        return ms.T, self._numbers @ sizes[self._makes].to(torch.float64)


def _padded(ms: Tensor, width: int) -> Tensor:
    """The last row and column repeated, to the shape ``[width, width]``."""
    row, column = (torch.arange(width).clamp(max=size - 1) for size in ms.shape)
    return ms[row][:, column]

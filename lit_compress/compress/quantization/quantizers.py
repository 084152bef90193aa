"""Quantizers: modules that fake-quantize one tensor, with scale and zero point as state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress.compress.quantization.affine import (
    Grid,
    affine_parameters,
    fake_quantize,
    learned_fake_quantize,
)
from lit_compress.compress.quantization.saturation import safe_scale

__all__ = [
    "ActivationQuantizer",
    "DynamicQuantizer",
    "GateQuantizer",
    "Quantizer",
    "WeightQuantizer",
]

_LEAST_SCALE = 1e-12  # a learned scale stays positive


class Quantizer(nn.Module):
    """What activations and weights have in common: a grid, scales and whether they are learned.

    Its tensors stay in float32 and int32 whatever dtype the network around it is cast to.

    Attributes:
        grid: The integers.
        scale: float32, ``[]`` or ``[channels]``; a parameter where it is learned.
        zero_point: int32, of the same shape.
        observing: Whether the range follows the values that come.
        quantizing: Whether values are rounded.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid, shape: tuple[int, ...], learned: bool) -> None:
        super().__init__()
        self.grid = grid
        self.learned = learned
        self.observing = False
        self.quantizing = False
        scale = torch.ones(shape, dtype=torch.float32)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    @property
    def step(self) -> Tensor:
        """The scale by which it rounds: a learned one is kept positive; of that shape."""
        return self.scale.clamp_min(_LEAST_SCALE) if self.learned else self.scale

    @torch.no_grad()
    def set_scale(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Fix the grid's place, in place.

        Args:
            scale: Positive, of the shape of :attr:`scale`.
            zero_point: Integers on the grid; as it was where it is ``None``.
        """
        self.scale.copy_(scale)
        if zero_point is not None:
            self.zero_point.copy_(zero_point)

    def extra_repr(self) -> str:
        """Bits, and how the range is found."""
        how = "learned" if self.learned else "observed"
        return f"bits={self.grid.bits}, signed={self.grid.signed}, {how}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)  # type: ignore[no-untyped-call]


class ActivationQuantizer(Quantizer):
    """One scale for a whole activation.

    While it observes, in training mode, its range is a moving average of the batches' least and
    largest values (Jacob et al. 2018, section 3.1): ``range += momentum * (batch - range)``, from
    the first batch on. Batches with NaN or infinity, as mixed precision has at times, are left out.
    A learned scale is not moved by it; it starts where calibration put it.

    Args:
        grid: The integers, unsigned.
        learned: Whether the scale is a parameter.
        momentum: Weight of the newest batch, in (0, 1].
        extremes: Whether the range holds all values ever seen instead, for outputs, of which the
            largest matter most.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self, grid: Grid, learned: bool = False, momentum: float = 0.01, extremes: bool = False
    ) -> None:
        super().__init__(grid, (), learned)
        self.momentum = momentum
        self.extremes = extremes
        self.register_buffer("low", torch.tensor(math.nan, dtype=torch.float32))
        self.register_buffer("high", torch.tensor(math.nan, dtype=torch.float32))

    @property
    def ready(self) -> bool:
        """Whether it knows a range."""
        return not bool(torch.isnan(self.low))

    def forward(self, x: Tensor) -> Tensor:
        """The activation as it is, or rounded to the grid; same shape and dtype."""
        if not x.is_floating_point() or x.numel() == 0:
            return x
        if self.observing and self.training and not self.learned:
            self._follow(x.detach())
        if not self.quantizing:
            return x
        if self.learned:
            return learned_fake_quantize(x, self.step, self.zero_point, self.grid)
        return fake_quantize(x, self.scale, self.zero_point, self.grid)

    @torch.no_grad()
    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take a range that calibration found.

        Args:
            low: Scalar.
            high: Scalar.

        Raises:
            ValueError: If one of them is NaN or infinite.
        """
        self.set_scale(*affine_parameters(low, high, self.grid))
        self.low.copy_(low)
        self.high.copy_(high)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        low, high = (end.float() for end in torch.aminmax(x))
        first, usable = torch.isnan(self.low), torch.isfinite(low) & torch.isfinite(high)
        for end, new, outer in ((self.low, low, torch.minimum), (self.high, high, torch.maximum)):
            moved = outer(end, new) if self.extremes else end.lerp(new, self.momentum)
            moved = torch.where(first, new, moved)
            end.copy_(torch.where(usable, moved, end))
        known = self.low.nan_to_num(), self.high.nan_to_num()
        self.set_scale(*affine_parameters(*known, self.grid, checked=False))


class DynamicQuantizer(Quantizer):
    """One scale for a whole activation, from the range of each batch; it has nothing to remember.

    Args:
        grid: The integers, unsigned.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid, (), learned=False)

    @property
    def ready(self) -> bool:
        """It always is."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """The activation as it is, or rounded to a grid over its range; same shape and dtype."""
        if not (self.quantizing and x.is_floating_point() and x.numel()):
            return x
        with torch.no_grad():
            ends = torch.aminmax(x.detach())
            scale, zero_point = affine_parameters(ends.min, ends.max, self.grid, checked=False)
        return fake_quantize(x, scale, zero_point, self.grid)


class GateQuantizer(Quantizer):
    """One scale for a gate, whose range is 0 to 1; it has nothing to find or learn.

    Args:
        grid: The integers, unsigned.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid, (), learned=False)
        self.scale.fill_(1 / grid.high)

    @property
    def ready(self) -> bool:
        """It always is."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """The gate as it is, or rounded to the grid; same shape and dtype."""
        if not (self.quantizing and x.is_floating_point() and x.numel()):
            return x
        return fake_quantize(x, self.scale, self.zero_point, self.grid)


class WeightQuantizer(Quantizer):
    """A scale for each output channel of a weight, or one for all of them.

    Args:
        grid: The integers, signed.
        num_channels: Size of the weight along ``axis``; ``None`` for one scale.
        axis: The dimension of output channels.
        ranges: ``"minmax"``: scales follow the largest magnitude of each channel. ``"mse"``:
            they stay where calibration put them. ``"learned"``: they are trained.
        pair_axis: The dimension of output channels of a weight of which no two products are to
            saturate, see :func:`~lit_compress.compress.quantization.saturation.safe_scale`;
            ``None`` where that does not matter.
    """

    def __init__(
        self,
        grid: Grid,
        num_channels: int | None,
        axis: int = 0,
        ranges: str = "minmax",
        pair_axis: int | None = None,
    ) -> None:
        shape = () if num_channels is None else (num_channels,)
        super().__init__(grid, shape, learned=ranges == "learned")
        self.axis = None if num_channels is None else axis
        self.ranges = ranges
        self.pair_axis = pair_axis

    def forward(self, weight: Tensor) -> Tensor:
        """The weight as it is, or rounded to the grid; same shape and dtype."""
        if not self.quantizing:
            return weight
        rounded = learned_fake_quantize if self.learned else fake_quantize
        return rounded(weight, self.step_for(weight), self.zero_point, self.grid, self.axis)

    def step_for(self, weight: Tensor) -> Tensor:
        """The scale by which it rounds a weight, of the shape of :attr:`scale`."""
        if self.ranges == "minmax":
            self.follow(weight)
            return self.scale
        return self.safe(self.step, weight)

    def safe(self, scale: Tensor, weight: Tensor) -> Tensor:
        """A scale, or a larger one where two products of the weight's integers may saturate."""
        return scale if self.pair_axis is None else safe_scale(weight, scale, self.pair_axis)

    @torch.no_grad()
    def set_bits(self, bits: int) -> None:
        """Change the grid; the range stays.

        Args:
            bits: 2 to 8.
        """
        grid = Grid(bits, self.grid.signed)
        self.scale.mul_(self.grid.high / grid.high)
        self.grid = grid

    @torch.no_grad()
    def follow(self, weight: Tensor) -> None:
        """Fit the scales to the largest magnitude of each channel."""
        magnitude = weight.detach().abs().float()
        if self.axis is None:
            largest = magnitude.amax()
        else:
            largest = magnitude.transpose(0, self.axis).flatten(1).amax(1)
        scale, _ = affine_parameters(-largest, largest, self.grid, checked=False)
        self.scale.copy_(self.safe(scale, weight))

    def extra_repr(self) -> str:
        """Bits, ranges and axis."""
        return f"bits={self.grid.bits}, ranges={self.ranges}, axis={self.axis}"

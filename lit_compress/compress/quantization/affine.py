"""Affine quantization, ``x ~ (q - zero_point) * scale``, and its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Grid",
    "affine_parameters",
    "dequantize",
    "fake_quantize",
    "learned_fake_quantize",
    "quantize",
]

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class Grid:
    """The integers that values are rounded to.

    Attributes:
        bits: Bits of an integer, 2 to 8.
        signed: Signed grids are symmetric, ``-(2^(bits-1) - 1)`` to ``2^(bits-1) - 1`` with zero
            point 0, so that scaling a channel scales its grid and a change of sign stays on it;
            unsigned ones are 0 to ``2^bits - 1`` with any zero point.

    Raises:
        ValueError: If ``bits`` is no whole number from 2 to 8.
    """

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int):
            raise ValueError(f"bits is {self.bits!r}; give a whole number from 2 to 8.")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(f"bits is {self.bits}; expected {MIN_BITS} to {MAX_BITS}.")

    @property
    def low(self) -> int:
        """The least integer."""
        return -self.high if self.signed else 0

    @property
    def high(self) -> int:
        """The largest integer."""
        return (1 << (self.bits - 1 if self.signed else self.bits)) - 1


def affine_parameters(
    low: Tensor, high: Tensor, grid: Grid, checked: bool = True
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that put a range on a grid, zero exactly on an integer.

    Args:
        low: Least values, any shape; above zero counts as zero.
        high: Greatest values, the same shape; below zero counts as zero.
        grid: A signed grid takes the greater of ``|low|`` and ``|high|`` on both sides.
        checked: Whether to look for NaN, which has to wait for the device.

    Returns:
        Scales (float32, positive; 1 where the range is empty) and zero points (int32), of the
        shape of ``low``.

    Raises:
        ValueError: If a range is NaN or infinite.
    """
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    if checked and not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise ValueError(
            f"a range to quantize is {_first_bad(low, high)}; the values are NaN or infinite. Look "
            "at the input data and at the loss."
        )
    # Each end is divided by itself: their difference may be beyond float32.
    below, above = -low / grid.high, high / grid.high
    scale = torch.maximum(below, above) if grid.signed else below + above
    # Below the least normal number of float32 a division by the scale would overflow.
    scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))
    zero_point = torch.zeros_like(scale) if grid.signed else torch.round(-low / scale)
    return scale, zero_point.clamp(grid.low, grid.high).to(torch.int32)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, axis: int | None = None
) -> Tensor:
    """Integers (int32, the shape of ``x``) of real numbers, rounded half to even and clipped.

    Args:
        x: Real numbers, any shape.
        scale: Positive, a scalar, or one for each index of ``axis``.
        zero_point: Likewise; integers on the grid.
        grid: The integers to round to.
        axis: The dimension of ``x`` along which scales differ; ``None`` for one scale.
    """
    scale, zero_point = _along(scale, x, axis), _along(zero_point, x, axis)
    return _rounded(x, scale, zero_point, grid).to(torch.int32)


def dequantize(
    integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None
) -> Tensor:
    """Real numbers (float32) of integers; arguments as in :func:`quantize`."""
    scale, zero_point = _along(scale, integers, axis), _along(zero_point, integers, axis)
    return (integers - zero_point) * scale


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, axis: int | None = None
) -> Tensor:
    """Real numbers rounded to those that integers stand for; same shape and dtype.

    The gradient passes where ``x`` lies within the grid and is zero where it was clipped
    (straight-through estimator; Jacob et al. 2018, section 3).

    Args:
        x: Real numbers, any shape.
        scale: As in :func:`quantize`; no gradient reaches it.
        zero_point: Likewise.
        grid: The integers.
        axis: Likewise.
    """
    y = x if x.dtype == torch.float32 else x.float()
    if axis is None:
        y = torch.fake_quantize_per_tensor_affine(
            y, scale, zero_point.to(torch.int32), grid.low, grid.high
        )
    else:
        y = torch.fake_quantize_per_channel_affine(
            y, scale, zero_point.to(torch.int32), axis % x.dim(), grid.low, grid.high
        )
    return y.to(x.dtype)


def learned_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, axis: int | None = None
) -> Tensor:
    """As :func:`fake_quantize`, with a gradient for the scale (LSQ; Esser et al. 2020, section 2).

    The scale's gradient is divided by ``sqrt(n * grid.high)``, ``n`` the numbers that share it, so
    that scales and weights move by like parts of their size (section 2.2).

    Args:
        x: Real numbers, any shape.
        scale: Positive; a scalar, or one for each index of ``axis``.
        zero_point: Integers on the grid, of the shape of ``scale``; no gradient reaches them.
        grid: The integers.
        axis: As in :func:`quantize`.
    """
    result: Tensor = _Learned.apply(x, scale, zero_point, grid, axis)  # type: ignore[no-untyped-call]
    return result


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, axis: int | None
    ) -> Tensor:
        wide, zero = _along(scale, x, axis), _along(zero_point, x, axis)
        rounded = _rounded(x, wide, zero, grid) - zero
        in_steps = x.float() / wide
        # Equations 3 and 5 end at the outermost integers, half a step before fake_quantize clips;
        # at 2 bits that half step decides where the scale comes to rest.
        inside = (in_steps > grid.low - zero) & (in_steps < grid.high - zero)
        if ctx.needs_input_grad[1]:
            by_scale = rounded - in_steps * inside
            ctx.save_for_backward(inside, by_scale)
        else:
            ctx.save_for_backward(inside, None)
        ctx.axis, ctx.shape = axis, scale.shape
        ctx.factor = (max(x.numel() / max(scale.numel(), 1), 1) * grid.high) ** -0.5
        return (rounded * wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inside, by_scale = ctx.saved_tensors
        of_x = grad * inside if ctx.needs_input_grad[0] else None
        of_scale = None
        if by_scale is not None:
            each = grad.float() * by_scale
            if ctx.axis is None:
                total = each.sum()
            else:
                total = each.movedim(ctx.axis, 0).reshape(each.shape[ctx.axis], -1).sum(1)
            of_scale = (total * ctx.factor).reshape(ctx.shape)
        return of_x, of_scale, None, None, None


def _rounded(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Integers in float32; as torch's own operators and ONNX round, before the zero point."""
    steps = torch.round(x.float() * scale.reciprocal())
    return (steps + zero_point).clamp_(grid.low, grid.high)


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """One value a channel, shaped so that it meets its channel of ``x``."""
    if axis is None:
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _first_bad(low: Tensor, high: Tensor) -> str:
    bad = ~(torch.isfinite(low) & torch.isfinite(high)).flatten()
    place = int(torch.nonzero(bad)[0])
    return f"{float(low.flatten()[place])} to {float(high.flatten()[place])}"

"""The scale of each channel with the least squared rounding error of its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_compress.compress.quantization.affine import Grid
from lit_compress.compress.quantization.histogram import check_finite, check_grid

__all__ = ["mse_weight_scale"]

_WEIGHT_PARTS = (  # of the largest value: closely down to its half, which is all that 8 bits want
    *(1 - step / 128 for step in range(64)),
    *(0.5 * 2.0 ** (-step / 8) for step in range(25)),
)
_NUM_FITS = 4
_VALUES_AT_ONCE = 2**17


@torch.no_grad()
def mse_weight_scale(weight: Tensor, grid: Grid, axis: int | None = 0) -> Tensor:
    """The scale of each channel at which rounding its weights costs the least squared error.

    Scales from that of the largest absolute value down to 1/16 of it are tried. For the integers
    that the best one gives, the best scale is their least-squares factor, ``<w, q> / <q, q>``;
    rounding again and fitting again, the error falls until it stays. At 8 bits little is won over
    the largest value; below 5 bits much.

    Args:
        weight: Any shape and floating dtype.
        grid: A signed grid.
        axis: The dimension of channels: 0 for convolutions and linear layers, 1 for transposed
            convolutions; ``None`` for one scale.

    Returns:
        float32, shape ``[weight.shape[axis]]`` or ``[]``, on the device of ``weight``; 1 for
        channels that are all zero.

    Raises:
        ValueError: If ``grid`` is unsigned, ``axis`` is no dimension of ``weight``, or a weight is
            NaN or infinite.
    """
    if axis is None:
        return mse_weight_scale(weight.reshape(1, -1), grid)[0]
    check_grid(grid)
    if not grid.signed:
        raise ValueError(f"weights are rounded to a signed grid; {grid} came.")
    if isinstance(axis, bool) or not -weight.dim() <= axis < weight.dim():
        raise ValueError(
            f"axis is {axis} of a weight of shape {list(weight.shape)}; give the dimension of its "
            "output channels."
        )
    rows = weight.detach().float().movedim(axis, 0)
    rows = rows.reshape(len(rows), -1)
    if rows.numel() == 0:
        return rows.new_ones(len(rows))
    least, largest = rows.aminmax()
    check_finite(float(least), float(largest))
    # A few channels at a time, so that what is tried again and again stays in the cache.
    at_once = max(_VALUES_AT_ONCE // rows.shape[1], 1)
    return torch.cat([_best_scale(some, grid) for some in torch.split(rows, at_once)])


def _best_scale(rows: Tensor, grid: Grid) -> Tensor:
    """One scale a row: the best of those tried, then fitted to the integers it gives."""
    widest = rows.abs().amax(1) / grid.high
    widest = torch.where(widest > torch.finfo(torch.float32).tiny, widest, torch.ones_like(widest))
    best, error = widest, torch.full_like(widest, math.inf)
    for part in _WEIGHT_PARTS:
        best, error = _better(rows, grid, widest * part, best, error)
    for _ in range(_NUM_FITS):
        integers = _integers(rows, best, grid)
        squares = integers.square().sum(1)
        fitted = torch.where(squares > 0, (rows * integers).sum(1) / squares, best)
        best, error = _better(rows, grid, fitted, best, error)
    return best


def _better(
    rows: Tensor, grid: Grid, tried: Tensor, best: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """For each row the better of two scales, and its squared error."""
    rounded = _integers(rows, tried, grid).mul_(tried[:, None])
    tried_error = rounded.sub_(rows).square_().sum(1)
    better = tried_error < error
    return torch.where(better, tried, best), torch.where(better, tried_error, error)


def _integers(rows: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return (rows * scale.reciprocal()[:, None]).round_().clamp_(grid.low, grid.high)

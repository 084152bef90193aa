"""Weight scales with which no two int8 products together overflow 16 bits.

x86 without VNNI multiplies uint8 activations by int8 weights with ``vpmaddubsw``: the products of
two neighbouring weights are added in int16, which saturates. ONNX Runtime (MLAS), oneDNN (OpenVINO,
Inductor) and FBGEMM all do so with AVX2, and with AVX-512 where VNNI is missing. Since
``255 * 128 = 32640`` fits int16, two neighbours cannot overflow as long as their sum is at most 128
in magnitude. Halving the range of all weights (7 bits; ``reduce_range`` in PyTorch and ONNX
Runtime, ``overflow_fix`` in NNCF) makes sure of this too, but costs every weight a bit. Here the
scale of a channel grows until its own neighbours fit, at most to double.

Neighbours are weights that follow on one another in memory: input channels first, then the places
of the kernel. Pairs begin at even places. With an odd number of input channels libraries differ on
whether they fill them up, so there both neighbours of a weight count. Depthwise convolutions have
kernels of their own, which add in 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MAX_PAIR_SUM", "in_large_pairs", "largest_pair_sum", "may_saturate", "safe_scale"]

MAX_PAIR_SUM = 128
"""Largest magnitude of the sum of two neighbours (integers): 255 * 128 is below 2 ** 15."""
_INT16_MAX = 2**15 - 1
# Two real numbers with this sum become integers with a sum of at most MAX_PAIR_SUM: for both to be
# rounded up, their fractions would have to sum to 1 at least. The margin is for float32.
_REAL_PAIR_SUM = MAX_PAIR_SUM - 2.0**-7
_TOLERANCE = 1e-5  # integers times a scale, with a sum of MAX_PAIR_SUM, keep that scale


def may_saturate(weight_high: float, activation_high: int) -> bool:
    """Whether the products of two weights and activations up to these can exceed int16 together.

    Args:
        weight_high: Largest magnitude of a weight; of two different ones their mean.
        activation_high: Largest activation.
    """
    return 2 * weight_high * activation_high > _INT16_MAX


def largest_pair_sum(weight: Tensor, axis: int = 0) -> Tensor:
    """The largest magnitude of the sum of two neighbours, for each output channel.

    Args:
        weight: ``[out, in, ...]``, or ``[in, out, ...]`` with ``axis=1``; integers or real numbers.
        axis: The dimension of output channels, 0 or 1.

    Returns:
        ``[out]``, of the dtype of ``weight``; 0 for channels of one weight.
    """
    rows = _in_memory_order(weight, axis)
    largest = rows.new_zeros(len(rows))
    for start in _starts(weight, axis):
        pairs = _pairs(rows, start)
        if pairs.numel():
            largest = torch.maximum(largest, pairs.sum(2).abs().amax(1))
    return largest


def safe_scale(weight: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    """The smallest scale, from the given one on, at which no two neighbours can saturate.

    Args:
        weight: Float, ``[out, in, ...]``, or ``[in, out, ...]`` with ``axis=1``.
        scale: float32, positive, ``[out]``; ``[]`` for one scale for all channels.
        axis: The dimension of output channels, 0 or 1.

    Returns:
        Of the shape of ``scale``, which stays as it is, bit by bit, where it is large enough.
        Weights divided by it and rounded to nearest have no pair above :data:`MAX_PAIR_SUM`.
    """
    largest = largest_pair_sum(weight.detach().float(), axis)
    if scale.dim() == 0:
        largest = largest.amax()
    too_small = largest > MAX_PAIR_SUM * (1 + _TOLERANCE) * scale
    return torch.where(too_small, largest / _REAL_PAIR_SUM, scale)


def in_large_pairs(weight: Tensor, bound: Tensor, axis: int = 0) -> Tensor:
    """Which weights have a neighbour with which their sum exceeds a bound in magnitude.

    Args:
        weight: ``[out, in, ...]``, or ``[in, out, ...]`` with ``axis=1``.
        bound: ``[out]`` or ``[]``.
        axis: The dimension of output channels, 0 or 1.

    Returns:
        bool, of the shape of ``weight``.
    """
    rows = _in_memory_order(weight, axis)
    found = torch.zeros_like(rows, dtype=torch.bool)
    for start in _starts(weight, axis):
        pairs = _pairs(rows, start)
        over = pairs.sum(2).abs() > bound.reshape(-1, 1)
        found[:, start : start + 2 * pairs.shape[1]] |= over.repeat_interleave(2, dim=1)
    shape = weight.movedim(axis, 0).movedim(1, -1).shape
    return found.reshape(shape).movedim(-1, 1).movedim(0, axis)


def _starts(weight: Tensor, axis: int) -> tuple[int, ...]:
    """Where the pairs of a channel begin: at even places, and at odd ones if libraries differ."""
    inputs = weight.shape[1 - axis]
    return (0,) if inputs % 2 == 0 else (0, 1)


def _pairs(rows: Tensor, start: int) -> Tensor:
    """``[out, pairs, 2]``; a last weight without a neighbour is left out."""
    count = max(rows.shape[1] - start, 0) // 2
    return rows[:, start : start + 2 * count].reshape(len(rows), count, 2)


def _in_memory_order(weight: Tensor, axis: int) -> Tensor:
    """``[out, weights]``: for each place of the kernel all input channels."""
    rows = weight.movedim(axis, 0)
    return rows.movedim(1, -1).reshape(len(rows), -1)

"""Learnable rounding: for each weight a number between down and up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lit_compress.compress.quantization.affine import Grid
from lit_compress.compress.quantization.saturation import (
    MAX_PAIR_SUM,
    in_large_pairs,
    largest_pair_sum,
)

__all__ = ["LayerProblem", "SoftRounding", "learn"]

_STRETCH = (-0.1, 1.1)  # gamma and zeta of equation 23: 0 and 1 are reached, not only approached
_SAMPLES_AT_ONCE = 256
_WARM_UP = 0.2  # share of the steps without a push to either side
_SHARPNESS = (20.0, 2.0)  # beta of equation 24, from and to


@dataclass(frozen=True)
class LayerProblem:
    """What a layer reads and what it should give.

    Attributes:
        patches: float32, ``[groups, samples, inputs]``: what each group of output channels reads.
        bias: ``[channels]``, or ``None``.
        targets: ``[samples, channels]``, behind what is fused.
        behind: What is fused behind the layer: ``[samples, channels]`` before and after.
    """

    patches: Tensor
    bias: Tensor | None
    targets: Tensor
    behind: Callable[[Tensor], Tensor]

    def error(self, weight: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Squared error relative to the mean square of the targets, a scalar.

        Args:
            weight: ``[channels, ...]``.
            chosen: Indices of samples; all of them where it is ``None``.
        """
        patches, targets = self.patches, self.targets
        if chosen is not None:
            patches, targets = patches[:, chosen], targets[chosen]
        rows = weight.reshape(len(patches), -1, patches.shape[2])
        y = torch.bmm(patches, rows.transpose(1, 2))  # [groups, samples, channels of a group]
        y = y.transpose(0, 1).flatten(1)
        y = self.behind(y if self.bias is None else y + self.bias)
        return (y - targets).square().mean() / self._size

    @cached_property
    def _size(self) -> Tensor:
        """Mean square of the targets; 1 where all of them are zero."""
        size = self.targets.square().mean()
        return torch.where(size > torch.finfo(torch.float32).tiny, size, 1.0)


class SoftRounding:
    """A weight on a grid, each value between the integer below and the one above.

    Zeros, and values outside of the grid, have one place only.

    Args:
        weight: float32, channels in dimension 0.
        scale: ``[channels]`` or ``[]``.
        grid: A signed grid.
        keep_greatest: Whether the largest magnitude that shares a scale stays as it is, for scales
            that follow it; with ``pairs`` the neighbours with the largest sum, too.
        pairs: Whether no two neighbours are to saturate, see
            :mod:`~lit_compress.compress.quantization.saturation`; the scale has to allow it.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, grid: Grid, keep_greatest: bool, pairs: bool = False
    ) -> None:
        self._weight, self._pairs = weight, pairs
        self._scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
        self._grid = grid
        steps = (weight / self._scale).clamp(grid.low, grid.high)
        self._nearest = torch.round(weight * self._scale.reciprocal()).clamp(grid.low, grid.high)
        self._below = torch.floor(steps)
        self._part = steps - self._below
        self._fixed = (weight == 0) | (steps.abs() >= grid.high)
        if keep_greatest:
            magnitude = weight.abs()
            dims = list(range(1, weight.dim())) if scale.dim() else list(range(weight.dim()))
            self._fixed |= magnitude == magnitude.amax(dims, keepdim=True)
        self._kept = torch.zeros_like(self._fixed)
        if keep_greatest and pairs:
            largest = largest_pair_sum(weight)
            largest = largest if scale.dim() else largest.amax()
            self._kept = in_large_pairs(weight, largest * (1 - 1e-6))
            self._fixed |= self._kept

    def start(self) -> Tensor:
        """The variable of each weight at which nothing is rounded (equation 23 solved for it)."""
        low, high = _STRETCH
        return -torch.log((high - low) / (self._part - low) - 1)

    def up(self, variable: Tensor) -> Tensor:
        """How far up each weight goes, 0 to 1: a stretched and clipped sigmoid (equation 23)."""
        low, high = _STRETCH
        return (torch.sigmoid(variable) * (high - low) + low).clamp(0, 1)

    def soft(self, up: Tensor) -> Tensor:
        """Weights between two integers each."""
        return self._weights(torch.where(self._fixed, self._nearest, self._below + up))

    def hard(self, variable: Tensor) -> Tensor:
        """Weights on the grid."""
        steps = self._below + (self.up(variable) >= 0.5).float()
        steps = torch.where(self._fixed, self._nearest, steps)
        if self._pairs:  # a sum of MAX_PAIR_SUM would move a scale that follows the largest one
            over = in_large_pairs(steps, steps.new_tensor(MAX_PAIR_SUM - 1))
            steps = torch.where(over, self._nearest, steps)
        return self._weights(steps)

    @property
    def nearest(self) -> Tensor:
        """Weights on the grid, each rounded to the nearest."""
        return self._weights(self._nearest)

    def _weights(self, steps: Tensor) -> Tensor:
        """Multiples of the scale, but for neighbours that the scale follows."""
        rounded = steps.clamp(self._grid.low, self._grid.high) * self._scale
        return torch.where(self._kept, self._weight, rounded)

    def undecided(self, up: Tensor, sharpness: float) -> Tensor:
        """Sum of ``1 - |2 up - 1|^sharpness`` over the weights that can move (equation 24)."""
        each = 1 - (2 * up - 1).abs().pow(sharpness)
        return torch.where(self._fixed, 0.0, each).sum()

    def flipped(self, weight: Tensor) -> float:
        """Share of the weights that are on another integer than the nearest one."""
        integers = torch.round(weight / self._scale)
        return float((integers != self._nearest).float().mean())


def learn(
    problem: LayerProblem,
    rounding: SoftRounding,
    num_iterations: int,
    lr: float,
    regularization: float,
    generator: torch.Generator,
) -> tuple[Tensor, float, float]:
    """Learn up or down for each weight of a layer.

    The error is taken relative to the targets' mean square and times the number of channels, so
    that ``regularization`` means the same for every layer; for outputs of mean square 1, as behind
    a batch norm, this is the paper's loss.

    Args:
        problem: The layer.
        rounding: Its weights.
        num_iterations: Steps of Adam.
        lr: Learning rate.
        regularization: Weight of :meth:`SoftRounding.undecided`.
        generator: Chooses the samples of each step; on the CPU.

    Returns:
        Weights on the grid, and the errors of the nearest rounding and of them; the nearest ones
        where no better ones were found.
    """
    num_samples, num_channels = problem.targets.shape
    variable = rounding.start().requires_grad_()
    optimizer = torch.optim.Adam([variable], lr=lr)
    begin = int(_WARM_UP * num_iterations)
    for step in range(num_iterations):
        chosen = torch.randint(num_samples, (_SAMPLES_AT_ONCE,), generator=generator)
        with torch.enable_grad():
            up = rounding.up(variable)
            loss = num_channels * problem.error(rounding.soft(up), chosen.to(up.device))
            if step >= begin:
                sharpness = _sharpness((step - begin) / max(num_iterations - begin, 1))
                loss = loss + regularization * rounding.undecided(up, sharpness)
            (variable.grad,) = torch.autograd.grad(loss, [variable])
        optimizer.step()
    with torch.no_grad():
        learned, nearest = rounding.hard(variable.detach()), rounding.nearest
        before, after = float(problem.error(nearest)), float(problem.error(learned))
    return (learned, before, after) if after < before else (nearest, before, before)


def _sharpness(progress: float) -> float:
    """Beta falls along a straight line; ``progress`` goes from 0 to 1."""
    first, last = _SHARPNESS
    return first + (last - first) * progress

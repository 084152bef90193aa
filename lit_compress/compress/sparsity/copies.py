"""Hundreds of sparse copies of one dense network, each with weights by least squares.

A search asks for many ways to share zeros among the layers of the same network. Which weights of a
layer go depends on its own density only, and since each layer is to give its dense outputs for its
dense inputs, so do the weights that are left. Every layer is therefore solved once for each of its
densities, from sums that are gathered once, and a copy whose layers were all met before costs no
more than copying.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_compress.compress.batch_norm import recalibrate_batch_norm
from lit_compress.compress.calibration import Forward
from lit_compress.compress.channels.normal_equations import NormalEquations
from lit_compress.compress.channels.reconstruction import gather_equations, reason_to_leave
from lit_compress.compress.layer_weights import layer_weights
from lit_compress.compress.sparsity.magnitude import magnitude_masks
from lit_compress.compress.weight_cache import Rewritten, WeightCache

__all__ = ["SparseCopies"]


class SparseCopies:
    """Makes the network that keeps a share of the weights of each layer, the dense one staying.

    In each layer the weights of largest magnitude stay. Once :meth:`gather` was called, they are
    tuned to reproduce the dense output, as PocketFlow does by gradient steps; here by least
    squares, each output with its own weights, see :meth:`NormalEquations.solve_masked`. Grouped
    convolutions and layers that share their weight keep the values that they have.

    Args:
        network: The dense network.
        layers: Names of the modules whose weights can become sparse.
        ridge: Pull towards the dense weights, see :meth:`NormalEquations.solve_masked`.
        max_bytes: Solved weights that are kept at most.

    Attributes:
        equations: The regression of each layer, once it was gathered.

    Raises:
        ValueError: If ``layers`` holds a name of no such layer, or one twice.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        *,
        ridge: float = 1e-3,
        max_bytes: int = 2**28,
    ) -> None:
        self._network = network
        self._weights = layer_weights(network, layers)
        self._ridge = ridge
        self.equations: dict[str, NormalEquations] = {}
        self._solved = WeightCache(max_bytes)
        self._batch_norm_batches: list[Any] = []
        self._forward: Forward | None = None

    def gather(
        self,
        batches: Iterable[Any],
        forward: Forward,
        *,
        num_points: int = 10,
        num_batch_norm_batches: int = 0,
        seed: int = 0,
    ) -> None:
        """Gather what least squares needs; without it, weights that stay keep their values.

        Args:
            batches: Calibration batches from training data.
            forward: Runs a network on one batch.
            num_points: Output positions looked at in each image and layer, at least 1.
            num_batch_norm_batches: The first batches of these are kept, and the batch norm
                statistics of each copy are computed again on them; with 0 they stay those of the
                dense network. Least squares shrinks outputs, layer after layer, so that with few
                weights left new statistics decide whether a copy works at all.
            seed: For the positions.

        Raises:
            ValueError: If ``num_batch_norm_batches`` is negative, and as
                :func:`~lit_compress.compress.channels.reconstruction.gather_equations`.
        """
        if num_batch_norm_batches < 0:
            raise ValueError(
                f"num_batch_norm_batches is {num_batch_norm_batches}, expected at least 0."
            )
        first: list[Any] = []

        def keeping_the_first() -> Iterator[Any]:
            for batch in batches:
                if len(first) < num_batch_norm_batches:
                    first.append(batch)
                yield batch

        layers = [name for name in self._weights if reason_to_leave(self._network, name) is None]
        self.equations = gather_equations(
            layers, self._network, keeping_the_first(), forward, num_points=num_points, seed=seed
        )
        self._solved.clear()
        self._batch_norm_batches, self._forward = first, forward

    def __call__(self, densities: Mapping[str, float]) -> nn.Module:
        """The network with some density of each layer.

        Args:
            densities: Weights kept / weights, in (0, 1], by layer; layers that are not named stay
                dense. Of N weights exactly ``round(density * N)`` are kept.

        Raises:
            ValueError: If a name is none of the layers, or a density out of range.
        """
        sparse = copy.deepcopy(self._network)
        with torch.no_grad():
            for layer, density in densities.items():
                num_zeros = self._num_zeros(layer, density)
                if num_zeros:
                    key = layer, num_zeros
                    new = self._solved.get(key, partial(self._rewritten, *key))
                    _write(sparse.get_submodule(layer), new)
        if self._forward is not None and self._batch_norm_batches:
            recalibrate_batch_norm(sparse, self._batch_norm_batches, self._forward)
        return sparse

    def _num_zeros(self, layer: str, density: float) -> int:
        if layer not in self._weights:
            raise ValueError(
                f"densities names {layer!r}; expected layers among "
                f"{', '.join(map(repr, self._weights))}."
            )
        if not 0 < density <= 1:
            raise ValueError(
                f"the density of {layer!r} is {density}, expected weights kept / weights in (0, 1]."
            )
        size = self._weights[layer].numel()
        return size - round(density * size)

    def _rewritten(self, layer: str, num_zeros: int) -> Rewritten:
        """The weight of a layer with so many zeros, and the bias that goes with it."""
        weight = self._weights[layer].detach()
        mask = magnitude_masks({layer: weight}, {layer: num_zeros})[layer]
        if layer not in self.equations:
            return torch.where(mask, weight, torch.zeros_like(weight)), None
        bias = cast("Tensor | None", self._network.get_submodule(layer).bias)
        solved, offset = self.equations[layer].solve_masked(
            weight.flatten(1), bias, mask.flatten(1), ridge=self._ridge
        )
        return solved.view_as(weight), offset


def _write(module: nn.Module, new: Rewritten) -> None:
    weight, bias = new
    module.get_parameter("weight").copy_(weight)
    if bias is not None:
        module.get_parameter("bias").copy_(bias)

"""Hundreds of slim copies of one dense network, each with weights by least squares.

A search asks for many ways to cut the same network. What does not depend on the cut is done once:
channels are ranked, and the sums of each layer's regression (its dense outputs on its dense inputs)
are gathered. A copy then costs a solve for each layer that lost inputs, and since the rows of a
regression do not depend on each other, solved weights are kept and serve every cut that leaves the
layer the same inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_compress.compress.calibration import Forward
from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.normal_equations import NormalEquations
from lit_compress.compress.channels.output_samples import Layer
from lit_compress.compress.channels.plan import ChannelPlan, choose_channels
from lit_compress.compress.channels.reconstruction import gather_equations, layers_to_reconstruct
from lit_compress.compress.weight_cache import WeightCache

__all__ = ["SlimCopies"]


class SlimCopies:
    """Makes the network that a plan leaves, the dense one staying as it is.

    Args:
        network: The dense network.
        groups: Its channels.
        scores: How much each channel matters, shape ``[groups.num_channels]``; of each group those
            with the highest scores stay, so that the copies are nested.
        ridge: Pull towards the dense weights, see :meth:`NormalEquations.solve`.
        max_bytes: Solved weights that are kept at most.

    Attributes:
        equations: The regression of each layer, once it was gathered.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        scores: Tensor,
        *,
        ridge: float = 1e-3,
        max_bytes: int = 2**28,
    ) -> None:
        self._network = network
        self._groups = groups
        self._scores = scores
        self._ridge = ridge
        self.equations: dict[str, NormalEquations] = {}
        self._solved = WeightCache(max_bytes)

    def gather(
        self,
        batches: Iterable[Any],
        forward: Forward,
        *,
        num_points: int = 10,
        seed: int = 0,
    ) -> None:
        """Gather what least squares needs; without it, copies keep their dense weights.

        Args:
            batches: Calibration batches from training data.
            forward: Runs a network on one batch.
            num_points: Output positions looked at in each image and layer, at least 1.
            seed: For the positions.

        Raises:
            ValueError: As :func:`~lit_compress.compress.channels.reconstruction.gather_equations`.
        """
        layers = layers_to_reconstruct(self._network, self._groups)
        self.equations = gather_equations(
            layers, self._network, batches, forward, num_points=num_points, seed=seed
        )
        self._solved.clear()

    def keep(self, plan: ChannelPlan) -> Tensor:
        """The channels that a plan keeps: bool, shape ``[groups.num_channels]``."""
        return choose_channels(self._groups, plan, self._scores)

    def __call__(self, plan: ChannelPlan) -> nn.Module:
        """The network that a plan leaves.

        Raises:
            ValueError: If the plan is for another network.
        """
        keep = self.keep(plan)
        slim = copy.deepcopy(self._network)
        cut_channels(slim, self._groups, keep)
        kept = self._groups.kept_indices(keep)
        with torch.no_grad():
            for layer, equations in self.equations.items():
                dims = kept.get(f"{layer}.weight", {})
                if 1 in dims:
                    self._rewrite(layer, slim, equations, dims)
        return slim

    def _rewrite(
        self, layer: str, slim: nn.Module, equations: NormalEquations, dims: Mapping[int, Tensor]
    ) -> None:
        weight, bias = self._rows(layer, equations, dims[1])
        if 0 in dims:
            weight = weight[dims[0]]
            bias = None if bias is None else bias[dims[0]]
        module = cast(Layer, slim.get_submodule(layer))
        module.weight.copy_(weight.view_as(module.weight))
        if bias is not None:
            module.bias.copy_(bias)  # type: ignore[union-attr]

    def _rows(
        self, layer: str, equations: NormalEquations, inputs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The weights of all outputs for some inputs, flat, and the bias."""

        def solve() -> tuple[Tensor, Tensor | None]:
            module = cast(Layer, self._network.get_submodule(layer))
            dense = module.weight.detach()
            start = dense[:, inputs.to(dense.device)].flatten(1)
            taps = dense[0, 0].numel()
            columns = (inputs.unsqueeze(1) * taps + torch.arange(taps)).flatten()
            return equations.solve(start, module.bias, inputs=columns, ridge=self._ridge)

        return self._solved.get((layer, inputs.numpy().tobytes()), solve)

"""The search space over densities of layers: the problem, and networks of choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lit_compress.compress.layer_weights import layer_weights
from lit_compress.compress.layers import select_weights
from lit_compress.compress.sparsity.copies import SparseCopies
from lit_compress.compress.sparsity.magnitude import apportion, check_sparsity
from lit_compress.search.layer_features import layer_features
from lit_compress.search.problem import Budget, Choice, Cost, Decision, RatioProblem, chosen_levels

__all__ = ["SparsitySpace", "density_levels", "exact_sparsities", "sparse_layers"]


class SparsitySpace:
    """Makes problems of the weights of a network's layers, and the network of each choice.

    The bounds of a layer's density are those of PocketFlow's search: with the sparsity ``r`` of
    all layers together, from ``(1 - r) / 3`` to ``min(3 (1 - r), 1)``.

    Args:
        network: The dense network.
        layers: Names of the layers to decide on, in forward order; see :func:`sparse_layers`.
        copies: Makes sparse copies of the network.
        layer_macs: MACs of each layer for one example, by module name; of all layers, not
            only of those that are decided on.
        target_sparsity: Zeros / weights of all these layers together, in (0, 1).
        num_levels: Densities that a layer can choose from, at most; at least 2.

    Attributes:
        sizes: Weights of each layer.
        budget: What the target leaves: the cost ``"weights"``.
        worth: The magnitudes of each layer's weights.

    Raises:
        ValueError: If an argument is out of range, or a layer is not in the network.
    """

    name = "sparsity"

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        copies: SparseCopies,
        layer_macs: Mapping[str, int],
        *,
        target_sparsity: float,
        num_levels: int = 24,
    ) -> None:
        check_sparsity("target_sparsity", target_sparsity)
        if target_sparsity == 0:
            raise ValueError("target_sparsity is 0: nothing is to be removed. Give more than that.")
        if num_levels < 2:
            raise ValueError(f"num_levels is {num_levels}, expected at least 2.")
        weights = layer_weights(network, layers)
        self.sizes = {name: weight.numel() for name, weight in weights.items()}
        self.target_sparsity = float(target_sparsity)
        self._copies = copies
        self.worth: tuple[Tensor, ...] | None = tuple(w.detach().abs() for w in weights.values())
        described = layer_features(network, layers, layer_macs)
        self.decisions = tuple(
            Decision(
                name,
                density_levels(size, target_sparsity, num_levels),
                1.0,
                features,
                by_level=True,
            )
            for (name, size), features in zip(self.sizes.items(), described, strict=True)
        )
        self.costs = _costs(network, weights, layer_macs)
        total = sum(self.sizes.values())
        self.budget = Budget("weights", float(total - round(target_sparsity * total)))

    def problem(self, budget: Budget | None) -> RatioProblem:
        """The problem under a budget, which is :attr:`budget` to meet the target.

        Raises:
            ValueError: As :class:`~lit_compress.search.problem.RatioProblem`.
        """
        return RatioProblem(self.decisions, self.costs, budget)

    def sparsities(self, choice: Choice) -> dict[str, float]:
        """Zeros / weights of each layer, in [0, 1)."""
        densities = chosen_levels(self.decisions, choice)
        return {name: 1 - density for name, density in densities.items()}

    def exact(self, choice: Choice) -> dict[str, float]:
        """The same, corrected so that all layers together have exactly the target's zeros.

        A choice keeps up to one step of a level fewer weights than the target allows; see
        :func:`exact_sparsities`.
        """
        return exact_sparsities(self.sparsities(choice), self.sizes, self.target_sparsity)

    def network(self, choice: Choice) -> nn.Module:
        """The sparse network of a choice, in evaluation mode."""
        return self._copies(chosen_levels(self.decisions, choice)).eval()


def sparse_layers(
    network: nn.Module, ignored_layers: Sequence[str] | None = None, prefix: str = ""
) -> list[str]:
    """Layers whose sparsity can be searched: convolutions, except depthwise ones, and linear ones.

    Args:
        network: The network.
        ignored_layers: Name patterns of layers to leave dense; see
            :func:`~lit_compress.compress.layers.match_layers`.
        prefix: Dotted name of the network in a LightningModule, which patterns may begin with.

    Returns:
        Their names in the network's order.

    Raises:
        ValueError: If a pattern matches no layer, or nothing is left.
    """
    selection = select_weights(
        network, ignored_layers=ignored_layers, layer_types=("conv", "linear"), prefix=prefix
    )
    return [name.removesuffix(".weight") for name in selection.names]


def density_levels(size: int, target_sparsity: float, num_levels: int = 24) -> tuple[float, ...]:
    """Densities that a layer can have, in geometric steps between PocketFlow's bounds.

    Args:
        size: Its weights, at least 1.
        target_sparsity: Of all layers together, in (0, 1).
        num_levels: The number of densities, at least 2.

    Returns:
        Rising, each a whole number of weights / ``size``, at least one weight; fewer where two
        would be the same.

    Examples:
        >>> [round(density * 90) for density in density_levels(90, 0.9, 3)]
        [3, 9, 27]
    """
    share = 1 - target_sparsity
    low, high = share / 3, min(3 * share, 1.0)
    densities = (low * (high / low) ** (step / (num_levels - 1)) for step in range(num_levels))
    kept = sorted({min(max(round(density * size), 1), size) for density in densities})
    return tuple(number / size for number in kept)


def exact_sparsities(
    sparsities: Mapping[str, float], sizes: Mapping[str, int], target_sparsity: float
) -> dict[str, float]:
    """Sparsities near given ones with which all layers together meet a target to the weight.

    The weights kept are scaled alike in all layers and rounded by the largest remainder.

    Args:
        sparsities: Zeros / weights of each layer, in [0, 1).
        sizes: Weights of each.
        target_sparsity: Zeros / weights of all of them together, in [0, 1).

    Returns:
        For each layer a sparsity ``s`` with which ``sum(round(s * size))`` is
        ``round(target_sparsity * sum(sizes))``; at least one weight is kept in each.

    Raises:
        ValueError: If a sparsity is out of range, or the target leaves fewer weights than layers.

    Examples:
        >>> exact_sparsities({"a": 0.8, "b": 0.9}, {"a": 10, "b": 100}, 0.88)
        {'a': 0.8, 'b': 0.89}
    """
    for layer, sparsity in sparsities.items():
        check_sparsity(f"sparsity of {layer!r}", sparsity)
    check_sparsity("target_sparsity", target_sparsity)
    counts = [sizes[layer] for layer in sparsities]
    wanted = sum(counts) - round(target_sparsity * sum(counts))
    if wanted < len(counts):
        raise ValueError(
            f"target_sparsity is {target_sparsity}, which leaves {wanted} weights for "
            f"{len(counts)} layers; give a lower one, or ignore the smallest layers."
        )
    kept = [(1 - sparsities[layer]) * sizes[layer] for layer in sparsities]
    # One weight of each layer is set aside, so that none is left without.
    spare = wanted - len(kept)
    beyond = [max(number - 1, 0.0) for number in kept]
    scale = spare / sum(beyond) if sum(beyond) else 0.0
    more = apportion(spare, [scale * b for b in beyond], [count - 1 for count in counts])
    pairs = zip(sparsities, counts, more, strict=True)
    return {layer: (count - 1 - extra) / count for layer, count, extra in pairs}


def _costs(
    network: nn.Module, weights: Mapping[str, nn.Parameter], layer_macs: Mapping[str, int]
) -> dict[str, Cost]:
    """Weights kept; MACs, parameters and bytes of those and of all else."""
    sizes = torch.tensor([w.numel() for w in weights.values()], dtype=torch.float64)
    macs = torch.tensor([layer_macs.get(name, 0) for name in weights], dtype=torch.float64)
    widths = torch.tensor([w.element_size() for w in weights.values()], dtype=torch.float64)
    other_macs = sum(layer_macs.values()) - float(macs.sum())
    other_params = sum(p.numel() for p in network.parameters()) - float(sizes.sum())
    tensors = (*network.parameters(), *network.buffers())
    other_bytes = sum(t.nbytes for t in tensors) - float((sizes * widths).sum())

    def kept(values: Tensor) -> Tensor:
        return (values * sizes).round()

    def size_bytes(values: Tensor) -> Tensor:
        # A mask of one bit for each weight and the weights kept, where that is less than all.
        masked = (sizes / 8).ceil() + kept(values) * widths
        return torch.minimum(masked, sizes * widths).sum(1) + other_bytes

    return {
        "weights": lambda values: kept(values).sum(1),
        "macs": lambda values: values @ macs + other_macs,
        "num_params": lambda values: kept(values).sum(1) + other_params,
        "size_bytes": size_bytes,
    }

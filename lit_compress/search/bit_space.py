"""The search space over bits of each layer's weights: the problem, and networks of choices."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lit_compress.compress.layer_weights import layer_weights
from lit_compress.compress.layers import layer_type, match_layers
from lit_compress.compress.quantization.affine import MAX_BITS, MIN_BITS, Grid, fake_quantize
from lit_compress.compress.quantization.sizes import stored_bytes
from lit_compress.compress.quantization.weight_scales import mse_weight_scale
from lit_compress.compress.weight_cache import Rewritten, WeightCache
from lit_compress.search.layer_features import layer_features
from lit_compress.search.problem import Budget, Choice, Cost, Decision, RatioProblem, chosen_levels

__all__ = ["BitSpace", "quantizable_layers"]

_BYTES_OF_A_SCALE = 4
_NOT_QUANTIZED = (nn.Bilinear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class BitSpace:
    """Makes problems of the bits of a network's layers, and the network of each choice.

    Weights are rounded to a signed grid for each output channel, with the scale of least squares;
    activations stay as they are.

    Args:
        network: The network in floating point.
        layers: Names of the layers to decide on, convolutions and linear ones in forward order; see
            :func:`quantizable_layers`.
        layer_macs: MACs of each layer for one example, by module name.
        min_bits: The fewest bits, from 2.
        max_bits: The most bits, up to 8.
        max_bytes: Rounded weights that are kept at most.

    Attributes:
        decisions: One for each layer: bits from ``min_bits`` to ``max_bits``, of 8.
        costs: ``"mean_bits"``: bits of a weight, on the mean of all weights of these layers.
            ``"size_bytes"``: bytes of the network with these weights packed, a scale of 4 bytes for
            each output channel, and all else as it is in memory.

    Raises:
        ValueError: If an argument is out of range, or a layer is not in the network.
    """

    name = "bits"
    worth: tuple[Tensor, ...] | None = None

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        layer_macs: Mapping[str, int],
        *,
        min_bits: int = MIN_BITS,
        max_bits: int = MAX_BITS,
        max_bytes: int = 2**28,
    ) -> None:
        if not MIN_BITS <= min_bits < max_bits <= MAX_BITS:
            raise ValueError(
                f"min_bits is {min_bits} and max_bits {max_bits}; expected {MIN_BITS} <= min_bits "
                f"< max_bits <= {MAX_BITS}."
            )
        self._network = network
        self._weights = layer_weights(network, layers)
        self._rounded = WeightCache(max_bytes)
        levels = tuple(float(bits) for bits in range(min_bits, max_bits + 1))
        described = layer_features(network, layers, layer_macs)
        self.decisions = tuple(
            Decision(name, levels, MAX_BITS, features, by_level=True)
            for name, features in zip(layers, described, strict=True)
        )
        self.costs = _costs(network, self._weights)

    def problem(self, budget: Budget | None) -> RatioProblem:
        """The problem under a budget, as in ``Budget("mean_bits", 4.0)``.

        Raises:
            ValueError: As :class:`~lit_compress.search.problem.RatioProblem`.
        """
        return RatioProblem(self.decisions, self.costs, budget)

    def layer_bits(self, choice: Choice) -> dict[str, int]:
        """Bits of each layer's weights, for the ``layer_bits`` of quantization."""
        return {name: int(bits) for name, bits in chosen_levels(self.decisions, choice).items()}

    def network(self, choice: Choice) -> nn.Module:
        """The network with the rounded weights of a choice, in evaluation mode."""
        rounded = copy.deepcopy(self._network)
        with torch.no_grad():
            for layer, bits in self.layer_bits(choice).items():
                weight, _ = self._rounded.get((layer, bits), partial(self._round, layer, bits))
                rounded.get_submodule(layer).get_parameter("weight").copy_(weight)
        return rounded.eval()

    def _round(self, layer: str, bits: int) -> Rewritten:
        weight, grid = self._weights[layer].detach(), Grid(bits, signed=True)
        scale = mse_weight_scale(weight, grid)
        return fake_quantize(weight, scale, torch.zeros_like(scale), grid, axis=0), None


def quantizable_layers(
    network: nn.Module, ignored_layers: Sequence[str] | None = None, prefix: str = ""
) -> list[str]:
    """Layers whose bits can be searched: convolutions, depthwise ones too, and linear ones.

    Args:
        network: The network.
        ignored_layers: Name patterns of layers to leave in floating point, as the first and the
            last one often are; see :func:`~lit_compress.compress.layers.match_layers`.
        prefix: Dotted name of the network in a LightningModule, which patterns may begin with.

    Returns:
        Their names in the network's order, of layers that share a weight the first.

    Raises:
        ValueError: If a pattern matches no layer, or nothing is left.
    """
    named: dict[int, str] = {}
    for name, module in network.named_modules():
        weight = module._parameters.get("weight")
        is_layer = layer_type(module, "weight") in ("conv", "depthwise", "linear")
        if weight is not None and is_layer and not isinstance(module, _NOT_QUANTIZED):
            named.setdefault(id(weight), name)
    ignored = match_layers("ignored_layers", ignored_layers or (), named.values(), prefix)
    left = [name for name in named.values() if name not in ignored]
    if not left:
        raise ValueError(
            f"no layer of {type(network).__name__} is left to search the bits of; it needs a "
            "convolution or a linear layer that ignored_layers does not name."
        )
    return left


def _costs(network: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Cost]:
    sizes = torch.tensor([w.numel() for w in weights.values()], dtype=torch.float64)
    scales = _BYTES_OF_A_SCALE * sum(len(w) for w in weights.values())
    rest = stored_bytes(network) - sum(w.nbytes for w in weights.values()) + scales

    def mean_bits(values: Tensor) -> Tensor:
        return values @ sizes / sizes.sum()

    def size_bytes(values: Tensor) -> Tensor:
        return values @ sizes / 8 + rest

    return {"mean_bits": mean_bits, "size_bytes": size_bytes}

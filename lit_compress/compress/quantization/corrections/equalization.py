"""Cross-layer equalization: balance the channels of a float network before it is quantized.

A layer and the one that reads it may share a positive factor for each channel between them: ReLU
lets it pass, so the function stays the same while ranges change (Nagel et al. 2019, "Data-Free
Quantization Through Weight Equalization and Bias Correction", section 4.1).

Here weights have a scale for each *output* channel, so a layer's own outputs need no balance. What
is won is an even spread over the *input* channels of the layer that reads them, and over the
channels of the activation in between, which has one scale for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_compress.compress.quantization.corrections.equal_channels import ChannelPair, find_pairs
from lit_compress.compress.quantization.network import is_quantized

__all__ = ["Balance", "EqualizationResult", "EqualizedPair", "equalize"]

Balance: TypeAlias = Literal["activations", "weights"]
"""What of a channel is brought into balance with the weights that read it.

``"weights"``: the weights that write it, as in the paper. ``"activations"``: the largest value
that it takes, which is what a scale for the whole activation is about.
"""

_LEAST_RANGE = 2.0**-7  # of the largest one: below it a channel is next to dead
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class EqualizedPair:
    """Two layers and what their common factors changed.

    Attributes:
        first: Name of the layer that writes the channels.
        second: Name of the layer that reads them.
        weight_spread: Greatest over median range of the weights of ``second`` by input channel,
            before and after.
        activation_spread: Greatest over median of the channels' largest magnitudes where
            ``second`` reads them, before and after.
    """

    first: str
    second: str
    weight_spread: tuple[float, float]
    activation_spread: tuple[float, float]


@dataclass(frozen=True)
class EqualizationResult:
    """What :func:`equalize` did.

    Attributes:
        pairs: The layers that share new factors, in the order in which they run.
        left_alone: By name of a layer whose outputs stayed as they were: why.
        num_iterations: Rounds over all pairs until nothing moved any more.
    """

    pairs: tuple[EqualizedPair, ...]
    left_alone: dict[str, str]
    num_iterations: int

    def __str__(self) -> str:
        names = [f"{pair.first} -> {pair.second}" for pair in self.pairs]
        width = max([len("pair"), *map(len, names)])
        lines = [f"{'pair':<{width}}  weight spread      activation spread"]
        lines += [
            f"{name:<{width}}  {_change(pair.weight_spread)}  {_change(pair.activation_spread)}"
            for name, pair in zip(names, self.pairs, strict=True)
        ]
        lines += [f"{name} skipped: {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)


@torch.no_grad()
def equalize(
    network: nn.Module,
    run: Callable[[nn.Module], Any],
    *,
    balance: Balance = "activations",
    max_iterations: int = 20,
) -> EqualizationResult:
    """Balance the channels between layers of a float network, in place.

    Pairs are ``conv -> (batch norm) -> (ReLU, pooling, ...) -> conv or linear`` without branches.
    The first one's rows and bias, or weight and bias of the batch norm behind it, are divided by a
    factor for each channel, and the second one's input channels multiplied by it: the function is
    the same up to the rounding of float32, in training mode too. Running statistics stay. Zeros
    stay zero; clusters of equal weights do not stay equal.

    With ``a`` the channel's range by ``balance`` and ``w`` the largest magnitude of the weights
    that read it, the factor is ``sqrt(a / w)``, which makes both alike (equation 11 of the paper).
    With ``balance="activations"`` a depthwise reader gets ``a``: each of its channels has a weight
    scale of its own, so nothing holds the activation back from an even spread. Channels with a
    range below 1/128 of the largest stay as they are, so that what is next to dead is not blown
    up.

    Layers stay as they were (and are listed, with the reason) where values are clipped or bent in
    between (ReLU6, SiLU, hardswish), where more than one call takes them, as on residual streams,
    and where parameters are shared.

    Args:
        network: In floating point; call this before ``prepare``.
        run: Calls it once on real inputs, as in ``lambda network: network(images)``. With
            ``balance="activations"`` ranges are those of these inputs; a full batch is meant.
        balance: See :data:`Balance`.
        max_iterations: Rounds over all pairs, at least 1; chains need some to come to rest.

    Raises:
        ValueError: If the network is quantized already or was not run, ``balance`` is none,
            ``max_iterations`` is below 1 or a range is NaN or infinite.
    """
    if is_quantized(network):
        raise ValueError(
            f"{type(network).__name__} is quantized already, and its scales belong to the weights "
            "that it has; equalize it before prepare."
        )
    if balance not in get_args(Balance):
        raise ValueError(f"balance is {balance!r}; choose one of {', '.join(get_args(Balance))}.")
    if (
        isinstance(max_iterations, bool)
        or not isinstance(max_iterations, int)
        or max_iterations < 1
    ):
        raise ValueError(f"max_iterations is {max_iterations!r}; give a whole number from 1.")
    found, left_alone = find_pairs(network, run)
    pairs = [_Pair(network, pair, balance) for pair in found]
    before = [pair.spreads() for pair in pairs]
    num_iterations, moved = 0, float("inf")
    while moved >= _TOLERANCE and num_iterations < max_iterations:
        moved = max((pair.balance() for pair in pairs), default=0.0)
        num_iterations += 1
    changed = tuple(
        EqualizedPair(pair.found.first, pair.found.second, (w, after_w), (a, after_a))
        for pair, (w, a) in zip(pairs, before, strict=True)
        for after_w, after_a in [pair.spreads()]
    )
    return EqualizationResult(changed, left_alone, num_iterations)


class _Pair:
    """Parameters on both sides of some channels, and the ranges between them."""

    def __init__(self, network: nn.Module, found: ChannelPair, balance: Balance) -> None:
        self.found = found
        self._written = network.get_parameter(found.weight)
        self._bias = None if found.bias is None else network.get_parameter(found.bias)
        self._norm = None if found.norm is None else network.get_submodule(found.norm)
        self._reading = network.get_parameter(found.reader)
        self._activation = found.activation.clone()
        self._balanced = balance
        written, read = self._ranges()
        self._alive = _alive(written) & _alive(read)

    def balance(self) -> float:
        """Share new factors; the largest natural logarithm among them."""
        if not bool(self._alive.any()):
            return 0.0
        written, read = self._ranges()
        depthwise = self._reading.shape[1] == 1 and self.found.groups > 1
        whole = depthwise and self._balanced == "activations"
        logarithms = (written if whole else (written / read).sqrt()).log()
        # The tensor as a whole keeps its size.
        logarithms = logarithms - logarithms[self._alive].mean()
        factor = torch.where(self._alive, logarithms.exp(), 1.0)
        self._divide(factor)
        return float(factor.log().abs().max())

    def spreads(self) -> tuple[float, float]:
        """Greatest over median of the ranges of what reads, and of what is read."""
        return _spread(self._read()), _spread(self._activation)

    def _divide(self, factor: Tensor) -> None:
        norm = self._norm
        if norm is None:
            self._written.div_(_rows(factor, self._written))
            if self._bias is not None:
                self._bias.div_(factor.to(self._bias.dtype))
        else:
            assert isinstance(norm, _BatchNorm)
            norm.weight.div_(factor.to(norm.weight.dtype))
            norm.bias.div_(factor.to(norm.bias.dtype))
        reading, groups = self._reading, self.found.groups
        by_output = factor.reshape(groups, 1, -1).expand(-1, len(reading) // groups, -1)
        shape = (*reading.shape[:2], *[1] * (reading.dim() - 2))
        reading.mul_(by_output.reshape(shape).to(reading.dtype))
        self._activation.div_(factor)

    def _ranges(self) -> tuple[Tensor, Tensor]:
        """Of what is written into each channel, and of the weights that read it."""
        written = self._activation if self._balanced == "activations" else self._folded()
        read = self._read()
        if not bool((torch.isfinite(written) & torch.isfinite(read)).all()):
            raise ValueError(
                f"channels between {self.found.first!r} and {self.found.second!r} have ranges that "
                "are NaN or infinite. Look at the weights and at the inputs."
            )
        return written, read

    def _read(self) -> Tensor:
        """Greatest magnitude of the weights that read each channel."""
        magnitude = self._reading.detach().abs().float()
        magnitude = magnitude.reshape(*magnitude.shape[:2], -1).amax(2)
        by_group = magnitude.reshape(self.found.groups, -1, magnitude.shape[1])
        return by_group.amax(1).flatten()

    def _folded(self) -> Tensor:
        """Greatest magnitude of the weights that write each channel, the batch norm folded in."""
        magnitude = self._written.detach().abs().float().flatten(1).amax(1)
        norm = self._norm
        if norm is None:
            return magnitude
        assert isinstance(norm, _BatchNorm)
        assert norm.running_var is not None
        deviation = (norm.running_var.float() + norm.eps).sqrt()
        return magnitude * norm.weight.detach().abs().float() / deviation


def _rows(factor: Tensor, weight: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (weight.dim() - 1)).to(weight.dtype)


def _alive(ranges: Tensor) -> Tensor:
    return (ranges > 0) & (ranges >= ranges.max() * _LEAST_RANGE)


def _spread(ranges: Tensor) -> float:
    """Greatest over median, 1 where both are zero."""
    median = float(ranges.median())
    largest = float(ranges.max())
    return largest / median if median > 0 else (float("inf") if largest > 0 else 1.0)


def _change(values: tuple[float, float]) -> str:
    return f"{values[0]:7.2f} -> {values[1]:7.2f}"

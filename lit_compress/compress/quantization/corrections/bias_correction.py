"""Bias correction: remove the shift that rounding causes in the mean of a layer's outputs.

Rounded weights and inputs give a layer's outputs another mean, and a mean that is off is worse than
noise, as nothing averages it out. A bias can take it back (Nagel et al. 2019, "Data-Free
Quantization Through Weight Equalization and Bias Correction", section 4.2, the empirical variant).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_compress.compress.calibration import Forward
from lit_compress.compress.quantization.corrections.layer_runs import (
    LayerCall,
    calibrated,
    run_layers,
)
from lit_compress.compress.quantization.network import Quantization

__all__ = ["BiasCorrection", "CorrectedLayer", "correct_bias"]


@dataclass(frozen=True)
class CorrectedLayer:
    """One layer whose mean was put right.

    Attributes:
        layer: Its name.
        parameter: Where the correction went: its bias, or that of the batch norm behind it.
        shift: Root mean square over channels of the difference of means that was taken back,
            relative to the root mean square of the layer's float outputs.
    """

    layer: str
    parameter: str
    shift: float


@dataclass(frozen=True)
class BiasCorrection:
    """What :func:`correct_bias` did.

    Attributes:
        layers: The corrected layers, in forward order.
        left_alone: By name of a quantized layer that was not corrected: why.
        num_batches: Batches from which the means are.
    """

    layers: tuple[CorrectedLayer, ...]
    left_alone: dict[str, str]
    num_batches: int

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.layer) for layer in self.layers)])
        lines = [f"{'layer':<{width}}    shift  into"]
        lines += [f"{c.layer:<{width}}  {c.shift:7.4f}  {c.parameter}" for c in self.layers]
        lines += [f"{name} skipped: {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)


def correct_bias(
    network: nn.Module,
    forward: Forward,
    batches: Iterable[Any],
    *,
    float_weights: Mapping[str, Tensor] | None = None,
) -> BiasCorrection:
    """Give each quantized layer's output the mean that it has in floating point, in place.

    For each output channel, the mean over batch and positions without any rounding, minus the mean
    of the same layer in the quantized network, is added to the layer's bias, or to that of the
    batch norm behind it (times the norm's factor). Inputs of a layer come from the quantized
    network with all layers before it corrected. The paper goes through all data once for each
    layer; here each batch goes through the network once in floating point and once rounded, every
    layer corrected by that batch's difference on the way, and biases get the mean over batches,
    which is the same for one batch and next to the same for more.

    Means are put right, variances are not. Where rounding makes outputs smaller as a whole, as it
    does at 3 bits, ReLU passes that on unharmed; with the mean of larger outputs, less of them is
    above zero in every layer, and accuracy can be lost. Score the network before and after.

    Args:
        network: Calibrated, and rounding. In training mode afterwards if it was; call it last, as
            training finds its own biases.
        forward: Runs it on a batch.
        batches: Of the training data, some hundred examples in all.
        float_weights: By parameter name: what weights were before they were changed to what they
            are rounded to; :attr:`AdaptiveRounding.float_weights
            <lit_compress.compress.quantization.corrections.rounding.AdaptiveRounding.float_weights>`.

    Raises:
        ValueError: If the network is not calibrated, there is no batch, or a mean is NaN or
            infinite.
    """
    quantization = calibrated(network)
    targets, left_alone = _targets(network, quantization)
    means = _Means(targets)
    num_batches = 0
    for batch in batches:
        means.begin_batch()
        run_layers(network, forward, batch, means.note, rounded=False, float_weights=float_weights)
        run_layers(network, forward, batch, means.corrected, rounded=True)
        num_batches += 1
    if num_batches == 0:
        raise ValueError(
            "there was no batch to take means from; give at least one batch of training data."
        )
    layers = []
    for call, target in targets.items():
        if not means.seen(call):
            left_alone[target.layer] = "no batch reached it"
            continue
        shift = means.shift(call)
        if not bool(torch.isfinite(shift).all()):
            raise ValueError(
                f"the outputs of {target.layer!r} are NaN or infinite. Look at the input data."
            )
        target.add(network, shift)
        layers.append(CorrectedLayer(target.layer, target.parameter, means.relative_shift(call)))
    return BiasCorrection(tuple(layers), left_alone, num_batches)


@dataclass(frozen=True)
class _Target:
    """Where the correction of a layer goes."""

    layer: str
    parameter: str
    norm: str | None

    @torch.no_grad()
    def add(self, network: nn.Module, shift: Tensor) -> None:
        """Add what the layer's output lacks."""
        if self.norm is not None:
            norm = network.get_submodule(self.norm)
            assert isinstance(norm, _BatchNorm)
            assert norm.running_var is not None
            shift = shift * torch.rsqrt(norm.running_var.float() + norm.eps)
            if norm.weight is not None:
                shift = shift * norm.weight.float()
        bias = network.get_parameter(self.parameter)
        bias.add_(shift.to(bias.dtype))


def _targets(
    network: nn.Module, quantization: Quantization
) -> tuple[dict[str, _Target], dict[str, str]]:
    placement = quantization.placement
    norms = {call: norm.partition(":")[0] for norm, call in placement.batch_norms.items()}
    names = {id(p): n for n, p in network.named_parameters()}
    targets, left_alone = {}, {}
    for call, weight in placement.weights.items():
        layer = weight.rpartition(".")[0]
        parameter, norm = placement.biases.get(call), None
        if parameter is None and call in norms:
            norm = norms[call]
            bias = network.get_submodule(norm).bias
            parameter = None if bias is None else names[id(bias)]
        if parameter is None:
            left_alone[layer] = "neither it nor a batch norm behind it has a bias"
        else:
            targets[call] = _Target(layer, parameter, norm)
    uses = Counter(target.parameter for target in targets.values())
    for call, target in list(targets.items()):
        if uses[target.parameter] > 1:
            left_alone[target.layer] = f"several calls share {target.parameter}"
            del targets[call]
    return targets, left_alone


class _Means:
    """Means of layers' outputs, batch by batch."""

    def __init__(self, targets: Mapping[str, _Target]) -> None:
        self._targets = targets
        self._floats: dict[str, Tensor] = {}
        self._shifts: dict[str, Tensor] = {}  # times the values a channel had
        self._squares: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()

    def begin_batch(self) -> None:
        self._floats = {}

    def note(self, call: LayerCall) -> Tensor:
        """The layer as it is, in floating point, its mean remembered."""
        result = call.result()
        if call.name in self._targets and result.numel():
            dims = _all_but_channels(call, result)
            self._floats[call.name] = _mean(result, dims)
            square = result.float().square().mean() * _values(result, dims)
            self._squares[call.name] = self._squares.get(call.name, 0) + square
        return result

    def corrected(self, call: LayerCall) -> Tensor:
        """The rounded layer with the mean that it has in floating point."""
        result = call.result()
        if call.name not in self._floats:
            return result
        dims = _all_but_channels(call, result)
        shift = self._floats[call.name] - _mean(result, dims)
        count = _values(result, dims)
        self._shifts[call.name] = self._shifts.get(call.name, 0) + shift * count
        self._counts[call.name] += count
        trailing = result.dim() - 1 - _channel_dim(call, result)
        return result + shift.to(result.dtype).reshape(-1, *[1] * trailing)

    def seen(self, call: str) -> bool:
        return self._counts[call] > 0

    def shift(self, call: str) -> Tensor:
        """What the mean of each channel lacks: float32, ``[channels]``."""
        return self._shifts[call] / self._counts[call]

    def relative_shift(self, call: str) -> float:
        size = float(self._squares[call] / self._counts[call]) ** 0.5
        return float(self.shift(call).square().mean().sqrt()) / size if size > 0 else 0.0


def _channel_dim(call: LayerCall, result: Tensor) -> int:
    op = call.name.rsplit(":", 2)[1]
    spatial = 0 if op == "linear" else int(op[-2])
    return result.dim() - 1 - spatial


def _all_but_channels(call: LayerCall, result: Tensor) -> list[int]:
    channels = _channel_dim(call, result)
    return [dim for dim in range(result.dim()) if dim != channels]


def _mean(result: Tensor, dims: list[int]) -> Tensor:
    return result.float().mean(dims) if dims else result.float()


def _values(result: Tensor, dims: list[int]) -> int:
    """How many values a channel has."""
    count = 1
    for dim in dims:
        count *= result.shape[dim]
    return count

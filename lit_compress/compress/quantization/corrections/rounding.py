"""AdaRound: learn for each weight whether to round up or down, by its layer's output.

AdaRound (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization"): for
one layer after the other, each weight learns how far it goes from the integer below to the one
above, by gradient descent on the difference from the float layer's output, and is pushed to one of
the two in the end. No labels and little data are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_compress.compress.calibration import Forward
from lit_compress.compress.quantization.calls import Trace, record_calls
from lit_compress.compress.quantization.corrections.layer_runs import calibrated, without_rounding
from lit_compress.compress.quantization.corrections.layer_samples import (
    LayerSamples,
    gather_samples,
)
from lit_compress.compress.quantization.corrections.soft_rounding import (
    LayerProblem,
    SoftRounding,
    learn,
)
from lit_compress.compress.quantization.network import Quantization
from lit_compress.compress.quantization.quantizers import WeightQuantizer

__all__ = ["AdaptiveRounding", "RoundedLayer", "round_adaptively"]

_CLIPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "relu6": lambda x: x.clamp(0, 6),
}


@dataclass(frozen=True)
class RoundedLayer:
    """One layer whose rounding was learned.

    Attributes:
        layer: Its name.
        flipped: Share of its weights that are not rounded to the nearest, 0 to 1.
        error_before: Squared error of its output, rounded to the nearest, relative to the mean
            square of the float layer's output.
        error_after: The same with the rounding it has now.
    """

    layer: str
    flipped: float
    error_before: float
    error_after: float


@dataclass(frozen=True)
class AdaptiveRounding:
    """What :func:`round_adaptively` did.

    Attributes:
        layers: The layers, in forward order.
        left_alone: By name of a quantized layer that is rounded to the nearest: why.
        float_weights: By parameter name: what weights were before.
    """

    layers: tuple[RoundedLayer, ...]
    left_alone: dict[str, str]
    float_weights: dict[str, Tensor] = field(repr=False)

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.layer) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  error before    after  flipped"]
        lines += [
            f"{layer.layer:<{width}}  {layer.error_before:12.5f} {layer.error_after:8.5f} "
            f"{100 * layer.flipped:7.2f} %"
            for layer in self.layers
        ]
        lines += [f"{name} skipped: {why}" for name, why in self.left_alone.items()]
        return "\n".join(lines)


def round_adaptively(
    network: nn.Module,
    forward: Forward,
    batches: Iterable[Any],
    *,
    num_iterations: int = 1000,
    num_samples: int = 20_000,
    lr: float = 1e-2,
    regularization: float = 0.01,
    max_bytes: int = 2**29,
    seed: int = 0,
) -> AdaptiveRounding:
    """Learn for each weight whether it is rounded up or down, and write the result into it.

    Layers come in forward order. Each one's inputs are from the quantized network with all layers
    before it done, and what it has to reproduce is what it gives in floating point, both behind
    batch norm and ReLU where these follow (equation 25 of the paper). Weights become the real
    numbers that their integers stand for, so that the nearest rounding finds these integers from
    now on; scales stay (where they follow the largest magnitude, that weight is kept as it is).
    Zeros stay zero. A layer for which the learned rounding is no better on the samples keeps the
    nearest one.

    Args:
        network: Calibrated, and rounding. It pays at 4 bits and below; scales by
            ``weight_ranges="mse"`` are the better start.
        forward: Runs it on a batch.
        batches: Of the training data, some hundred examples in all; kept in memory. Every layer
            runs the network up to it twice over them.
        num_iterations: Steps of Adam for each layer, at least 1.
        num_samples: Output positions (or rows of a linear layer) to learn from, at least 1; spread
            evenly over all images.
        lr: Learning rate, above 0.
        regularization: Weight of the term that pushes to up or down, above 0; ``lambda`` in the
            paper.
        max_bytes: Bound on the samples of a layer; fewer are taken where they would pass it.
        seed: For positions and the order of samples; with it the result is the same.

    Raises:
        ValueError: If the network is not calibrated, there is no batch, an argument is out of
            range, or values are NaN or infinite.
    """
    _check(num_iterations, num_samples, lr, regularization, max_bytes)
    quantization = calibrated(network)
    batches = list(batches)
    if not batches:
        raise ValueError(
            "there was no batch to learn the rounding from; give at least one batch of training "
            "data."
        )
    with without_rounding(network):
        trace = record_calls(network, lambda model: forward(model, batches[0]))
    clips = _clips(trace)
    calls, left_alone = _candidates(quantization, trace)
    result = AdaptiveRounding((), left_alone, {})
    for index, (call, name) in enumerate(calls.items()):
        layer, weight = name.rpartition(".")[0], network.get_parameter(name)
        generator = torch.Generator().manual_seed(seed + index)
        samples = gather_samples(
            network, forward, batches, call, result.float_weights, num_samples, max_bytes, generator
        )
        if samples is None:
            left_alone[layer] = "no batch reached it"
            continue
        behind = _Behind.of(network, quantization, call, clips)
        problem = _problem(samples, behind, layer)
        rounding = _soft_rounding(weight, quantization.weight(name))
        learned, before, after = learn(
            problem, rounding, num_iterations, lr, regularization, generator
        )
        result.float_weights[name] = weight.detach().clone()
        done = RoundedLayer(layer, rounding.flipped(learned), before, after)
        with torch.no_grad():
            weight.copy_(learned)
        result = replace(result, layers=(*result.layers, done))
    return result


def _check(
    num_iterations: int, num_samples: int, lr: float, regularization: float, max_bytes: int
) -> None:
    counts = {"num_iterations": num_iterations, "num_samples": num_samples, "max_bytes": max_bytes}
    for what, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{what} is {count!r}; give a whole number from 1.")
    for what, number in {"lr": lr, "regularization": regularization}.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not number > 0:
            raise ValueError(f"{what} is {number!r}; give a number above 0.")


def _candidates(quantization: Quantization, trace: Trace) -> tuple[dict[str, str], dict[str, str]]:
    """Calls in forward order and their weights, and why other layers cannot be done."""
    calls, left_alone = {}, {}
    weights = quantization.placement.weights
    uses = Counter(weights.values())
    for call, name in weights.items():
        layer = name.rpartition(".")[0]
        if call not in trace.calls:
            left_alone[layer] = "the first batch did not reach it"
        elif uses[name] > 1:
            left_alone[layer] = "several calls share its weight"
        elif ":conv_transpose" in call:
            left_alone[layer] = "transposed convolutions are rounded to the nearest"
        elif name in quantization.scheme.per_tensor_weights:
            left_alone[layer] = "its equal weights are to stay equal (per_tensor_weights)"
        else:
            calls[call] = name
    return {call: calls[call] for call in trace.calls if call in calls}, left_alone


def _clips(trace: Trace) -> dict[str, str]:
    """By name of a call: the ReLU that alone takes what it gives."""
    users = trace.users()
    found = {}
    for name in trace.calls:
        follower = users.get(name, [])
        if len(follower) == 1 and trace.calls[follower[0]].op in _CLIPS:
            found[name] = trace.calls[follower[0]].op
    return found


@dataclass(frozen=True)
class _Behind:
    """What is fused behind a layer: a factor and a shift for each channel, and a ReLU."""

    factor: Tensor | None
    shift: Tensor | None
    clip: Callable[[Tensor], Tensor] | None

    @classmethod
    def of(
        cls, network: nn.Module, quantization: Quantization, call: str, clips: dict[str, str]
    ) -> _Behind:
        norms = {layer: norm for norm, layer in quantization.placement.batch_norms.items()}
        if call not in norms:
            return cls(None, None, _CLIPS.get(clips.get(call, "")))
        norm = network.get_submodule(norms[call].partition(":")[0])
        assert isinstance(norm, _BatchNorm)
        assert norm.running_var is not None
        assert norm.running_mean is not None
        factor = torch.rsqrt(norm.running_var.float() + norm.eps)
        if norm.weight is not None:
            factor = factor * norm.weight.detach().float()
        shift = -norm.running_mean.float() * factor
        if norm.bias is not None:
            shift = shift + norm.bias.detach().float()
        return cls(factor, shift, _CLIPS.get(clips.get(norms[call], "")))

    def __call__(self, y: Tensor) -> Tensor:
        """``[samples, channels]`` before and after."""
        if self.factor is not None and self.shift is not None:
            y = torch.addcmul(self.shift, y, self.factor)
        return y if self.clip is None else self.clip(y)


def _problem(samples: LayerSamples, behind: _Behind, layer: str) -> LayerProblem:
    targets = behind(samples.outputs)
    if not bool(torch.isfinite(targets).all() & torch.isfinite(samples.patches).all()):
        raise ValueError(
            f"inputs or outputs of {layer!r} are NaN or infinite. Look at the input data."
        )
    return LayerProblem(samples.patches, samples.bias, targets, behind)


def _soft_rounding(weight: Tensor, quantizer: WeightQuantizer) -> SoftRounding:
    return SoftRounding(
        weight.detach().float(),
        quantizer.step_for(weight).detach(),
        quantizer.grid,
        keep_greatest=quantizer.ranges == "minmax",
        pairs=quantizer.pair_axis is not None,
    )

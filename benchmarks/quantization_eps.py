"""What integers make of batch norms whose eps matters. Part of ``quantization_accuracy.py``."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_compress.compress.quantization.integers import integer_network
from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.tasks.models import ConvClassifier, mobilenet_v1

# Relative errors, and the error of integers / that of the rounding that they stand for.
EPS_BAR, CONVERTED_BAR = 1e-5, 1.05


@torch.no_grad()
def measure(eps: float = 1e-3) -> dict[str, Any]:
    """Relative errors of a MobileNet whose batch norms' eps matters.

    ``prepared``: with quantizers that do not round yet, in evaluation and in training mode.
    ``folded_weights``: integers against the rounding that they stand for; weights only, where
    nothing but folding can differ. ``rounded`` and ``converted``: the same two against the float
    network, in 8 bits. ``..._eps_1e-5``: with eps as torchao's PT2E rewrites it.
    """
    network, images = mobilenet_of_small_variances(eps)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    variances = torch.cat([cast("Tensor", norm.running_var) for norm in norms])
    exact = network(images)
    prepared = copy.deepcopy(network)
    prepare(prepared, QuantizationScheme(), lambda net: net(images))
    weights_only = calibrated(network, images, activation_bits=None)
    in_8_bits = calibrated(network, images, activation_bits=8)
    return {
        "eps": eps,
        "running_var": [variances.min().item(), variances.max().item()],
        "prepared": relative_error(prepared(images), exact),
        "prepared_in_training": relative_error(
            copy.deepcopy(prepared).train()(images), copy.deepcopy(network).train()(images)
        ),
        "folded_weights": relative_error(
            integer_network(weights_only)(images), weights_only(images)
        ),
        "rounded": relative_error(in_8_bits(images), exact),
        "converted": relative_error(integer_network(in_8_bits)(images), exact),
        "float_eps_1e-5": relative_error(with_eps(network, 1e-5)(images), exact),
        "converted_eps_1e-5": relative_error(
            integer_network(with_eps(in_8_bits, 1e-5))(images), exact
        ),
    }


def mobilenet_of_small_variances(eps: float) -> tuple[nn.Module, Tensor]:
    """A small MobileNet and images on which the inputs of its norms vary by 1e-4 to 1e-2.

    It is the stem and the first four blocks of MobileNet-v1 (0.25): with random weights, each
    layer more makes the network chaotic, and rounding then drowns what is to be seen.
    """
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    whole = mobilenet_v1(width=0.25).features
    features = list(whole.children())[: 3 * (1 + 2 * 4)]  # convolution, norm, ReLU
    width = cast("nn.BatchNorm2d", features[-2]).num_features
    network = ConvClassifier(nn.Sequential(*features), width, num_classes=10).eval()
    images = x = torch.randn(32, 3, 32, 32, generator=generator)
    for layer, following in zip(features, [*features[1:], None], strict=True):
        if isinstance(following, nn.BatchNorm2d):
            variance, mean_ = torch.var_mean(layer(x), dim=(0, 2, 3))
            wanted = 10 ** (-4 + 2 * torch.rand(len(variance), generator=generator))
            factor = (wanted / variance.clamp_min(1e-12)).sqrt()
            cast("nn.Conv2d", layer).weight.mul_(factor.reshape(-1, 1, 1, 1))
            following.eps = eps
            cast("Tensor", following.running_var).copy_(wanted)
            cast("Tensor", following.running_mean).copy_(mean_ * factor)
            following.weight.uniform_(0.5, 1.5)
            following.bias.normal_(0, 0.2)
        x = layer(x)
    return network, images


def calibrated(network: nn.Module, images: Tensor, activation_bits: int | None) -> nn.Module:
    """A copy with 8-bit weights, calibrated on the images."""
    network = copy.deepcopy(network)
    scheme = QuantizationScheme(activation_bits=activation_bits)
    prepare(network, scheme, lambda net: net(images))
    calibrate(network, lambda net, batch: net(batch), [images])
    return network


def with_eps(network: nn.Module, eps: float) -> nn.Module:
    """A copy with another eps."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    return network


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference / norm."""
    return float((found - exact).double().norm() / exact.double().norm())


def table(errors: dict[str, Any]) -> str:
    """Relative errors, as Markdown."""
    rows = [
        ("prepared, not rounding, evaluation mode", "prepared", EPS_BAR),
        ("prepared, not rounding, training mode", "prepared_in_training", EPS_BAR),
        ("integer weights against the rounding they stand for", "folded_weights", EPS_BAR),
        ("8 bits, rounded in floating point", "rounded", None),
        ("8 bits, integers", "converted", CONVERTED_BAR * errors["rounded"]),
        ("float, eps rewritten to 1e-5", "float_eps_1e-5", None),
        ("8 bits, integers, eps rewritten to 1e-5", "converted_eps_1e-5", None),
    ]
    lines = ["| | relative error | at most |", "| --- | --- | --- |"]
    lines += [f"| {a} | {errors[b]:.2g} | {f'{c:.2g}' if c else ''} |" for a, b, c in rows]
    return "\n".join(lines)


def missed(errors: dict[str, Any]) -> list[str]:
    """What does not hold."""
    bars = dict.fromkeys(("prepared", "prepared_in_training", "folded_weights"), EPS_BAR)
    bars["converted"] = CONVERTED_BAR * errors["rounded"]
    return [
        f"the relative error {name} is {errors[name]:.2g}, above {bar:.2g}"
        for name, bar in bars.items()
        if not errors[name] <= bar
    ]

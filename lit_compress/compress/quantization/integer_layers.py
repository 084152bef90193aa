"""The layers of a quantized network as integers, with their batch norms in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_compress.compress.quantization.affine import Grid, dequantize, quantize
from lit_compress.compress.quantization.network import quantized_network

__all__ = ["IntegerLayer", "integer_layers", "with_integer_bias"]


@dataclass(frozen=True)
class IntegerLayer:
    """The weight and bias of one call of a layer, with its batch norm in them.

    Attributes:
        values: int8, of the shape of the weight.
        scale: float32, ``[channels]``.
        axis: Dimension of the weight along which scales differ.
        grid: The integers.
        bias: float32, ``[channels]``; ``None`` where there is none.
    """

    values: Tensor
    scale: Tensor
    axis: int
    grid: Grid
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The real numbers for which the integers stand (float32)."""
        return dequantize(self.values, self.scale, torch.zeros_like(self.scale), self.axis)


@torch.no_grad()
def integer_layers(network: nn.Module) -> dict[str, IntegerLayer]:
    """The layers of a quantized network as integers, batch norms folded into scales and biases.

    A symmetric grid a channel makes this exact: a batch norm multiplies the channel's scale, and
    the sign of its factor goes to the integers (Jacob et al. 2018, section 3.2, fold weights before
    they are rounded; here both orders are the same).

    Args:
        network: From :func:`~lit_compress.compress.quantization.network.prepare`, calibrated or
            trained.

    Returns:
        By name of the call.

    Raises:
        ValueError: If the network is not quantized.
    """
    quantization = quantized_network(network)
    placement = quantization.placement
    norm_of = {call: norm.partition(":")[0] for norm, call in placement.batch_norms.items()}
    layers = {}
    for call, name in placement.weights.items():
        quantizer = quantization.weight(name)
        weight = network.get_parameter(name).detach().float()
        if quantizer.ranges == "minmax":
            quantizer.follow(weight)
        axis = 1 if call.partition(":")[2].startswith("conv_transpose") else 0
        step = quantizer.step.detach()
        values = quantize(weight, step, torch.zeros_like(step), quantizer.grid, quantizer.axis)
        bias_name = placement.biases.get(call)
        bias = None if bias_name is None else network.get_parameter(bias_name).detach().float()
        scale = step.expand(weight.shape[axis]).clone()
        if call in norm_of:
            factor, bias = _folded(network.get_submodule(norm_of[call]), bias)
            scale = scale * factor.abs()
            # A channel whose factor is zero, or next to it, gives nothing.
            signs = torch.sign(factor).int() * (scale > torch.finfo(scale.dtype).tiny)
            values = values * signs.reshape(-1, *[1] * (weight.dim() - 1))
        scale = _with_empty_channels(scale, values, axis)
        layers[call] = IntegerLayer(values.to(torch.int8), scale, axis, quantizer.grid, bias)
    return layers


def with_integer_bias(
    layer: IntegerLayer, bias: Tensor, input_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Integers and scales of a weight such that its bias fits int32.

    A channel whose weights are next to nothing beside its bias gets a coarser scale; what its
    weights lose is below the rounding of its output.
    """
    least = bias.abs() / (input_scale * 2.0**30)
    scale = torch.maximum(layer.scale, least)
    shape = [1] * layer.values.dim()
    shape[layer.axis] = -1
    ratio = (layer.scale / scale).reshape(shape)
    values = torch.where(ratio == 1, layer.values.float(), torch.round(layer.values * ratio))
    return values.to(torch.int8), scale


def _with_empty_channels(scale: Tensor, values: Tensor, axis: int) -> Tensor:
    """Scales in which channels without weights have one like those of the others.

    Any scale would do for their weights, but runtimes round biases to multiples of it.
    """
    gives = values.movedim(axis, 0).flatten(1).any(1)
    typical = scale[gives].median() if bool(gives.any()) else scale.new_tensor(2.0**-16)
    return torch.where(gives, scale, typical)


def _folded(norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factor of a batch norm in evaluation mode, and the bias of layer and norm together."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, factor = norm.running_mean.double(), torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = (bias.double() if bias is not None else 0.0) - mean
    shift = shift * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return factor.float(), shift.float()

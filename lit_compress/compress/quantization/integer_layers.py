"""The layers of a quantized network as integer weights, with batch norms folded in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_compress.compress.quantization.affine import Grid, dequantize, quantize
from lit_compress.compress.quantization.attached import is_depthwise
from lit_compress.compress.quantization.integer_bias import bias_on_product_grid, fold_batch_norm
from lit_compress.compress.quantization.network import Quantization, quantized_network
from lit_compress.compress.quantization.quantizers import ActivationQuantizer
from lit_compress.compress.quantization.saturation import largest_pair_sum, may_saturate

__all__ = ["IntegerLayer", "input_scale", "integer_layers", "with_integer_bias"]


@dataclass(frozen=True)
class IntegerLayer:
    """The weight and bias of one call of a layer, with its batch norm in them.

    Attributes:
        values: int8, of the shape of the weight.
        scale: float32, ``[channels]``.
        axis: Dimension of the weight along which scales differ.
        grid: The integers.
        bias: float32, ``[channels]``, whole multiples of the scale times that of a static input;
            ``None`` where there is none.
        saturates: Whether x86 without VNNI may compute something else with these integers; see
            :mod:`~lit_compress.compress.quantization.saturation`.
    """

    values: Tensor
    scale: Tensor
    axis: int
    grid: Grid
    bias: Tensor | None
    saturates: bool = False

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
        axis = 1 if call.partition(":")[2].startswith("conv_transpose") else 0
        step = quantizer.step_for(weight).detach()
        values = quantize(weight, step, torch.zeros_like(step), quantizer.grid, quantizer.axis)
        bias_name = placement.biases.get(call)
        bias = None if bias_name is None else network.get_parameter(bias_name).detach().float()
        scale = step.expand(weight.shape[axis]).clone()
        if call in norm_of:
            factor, bias = fold_batch_norm(network.get_submodule(norm_of[call]), bias)
            scale = scale * factor.abs()
            # A channel whose factor is zero, or next to it, gives nothing.
            signs = torch.sign(factor).int() * (scale > torch.finfo(scale.dtype).tiny)
            values = values * signs.reshape(-1, *[1] * (weight.dim() - 1))
        scale = _with_empty_channels(scale, values, axis)
        step_in = input_scale(quantization, call)
        if bias is not None and step_in is not None and len(bias) == len(scale):
            bias = bias_on_product_grid(bias, scale * step_in)
        layers[call] = IntegerLayer(
            values.to(torch.int8),
            scale,
            axis,
            quantizer.grid,
            bias,
            saturates=not is_depthwise(network, name)
            and _may_saturate(values, axis, quantization.scheme.activation_grid),
        )
    return layers


def input_scale(quantization: Quantization, call: str) -> Tensor | None:
    """Scale of what goes into a layer's call, a scalar; ``None`` where it is not fixed."""
    name = quantization.placement.layer_inputs.get(call)
    quantizer = None if name is None else quantization.activation(name)
    return quantizer.step.detach() if isinstance(quantizer, ActivationQuantizer) else None


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


def _may_saturate(values: Tensor, axis: int, activations: Grid | None) -> bool:
    """Whether two products of weights and activations may exceed int16 together."""
    if activations is None:
        return False
    # Half of the sum, as if both weights were the same.
    largest = float(largest_pair_sum(values.float(), axis).amax()) / 2
    return may_saturate(largest, activations.high)


def _with_empty_channels(scale: Tensor, values: Tensor, axis: int) -> Tensor:
    """Scales in which channels without weights have one like those of the others.

    Any scale would do for their weights, but runtimes round biases to multiples of it.
    """
    gives = values.movedim(axis, 0).flatten(1).any(1)
    typical = scale[gives].median() if bool(gives.any()) else scale.new_tensor(2.0**-16)
    return torch.where(gives, scale, typical)

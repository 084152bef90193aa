"""Rewrite a quantized network in integer arithmetic, as each runtime reads it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lit_compress.compress.quantization.affine import Grid, dequantize
from lit_compress.compress.quantization.calls import (
    input_name,
    layer_arguments,
    seen_calls,
    with_layer_arguments,
)
from lit_compress.compress.quantization.gates import gate_input, is_in_place
from lit_compress.compress.quantization.integer_gates import (
    Constants,
    GateSpelling,
    keep_one,
    round_trip,
    write_gate,
)
from lit_compress.compress.quantization.integer_layers import (
    IntegerLayer,
    input_scale,
    integer_layers,
    with_integer_bias,
)
from lit_compress.compress.quantization.network import (
    Quantization,
    quantized_network,
    remove_quantization,
)
from lit_compress.compress.quantization.placement import layer_of
from lit_compress.compress.quantization.quantizers import (
    ActivationQuantizer,
    DynamicQuantizer,
    GateQuantizer,
    Quantizer,
)

__all__ = ["IntegerLayer", "IntegerNetwork", "Spelling", "integer_layers", "integer_network"]

_OPS = torch.ops.quantized_decomposed
_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Spelling:
    """How a runtime wants the same arithmetic to be written.

    Attributes:
        signed_activations: int8 instead of uint8; zero points are 128 lower.
        integer_bias: Biases as int32 with the scale of the products, instead of float32.
        weights_in_graph: Weights as float32 on their grid, with quantization and dequantization in
            the graph, instead of int8 with dequantization.
        quantized_outputs: Results of layers on a grid also where no layer takes integers from them.
        saturating_weights: How weights are written with which x86 without VNNI may saturate:
            ``"exact"`` like the others, as the runtime adds in 32 bits; ``"int8"`` likewise, which
            is wrong there; ``"uint8"`` with zero point 128, whose products are added in 32 bits;
            ``"float"`` on their grid, for a kernel of floats.
        gates: How sigmoids, SiLU and hardswish are written.
    """

    signed_activations: bool = False
    integer_bias: bool = False
    weights_in_graph: bool = False
    quantized_outputs: bool = False
    saturating_weights: Literal["exact", "int8", "uint8", "float"] = "exact"
    gates: GateSpelling = "whole"


def integer_network(network: nn.Module, spelling: Spelling | None = None) -> IntegerNetwork:
    """A copy of a quantized network that computes with integers where it was told to.

    Its forward consists of torch's ``quantized_decomposed`` operators around the network's own
    calls, which is what exporters and runtimes turn into integer kernels; in eager mode it says
    what they compute, slowly.

    Args:
        network: Calibrated or trained; unchanged.
        spelling: How the arithmetic is written.

    Raises:
        ValueError: If the network is not quantized, or an activation has no range yet.
    """
    quantization = quantized_network(network)
    spelling = spelling or Spelling()
    missing = quantization.unready(with_outputs=spelling.quantized_outputs)
    if missing:
        raise ValueError(
            f"activation {missing[0]!r} has no range; calibrate or train the network first."
        )
    return IntegerNetwork(network, spelling)


class IntegerNetwork(nn.Module):
    """See :func:`integer_network`.

    Attributes:
        network: The original network, without the weights that are integers now.
        spelling: How the arithmetic is written.
        saturating: Names of the layers with which x86 without VNNI may saturate.
    """

    def __init__(self, network: nn.Module, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        quantization = quantized_network(network)
        layers = integer_layers(network)
        weights = quantization.placement.weights
        self.saturating = tuple(
            dict.fromkeys(layer_of(weights[c]) for c, layer in layers.items() if layer.saturates)
        )
        self.network = copy.deepcopy(network)
        remove_quantization(self.network)
        self._activation_of = dict(quantization.placement.activations)
        if spelling.quantized_outputs:
            self._activation_of |= quantization.placement.outputs
        self._grids = _activation_grids(quantization, spelling)
        self._norms = dict(quantization.placement.batch_norms)
        self._gates = {} if spelling.gates == "whole" else _gate_grids(quantization, spelling)
        if self._gates:
            keep_one(self, _dtype(spelling))
        self._layers: dict[str, _Layer] = {}
        for index, (call, layer) in enumerate(layers.items()):
            scale = input_scale(quantization, call)
            self._layers[call] = _Layer(self, index, layer, scale, spelling)
        self._drop_float_weights(quantization)
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's own."""
        count = -1

        def through(value: Tensor) -> Tensor:
            nonlocal count
            count += 1
            rounded: Tensor = self._quantize(input_name(count), value)
            return rounded

        args, kwargs = tree_map_only(Tensor, through, (args, kwargs))
        with seen_calls(self.network, self._handle):
            return self.network(*args, **kwargs)

    def linear_weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights of linear layers that take integers.

        Yields:
            Real numbers on their grid, ``[out, in]``, and their scale, ``[out]``.
        """
        for layer in self._layers.values():
            if layer.takes_integers and layer.values().dim() == 2:
                yield layer.values(), layer.scale

    def _handle(
        self,
        name: str,
        op: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if name in self._norms:
            return self._quantize(name, args[0] if args else kwargs["input"])
        if name in self._layers:
            _, _, bias = layer_arguments(args, kwargs)
            layer = self._layers[name]
            args, kwargs = with_layer_arguments(args, kwargs, layer.weight(), layer.bias(bias))
        if name in self._gates:
            x, grids = gate_input(args, kwargs), self._gates[name]
            result = write_gate(op, x, *grids, spelling=self.spelling.gates, owner=self)
            result = self._quantize(name, result)
            return x.copy_(result) if is_in_place(func, args, kwargs) else result
        return self._quantize(name, func(*args, **kwargs))

    def _quantize(self, name: str, value: Any) -> Any:
        place = self._grids.get(self._activation_of.get(name, ""))
        if place is None:
            return value
        return tree_map_only(Tensor, place, value)

    def _drop_float_weights(self, quantization: Quantization) -> None:
        """Weights that live on as integers are not to be stored a second time."""
        placement = quantization.placement
        for name in dict.fromkeys(placement.weights.values()):
            if name not in placement.floating:
                path, _, attribute = name.rpartition(".")
                module = self.network.get_submodule(path)
                # Some forwards ask for its shape.
                shell = torch.zeros(()).expand(getattr(module, attribute).shape)
                setattr(module, attribute, nn.Parameter(shell, requires_grad=False))


class _Layer:
    """Puts an :class:`IntegerLayer` into the graph; its tensors are buffers of the network."""

    def __init__(
        self,
        owner: nn.Module,
        index: int,
        layer: IntegerLayer,
        input_scale: Tensor | None,
        spelling: Spelling,
    ) -> None:
        self._owner, self._index, self._spelling = owner, index, spelling
        self._axis, self._grid = layer.axis, layer.grid
        self.takes_integers = input_scale is not None
        scale, bias = layer.scale, layer.bias
        values = layer.values
        self._integer_bias = False
        # Groups of a transposed convolution share scales, whereas each channel has its bias.
        if (
            spelling.integer_bias
            and bias is not None
            and len(bias) == len(scale)
            and input_scale is not None
        ):
            self._integer_bias = True
            values, scale = with_integer_bias(layer, bias, input_scale)
            step = scale * input_scale
            integers = torch.round(bias / step).clamp(-_INT32, _INT32).to(torch.int32)
            zero = torch.zeros(len(scale), dtype=torch.int64)
            self._keep(bias=integers, bias_scale=step, bias_zero_point=zero)
        elif bias is not None:
            self._keep(bias=bias)
        self._has_bias = bias is not None
        form = spelling.saturating_weights if layer.saturates else "exact"
        self._zero, self._dtype = (128, torch.uint8) if form == "uint8" else (0, torch.int8)
        self._floating = form == "float"
        if spelling.weights_in_graph or self._floating:
            zero = torch.zeros_like(scale)
            self._keep(weight=dequantize(values, scale, zero, layer.axis))
        else:
            self._keep(weight=(values.to(torch.int16) + self._zero).to(self._dtype))
        self._keep(scale=scale, zero_point=torch.full((len(scale),), self._zero))

    @property
    def scale(self) -> Tensor:
        return self._kept("scale")

    def values(self) -> Tensor:
        """The real numbers for which the integers stand."""
        values = self._kept("weight")
        if self._spelling.weights_in_graph or self._floating:
            return values
        return dequantize(values, self.scale, self._kept("zero_point"), self._axis)

    def weight(self) -> Tensor:
        ends = (self._grid.low + self._zero, self._grid.high + self._zero)
        grid = (self._kept("scale"), self._kept("zero_point"), self._axis, *ends, self._dtype)
        values = self._kept("weight")
        if self._floating:
            return values
        if self._spelling.weights_in_graph:
            values = _OPS.quantize_per_channel(values, *grid)
        result: Tensor = _OPS.dequantize_per_channel(values, *grid)
        return result

    def bias(self, given: Tensor | None) -> Tensor | None:
        if not self._has_bias:
            return None
        bias = self._kept("bias")
        if self._integer_bias:
            bias = _OPS.dequantize_per_channel(
                bias, self._kept("bias_scale"), self._kept("bias_zero_point"), 0,
                -_INT32 - 1, _INT32, torch.int32,
            )  # fmt: skip
        return bias

    def _keep(self, **tensors: Tensor) -> None:
        for name, value in tensors.items():
            self._owner.register_buffer(f"layer{self._index}_{name}", value)

    def _kept(self, name: str) -> Tensor:
        value: Tensor = getattr(self._owner, f"layer{self._index}_{name}")
        return value


def _activation_grids(
    quantization: Quantization, spelling: Spelling
) -> dict[str, Callable[[Tensor], Tensor]]:
    placement = quantization.placement
    names = [*placement.activations.values()]
    names += placement.outputs.values() if spelling.quantized_outputs else ()
    return {name: _rounding(quantization.activation(name), spelling) for name in names}


def _dtype(spelling: Spelling) -> torch.dtype:
    return torch.int8 if spelling.signed_activations else torch.uint8


def _constants(quantizer: Quantizer, spelling: Spelling) -> Constants:
    shift = 128 if spelling.signed_activations else 0
    grid, zero = quantizer.grid, int(quantizer.zero_point) - shift
    return float(quantizer.step), zero, grid.low - shift, grid.high - shift, _dtype(spelling)


def _gate_grids(
    quantization: Quantization, spelling: Spelling
) -> dict[str, tuple[Constants, Constants, Constants]]:
    """By call: the grids of its input, its gate and its result."""
    activations = quantization.placement.activations
    return {
        name: (
            _constants(quantization.activation(activations[given]), spelling),
            _constants(quantization.gate(name), spelling),
            _constants(quantization.activation(activations[name]), spelling),
        )
        for name, given in quantization.placement.gates.items()
    }


def _rounding(
    quantizer: ActivationQuantizer | DynamicQuantizer | GateQuantizer, spelling: Spelling
) -> Callable[[Tensor], Tensor]:
    """Quantization and dequantization of an activation, as operators with constants."""
    if isinstance(quantizer, DynamicQuantizer):
        shift = 128 if spelling.signed_activations else 0
        return _dynamic_rounding(quantizer.grid, shift, _dtype(spelling))
    constants = _constants(quantizer, spelling)

    def rounded(x: Tensor) -> Tensor:
        return round_trip(x, constants) if x.is_floating_point() else x

    return rounded


def _dynamic_rounding(grid: Grid, shift: int, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    ends = (grid.low - shift, grid.high - shift)

    def round_trip(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        scale, zero = _OPS.choose_qparams.tensor(x, *ends, torch.finfo(torch.float32).eps, dtype)
        integers = _OPS.quantize_per_tensor.tensor(x, scale, zero, *ends, dtype)
        result: Tensor = _OPS.dequantize_per_tensor.tensor(integers, scale, zero, *ends, dtype)
        return result

    return round_trip

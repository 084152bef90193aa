"""Quantization, the child module that holds all quantizers of a network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils._pytree import tree_map_only

from lit_compress.compress.quantization.affine import MIN_BITS, affine_parameters
from lit_compress.compress.quantization.calls import (
    input_name,
    layer_arguments,
    seen_calls,
    tensors_in,
    with_layer_arguments,
)
from lit_compress.compress.quantization.gates import (
    PRODUCTS,
    gate_input,
    gated,
    is_in_place,
    operator_of,
)
from lit_compress.compress.quantization.integer_bias import integer_bias
from lit_compress.compress.quantization.placement import Placement, layer_of
from lit_compress.compress.quantization.quantizers import (
    ActivationQuantizer,
    DynamicQuantizer,
    GateQuantizer,
    Quantizer,
    WeightQuantizer,
)
from lit_compress.compress.quantization.ranges import RangeObserver
from lit_compress.compress.quantization.scheme import QuantizationScheme

__all__ = ["Quantization", "is_depthwise"]


class Quantization(nn.Module):
    """All quantizers of a network, as a child module of it.

    Attributes:
        scheme: What was declared.
        placement: Where quantizers are.
        activations: Quantizers of activations, by name with ``/`` for ``.``.
        gates: Quantizers of gates inside of SiLU and hardswish, likewise.
        weights: Quantizers of weights, likewise.
    """

    def __init__(
        self, network: nn.Module, scheme: QuantizationScheme, placement: Placement
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.placement = placement
        self.activations = nn.ModuleDict()
        self.weights = nn.ModuleDict()
        for name in dict.fromkeys(placement.activations.values()):
            is_gate = name in placement.gates and operator_of(name) not in PRODUCTS
            self.activations[_key(name)] = _activation_quantizer(scheme, is_gate=is_gate)
        self.gates = nn.ModuleDict(
            {
                _key(name): _activation_quantizer(scheme, is_gate=True)
                for name in placement.gates
                if operator_of(name) in PRODUCTS
            }
        )
        for name in placement.outputs.values():  # observed only, so there is nothing to learn
            if _key(name) not in self.activations:
                self.activations[_key(name)] = _activation_quantizer(scheme, output=True)
        for call, name in placement.weights.items():
            if _key(name) not in self.weights:
                self.weights[_key(name)] = _weight_quantizer(network, scheme, call, name)
        self._activation_of = {c: _key(n) for c, n in placement.activations.items()}
        self._output_of = {c: _key(n) for c, n in placement.outputs.items()}
        self._weight_of = {c: _key(n) for c, n in placement.weights.items()}
        self._input_of = {c: _key(n) for c, n in placement.layer_inputs.items()}
        self._norm_of = {c: n.partition(":")[0] for n, c in placement.batch_norms.items()}
        self._gate_of = {c: _key(c) for c in placement.gates if _key(c) in self.gates}
        self._observers: Mapping[str, RangeObserver] = {}
        self._least_weight_bits = MIN_BITS
        self._counts_checked = False

    @property
    def quantizers(self) -> list[Quantizer]:
        """All of them."""
        return [m for m in self.modules() if isinstance(m, Quantizer)]

    def set_mode(self, *, observing: bool, quantizing: bool) -> None:
        """Say whether ranges follow the values that come, and whether values are rounded."""
        for quantizer in self.quantizers:
            quantizer.observing, quantizer.quantizing = observing, quantizing

    @property
    def observing(self) -> bool:
        """Whether ranges follow the values that come."""
        return any(q.observing for q in self.quantizers)

    @property
    def quantizing(self) -> bool:
        """Whether values are rounded."""
        return any(q.quantizing for q in self.quantizers)

    @contextmanager
    def in_floating_point(self) -> Iterator[None]:
        """Inside, nothing is rounded and no range moves; afterwards all is as it was."""
        modes = [(q, q.observing, q.quantizing) for q in self.quantizers]
        self.set_mode(observing=False, quantizing=False)
        try:
            yield
        finally:
            for quantizer, observing, quantizing in modes:
                quantizer.observing, quantizer.quantizing = observing, quantizing

    @contextmanager
    def observed_by(self, observers: Mapping[str, RangeObserver]) -> Iterator[None]:
        """Inside, observers see the activations, by the keys of :attr:`activations`."""
        self._observers = observers
        try:
            yield
        finally:
            self._observers = {}

    @torch.no_grad()
    def map_ranges(self, change: Callable[[Tensor], Tensor], also_learned: bool = False) -> None:
        """Change the ranges of all activations that are observed, with the scales that follow.

        Args:
            change: Takes the ends of the ranges, lower ones first, shape ``[2, num_ranges]``, NaN
                where nothing was observed, and gives what they are to be, of the same shape.
            also_learned: Whether learned scales start again from their ranges.
        """
        grid = self.scheme.activation_grid
        observed = [q for q in self.activations.values() if isinstance(q, ActivationQuantizer)]
        found = [q for q in observed if also_learned or not q.learned]
        if grid is None or not found:
            return
        ends = [torch.stack([q.low for q in found]), torch.stack([q.high for q in found])]
        low, high = change(torch.stack(ends))
        scales, zero_points = affine_parameters(low, high, grid, checked=False)
        for index, quantizer in enumerate(found):
            quantizer.low.copy_(low[index])
            quantizer.high.copy_(high[index])
            quantizer.set_scale(scales[index], zero_points[index])

    def unready(self, with_outputs: bool = False) -> list[str]:
        """Activations that no calibration batch reached.

        Args:
            with_outputs: Whether those count that are observed only.
        """
        outputs = self.placement.outputs if with_outputs else {}
        names = dict.fromkeys([*self.placement.activations.values(), *outputs.values()])
        return [name for name in names if not self.activation(name).ready]

    def activation(self, name: str) -> ActivationQuantizer | DynamicQuantizer | GateQuantizer:
        """The quantizer of an activation, by the name that the placement has for it."""
        found = self.activations[_key(name)]
        assert isinstance(found, ActivationQuantizer | DynamicQuantizer | GateQuantizer)
        return found

    def gate(self, call: str) -> GateQuantizer:
        """The quantizer of a gate, by the call that computes it."""
        key = _key(call)
        found = self.gates[key] if key in self.gates else self.activations[key]
        assert isinstance(found, GateQuantizer)
        return found

    def weight(self, name: str) -> WeightQuantizer:
        """The quantizer of a weight, by its parameter's name."""
        found = self.weights[_key(name)]
        assert isinstance(found, WeightQuantizer)
        return found

    @property
    def least_weight_bits(self) -> int:
        """Bits that no weight has less of at the moment."""
        return self._least_weight_bits

    @least_weight_bits.setter
    def least_weight_bits(self, bits: int) -> None:
        """Give weights at least so many bits, and those of the scheme where that says more."""
        self._least_weight_bits = bits
        for name in self.placement.weights.values():
            grid = self.scheme.weight_grid(layer_of(name))
            self.weight(name).set_bits(max(bits, grid.bits))

    def get_extra_state(self) -> dict[str, int]:
        """What ``state_dict`` holds besides tensors: the mode, and the bits of the moment."""
        return {
            "observing": int(self.observing),
            "quantizing": int(self.quantizing),
            "least_weight_bits": self.least_weight_bits,
        }

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take over the mode and the bits of a checkpoint."""
        self.set_mode(observing=bool(state["observing"]), quantizing=bool(state["quantizing"]))
        with torch.no_grad():
            scales = {name: self.weight(name).scale.clone() for name in self._names_of_weights}
            self.least_weight_bits = state["least_weight_bits"]
            for name, scale in scales.items():  # they are those of the checkpoint already
                self.weight(name).set_scale(scale)

    @property
    def _names_of_weights(self) -> list[str]:
        return list(dict.fromkeys(self.placement.weights.values()))

    def forward(self, *values: Any) -> Any:
        """What came: a network that runs all of its children runs this one for nothing."""
        return values[0] if len(values) == 1 else values

    def run(
        self,
        network: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The network's own forward, with its tensors going through the quantizers."""
        if not (self.quantizing or self.observing or self._observers):
            return forward(*args, **kwargs)
        args, kwargs = self._quantize_inputs(args, kwargs)
        with seen_calls(network, partial(self._handle, network)) as counts:
            result = forward(*args, **kwargs)
        if self.training and not self._counts_checked:
            self._counts_checked = True
            self._check_counts(network, counts)
        return result

    def _check_counts(self, network: nn.Module, counts: Mapping[str, int]) -> None:
        """Calls are told apart by their order, which what happens in training only may change."""
        for kind, count in self.placement.counts.items():
            if counts.get(kind, 0) > int(count):
                path, _, op = kind.partition(":")
                warnings.warn(
                    f"{path or type(network).__name__} calls {op} {counts[kind]} times in "
                    f"training and {count} times in evaluation, so that in training quantizers may "
                    "stand at other calls than they are meant for. Put what happens in training "
                    "only into a module of its own.",
                    stacklevel=4,
                )

    def _quantize_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        count = -1

        def through(value: Tensor) -> Tensor:
            nonlocal count
            count += 1
            rounded: Tensor = self._quantize(input_name(count), value)
            return rounded

        changed: tuple[Any, Any] = tree_map_only(Tensor, through, (args, kwargs))
        return changed

    def _quantize(self, name: str, value: Any) -> Any:
        key = self._activation_of.get(name) or self._output_of.get(name)
        if key is None:
            return value
        if key in self._observers:
            self._observe(name, self._observers[key], value)
        rounded = tree_map_only(Tensor, self.activations[key], value)
        return rounded if name in self._activation_of else value

    def _observe(self, name: str, observer: RangeObserver, value: Any) -> None:
        for tensor in tensors_in(value):
            if tensor.is_floating_point():
                try:
                    observer.observe(tensor.detach())
                except ValueError as error:
                    raise ValueError(f"activation {name!r}: {error}") from error

    def _handle(
        self,
        network: nn.Module,
        name: str,
        op: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        key = self._weight_of.get(name)
        if key is not None:
            _, weight, bias = layer_arguments(args, kwargs)
            quantizer = self.weights[key]
            assert isinstance(quantizer, WeightQuantizer)
            rounded = quantizer(weight)
            if quantizer.quantizing and not self.training:
                step = quantizer.step_for(weight)
                bias = self._integer_bias(network, name, step, bias, rounded.dtype)
            args, kwargs = with_layer_arguments(args, kwargs, rounded, bias)
        gate = self._gate_of.get(name)
        if gate is not None and self.gates[gate].quantizing:
            x = gate_input(args, kwargs)
            if not is_in_place(func, args, kwargs):
                return self._quantize(name, gated(op, x, self.gates[gate]))
            return x.copy_(self._quantize(name, gated(op, x.clone(), self.gates[gate])))
        return self._quantize(name, func(*args, **kwargs))

    def _integer_bias(
        self,
        network: nn.Module,
        name: str,
        step: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor | None:
        """The bias as integer kernels have it, where the scale of the input is fixed."""
        source = self.activations[self._input_of[name]] if name in self._input_of else None
        grouped = bias is not None and step.dim() and len(step) != len(bias)
        if not isinstance(source, ActivationQuantizer) or not source.ready or grouped:
            return bias
        norm = network.get_submodule(self._norm_of[name]) if name in self._norm_of else None
        if norm is not None and norm.training:
            return bias
        return integer_bias(bias, source.step * step, norm, dtype)


def _key(name: str) -> str:
    return name.replace(".", "/")


def _activation_quantizer(
    scheme: QuantizationScheme, output: bool = False, is_gate: bool = False
) -> Quantizer:
    grid = scheme.activation_grid
    assert grid is not None
    if is_gate:
        return GateQuantizer(grid)
    if scheme.activation_ranges == "dynamic":
        return DynamicQuantizer(grid)
    learned = not output and scheme.activation_ranges == "learned"
    return ActivationQuantizer(grid, learned, extremes=output)


def _weight_quantizer(
    network: nn.Module, scheme: QuantizationScheme, call: str, name: str
) -> WeightQuantizer:
    axis = 1 if call.partition(":")[2].startswith("conv_transpose") else 0
    channels: int | None = network.get_parameter(name).shape[axis]
    if name in scheme.per_tensor_weights or (axis == 1 and not _is_ungrouped(network, name)):
        channels = None
    layer = layer_of(name)
    return WeightQuantizer(
        scheme.weight_grid(layer),
        channels,
        axis,
        scheme.weight_ranges,
        pair_axis=axis if scheme.limits_pairs(layer) and not is_depthwise(network, name) else None,
    )


def _is_ungrouped(network: nn.Module, weight: str) -> bool:
    """Whether axis 1 of a transposed convolution's weight has all of its output channels.

    Groups lie along its inputs; where no module says how many there are, there may be any number.
    """
    layer = network.get_submodule(weight.rpartition(".")[0])
    return isinstance(layer, _ConvTransposeNd) and layer.groups == 1


def is_depthwise(network: nn.Module, weight: str) -> bool:
    """Whether a weight is of a convolution with one channel a group, which kernels do apart."""
    layer = network.get_submodule(weight.rpartition(".")[0])
    return (
        isinstance(layer, _ConvNd) and layer.groups == layer.in_channels == layer.out_channels > 1
    )

"""Decide which tensors of a network are quantized.

Integer kernels take integers and give integers, so each layer needs its input, its weight and the
end of what is fused into it (batch norm, ReLU) on a grid, and nothing in between. The rules are
those by which ONNX Runtime fuses; inductor, XNNPACK and LiteRT fuse the same patterns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lit_compress.compress.quantization.calls import LAYER_OPS, Call, Trace
from lit_compress.compress.quantization.flow import Flow
from lit_compress.compress.quantization.scheme import QuantizationScheme

__all__ = ["Placement", "place", "with_layer_names"]


@dataclass(frozen=True)
class Placement:
    """Where a network has quantizers; plain data.

    Attributes:
        activations: Which quantizer the result of a call (or an input) goes through.
        outputs: Likewise for results of layers that stay in floating point, as no layer takes
            integers from them; some runtimes want their ranges all the same.
        weights: Which quantizer the weight of a layer's call goes through: its parameter's name.
        biases: Parameter names of the biases of these calls.
        layer_inputs: Which activation quantizer's values these calls take.
        batch_norms: By a batch norm's call, the layer's call into which it goes.
        floating: Calls of layers, and names of parameters of two or more dimensions, that stay in
            floating point, and why.
        counts: How often an operator with a quantizer is called in a module, by both.
        gates: By a call of a sigmoid, or of a product with one (SiLU, hardswish): its input, which
            is rounded. The gate itself is rounded between 0 and 1.
    """

    activations: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    layer_inputs: dict[str, str] = field(default_factory=dict)
    batch_norms: dict[str, str] = field(default_factory=dict)
    floating: dict[str, str] = field(default_factory=dict)
    counts: dict[str, str] = field(default_factory=dict)
    gates: dict[str, str] = field(default_factory=dict)

    def to_plain(self) -> dict[str, dict[str, str]]:
        """As plain data for a checkpoint."""
        return {name: dict(value) for name, value in vars(self).items()}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Placement:
        """What :meth:`to_plain` gave.

        Raises:
            ValueError: If it is something else.
        """
        names = cls.__dataclass_fields__
        plain = {"gates": {}, **plain}  # records of before had none
        if set(plain) != set(names) or not all(isinstance(v, Mapping) for v in plain.values()):
            raise ValueError(
                f"a placement of quantizers has the parts {', '.join(names)}; came "
                f"{', '.join(map(str, plain))}. The record was not written by this library."
            )
        return cls(**{name: {str(k): str(v) for k, v in plain[name].items()} for name in names})

    def __str__(self) -> str:
        """Counts, and the layers left out."""
        lines = [
            f"{len(set(self.weights.values()))} layers and "
            f"{len(set(self.activations.values()))} activations quantized"
        ]
        lines += [f"  {name.partition(':')[0] or name} stays in floating point: {why}"
                  for name, why in self.floating.items()]  # fmt: skip
        return "\n".join(lines)


def with_layer_names(
    scheme: QuantizationScheme, trace: Trace, prefix: str = ""
) -> QuantizationScheme:
    """What a user declared, with the names of a network's layers in the place of patterns.

    Args:
        scheme: What the user declared.
        trace: The network's calls.
        prefix: Dotted name of the network in a LightningModule, which patterns may begin with.

    Raises:
        ValueError: If an ``ignored_layers`` or ``layer_bits`` pattern matches no layer.
    """
    return scheme.for_layers(map(layer_name, _layers(trace)), prefix)


def place(network: nn.Module, trace: Trace, scheme: QuantizationScheme) -> Placement:
    """Decide which tensors are quantized.

    Args:
        network: The network that was traced.
        trace: Its calls.
        scheme: What :func:`with_layer_names` gave.

    Raises:
        ValueError: If no layer is left to quantize.
    """
    layers = _layers(trace)
    floating = _floating(network, layers, scheme)
    quantized = {call.name for call in layers if call.name not in floating}
    if not quantized:
        raise ValueError(
            f"no layer of {type(network).__name__} can be quantized: "
            + ("; ".join(f"{layer_name(trace.calls[n])}: {why}" for n, why in floating.items())
               or "it calls no convolution and no linear layer")
            + "."
        )  # fmt: skip
    flow = Flow(network, trace, quantized)
    calls = {name: call for name, call in trace.calls.items() if name in quantized}
    activations = flow.activations(scheme)
    inputs = {name: flow.before_dropout(str(call.inputs[0])) for name, call in calls.items()}
    weights = {name: str(call.weight) for name, call in calls.items()}
    outputs = flow.outputs(scheme, activations)
    return Placement(
        activations=activations,
        outputs=outputs,
        weights=weights,
        biases={name: call.bias for name, call in calls.items() if call.bias is not None},
        layer_inputs={n: activations[i] for n, i in inputs.items() if i in activations},
        batch_norms=flow.batch_norms(),
        floating=floating | _floating_parameters(network, trace, weights),
        counts=_counts(trace, {*activations, *outputs, *weights}),
        gates=flow.gates(activations),
    )


def _layers(trace: Trace) -> list[Call]:
    return [call for call in trace.calls.values() if call.op in LAYER_OPS]


def layer_name(call: Call) -> str:
    """The name of a layer by which users know it: its weight's, or where it is called."""
    return layer_of(call.weight) if call.weight else call.module


def layer_of(weight: str) -> str:
    """The name of a layer with this weight; a parameter of another name stands for itself."""
    return weight.removesuffix(".weight")


def _floating(network: nn.Module, layers: list[Call], scheme: QuantizationScheme) -> dict[str, str]:
    floating = {}
    for call in layers:
        name = layer_name(call)
        kinds = {c.op.startswith("conv_transpose") for c in layers if c.weight == call.weight}
        if scheme.ignores(name):
            floating[call.name] = "it is in ignored_layers"
        elif call.weight is None:
            floating[call.name] = "its weight is no parameter, but computed or a buffer"
        elif len(kinds) > 1:
            floating[call.name] = "its weight is a convolution's and a transposed convolution's"
        elif call.computes_bias:
            floating[call.name] = "its bias is no parameter, but computed or a buffer"
        elif network.get_parameter(call.weight).dim() < 2:
            floating[call.name] = "its weight has no dimension of output channels"
        elif not call.inputs or call.inputs[0] is None:
            floating[call.name] = "its input comes from no call and no argument"
        elif call.weight == layers[0].weight and not scheme.quantize_first_layer:
            floating[call.name] = "it is the first layer"
        elif call.weight == layers[-1].weight and not scheme.quantize_last_layer:
            floating[call.name] = "it is the last layer"
    return floating


def _floating_parameters(
    network: nn.Module, trace: Trace, weights: Mapping[str, str]
) -> dict[str, str]:
    """Parameters that something else than layers takes as they are, and what."""
    of_layers = {call.weight for call in trace.calls.values() if call.op in LAYER_OPS}
    found = {}
    for name, parameter in network.named_parameters():
        readers = [call for call in trace.readers.get(name, ()) if weights.get(call) != name]
        ops = ", ".join(dict.fromkeys(call.split(":")[1] for call in readers))
        if parameter.dim() < 2:
            continue
        if name in weights.values():
            if readers:
                found[name] = f"{ops} takes it as well, besides the layer that is quantized"
        elif name not in of_layers:
            found[name] = (
                f"it goes into {ops}; only convolutions and linear layers are quantized"
                if readers
                else "no convolution and no linear layer takes it"
            )
    return found


def _counts(trace: Trace, planned: set[str]) -> dict[str, str]:
    made = Counter(name.rpartition(":")[0] for name in trace.calls)
    kinds = dict.fromkeys(name.rpartition(":")[0] for name in trace.calls if name in planned)
    # Attributes are read by the name "get", most of which give no tensor and are not in a trace.
    return {kind: str(made[kind]) for kind in kinds if not kind.endswith(":get")}

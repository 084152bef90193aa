"""Which tensors of a network are quantized.

Integer kernels take integers and give integers, so each layer needs its input, its weight and the
end of what is fused into it (batch norm, ReLU) on a grid, and nothing in between. The rules are
those by which ONNX Runtime fuses; inductor, XNNPACK and LiteRT fuse the same patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_compress.compress.quantization.calls import LAYER_OPS, Call, Trace
from lit_compress.compress.quantization.scheme import QuantizationScheme

__all__ = ["Placement", "place"]

# Integer kernels exist for them where their inputs are integers.
_ARITHMETIC = frozenset(
    "add mul cat avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d".split()
)
# They move values without changing them (or add zeros), so the grid stays the same.
_MOVES = frozenset(
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d flatten unflatten "
    "reshape view permute transpose movedim swapaxes t get getitem chunk split tensor_split "
    "unbind squeeze unsqueeze contiguous clone detach dropout dropout1d dropout2d dropout3d "
    "alpha_dropout feature_dropout pad expand channel_shuffle pixel_shuffle pixel_unshuffle "
    "native_channel_shuffle to float".split()
)
# They are fused into the layer before them.
_CLIPS = frozenset("relu relu6 hardtanh".split())


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
        floating: Calls of layers that stay in floating point, and why.
    """

    activations: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    layer_inputs: dict[str, str] = field(default_factory=dict)
    batch_norms: dict[str, str] = field(default_factory=dict)
    floating: dict[str, str] = field(default_factory=dict)

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
        if set(plain) != set(names) or not all(isinstance(v, Mapping) for v in plain.values()):
            raise ValueError(
                f"a placement of quantizers has the parts {', '.join(names)}; came "
                f"{', '.join(map(str, plain))}. The record was not written by this library."
            )
        return cls(**{name: {str(k): str(v) for k, v in plain[name].items()} for name in names})

    def __str__(self) -> str:
        """Counts, and the layers left out."""
        lines = [
            f"{len(self.weights)} layers and {len(set(self.activations.values()))} activations "
            "quantized"
        ]
        lines += [f"  {name.partition(':')[0]} stays in floating point: {why}"
                  for name, why in self.floating.items()]  # fmt: skip
        return "\n".join(lines)


def place(network: nn.Module, trace: Trace, scheme: QuantizationScheme) -> Placement:
    """Decide which tensors are quantized.

    Args:
        network: The network that was traced.
        trace: Its calls.
        scheme: What the user declared.

    Raises:
        ValueError: If an ``ignored_layers`` or ``layer_bits`` pattern matches no layer, or no layer
            is left to quantize.
    """
    layers = [call for call in trace.calls.values() if call.op in LAYER_OPS]
    _check_patterns(layers, scheme)
    floating = _floating(layers, scheme)
    quantized = {call.name for call in layers if call.name not in floating}
    if not quantized:
        raise ValueError(
            f"no layer of {type(network).__name__} can be quantized: "
            + ("; ".join(f"{layer_name(trace.calls[n])}: {why}" for n, why in floating.items())
               or "it calls no convolution and no linear layer")
            + "."
        )  # fmt: skip
    flow = _Flow(network, trace, quantized)
    calls = {name: trace.calls[name] for name in quantized}
    activations = flow.activations(scheme)
    inputs = {name: str(call.inputs[0]) for name, call in calls.items()}
    return Placement(
        activations=activations,
        outputs=flow.outputs(scheme, activations),
        weights={name: str(call.weight) for name, call in calls.items()},
        biases={name: call.bias for name, call in calls.items() if call.bias is not None},
        layer_inputs={n: activations[i] for n, i in inputs.items() if i in activations},
        batch_norms=flow.batch_norms(),
        floating=floating,
    )


def layer_name(call: Call) -> str:
    """The name of a layer by which users know it: its weight's, without the last part."""
    return call.weight.rpartition(".")[0] if call.weight else call.module


def _floating(layers: list[Call], scheme: QuantizationScheme) -> dict[str, str]:
    floating = {}
    for index, call in enumerate(layers):
        name = layer_name(call)
        if any(fnmatchcase(name, pattern) for pattern in scheme.ignored_layers):
            floating[call.name] = "it is in ignored_layers"
        elif call.weight is None:
            floating[call.name] = "its weight is computed in forward and is no parameter"
        elif not call.inputs or call.inputs[0] is None:
            floating[call.name] = "its input comes from no call and no argument"
        elif index == 0 and not scheme.quantize_first_layer:
            floating[call.name] = "it is the first layer"
        elif index == len(layers) - 1 and not scheme.quantize_last_layer:
            floating[call.name] = "it is the last layer"
    return floating


def _check_patterns(layers: list[Call], scheme: QuantizationScheme) -> None:
    names = [layer_name(call) for call in layers]
    for what in ("ignored_layers", "layer_bits"):
        for pattern in getattr(scheme, what):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"{what} has {pattern!r}, which matches no layer; there are "
                    f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
                )


class _Flow:
    """What follows on what in a trace."""

    def __init__(self, network: nn.Module, trace: Trace, quantized: set[str]) -> None:
        self._network = network
        self._trace = trace
        self._users = trace.users()
        self._layers = quantized
        self._integer = quantized | self._arithmetic()

    def activations(self, scheme: QuantizationScheme) -> dict[str, str]:
        """By name of a call or input: the quantizer that its result goes through."""
        if scheme.activation_bits is None:
            return {}
        points: dict[str, None] = {}
        dynamic = scheme.activation_ranges == "dynamic"
        for name in self._trace.calls:
            if name in (self._layers if dynamic else self._integer):
                points.update(dict.fromkeys(i for i in self._inputs(name) if i is not None))
                if not dynamic and self._gives_integers(name):
                    points[self._fused_end(name)] = None
        inner = self._inside_of_fusions()
        return {name: self._origin(name) for name in points if name not in inner}

    def outputs(self, scheme: QuantizationScheme, points: Mapping[str, str]) -> dict[str, str]:
        """By name of the last call fused into a layer that gives real numbers: its quantizer."""
        if scheme.activation_bits is None or scheme.activation_ranges == "dynamic":
            return {}
        ends = [self._fused_end(name) for name in self._trace.calls if name in self._layers]
        return {end: end for end in ends if end not in points}

    def batch_norms(self) -> dict[str, str]:
        """By a batch norm's call: the layer's call into which it goes."""
        found = {}
        for name in self._layers:
            if self._is_transposed(name):
                continue  # channels of its groups lie along the weight's inputs
            follower = self._only_user(name)
            if follower is not None and self._is_batch_norm(follower):
                found[follower] = name
        return found

    # --- Which calls compute with integers --------------------------------------------------------

    def _arithmetic(self) -> set[str]:
        """Sums, products and the like whose values reach a layer with nothing else between."""
        calls = self._trace.calls
        reaching: set[str] = set(self._layers)
        for name in reversed(calls):
            if calls[name].op in _ARITHMETIC | _MOVES | _CLIPS and any(
                user in reaching for user in self._users.get(name, ())
            ):
                reaching.add(name)
        return {
            name
            for name in reaching - self._layers
            if calls[name].op in _ARITHMETIC and self._takes_tensors(calls[name])
        }

    @staticmethod
    def _takes_tensors(call: Call) -> bool:
        needed = 2 if call.op in ("add", "mul") else 1
        return len(call.inputs) >= needed and None not in call.inputs

    def _gives_integers(self, name: str) -> bool:
        end = self._fused_end(name)
        if end in self._trace.outputs:
            return False
        if self._trace.calls[name].op != "linear":
            return True
        return any(self._reaches_integers(user) for user in self._users.get(end, ()))

    def _reaches_integers(self, name: str) -> bool:
        if name in self._integer:
            return True
        moves = self._trace.calls[name].op in _MOVES
        return moves and any(self._reaches_integers(u) for u in self._users.get(name, ()))

    def _inputs(self, name: str) -> tuple[str | None, ...]:
        call = self._trace.calls[name]
        return call.inputs[:1] if name in self._layers else call.inputs

    # --- What is fused with what ------------------------------------------------------------------

    def _only_user(self, name: str) -> str | None:
        users = self._users.get(name, [])
        return users[0] if len(users) == 1 and name not in self._trace.outputs else None

    def _fused_follower(self, name: str, layer: bool) -> str | None:
        follower = self._only_user(name)
        if follower is None:
            return None
        if self._trace.calls[follower].op in _CLIPS:
            return follower
        return follower if layer and self._is_batch_norm(follower) else None

    def _fused_end(self, name: str) -> str:
        for end in self._fused(name):
            name = end
        return name

    def _fused(self, name: str) -> list[str]:
        """What follows a call and is fused into it, in order."""
        followers: list[str] = []
        layer = name in self._layers and not self._is_transposed(name)
        after_clip = False
        following = self._fused_follower(name, layer)
        while following is not None and not after_clip:
            followers.append(following)
            after_clip = self._trace.calls[following].op in _CLIPS
            following = self._fused_follower(following, layer=False)
        return followers

    def _inside_of_fusions(self) -> set[str]:
        inside: set[str] = set()
        for name in self._integer:
            inside.update([name, *self._fused(name)][:-1])
        return inside

    def _is_batch_norm(self, name: str) -> bool:
        call = self._trace.calls[name]
        if call.op != "batch_norm":
            return False
        module = self._network.get_submodule(call.module)
        return (
            isinstance(module, _BatchNorm)
            and module.track_running_stats
            and module.running_var is not None
        )

    def _is_transposed(self, name: str) -> bool:
        return self._trace.calls[name].op.startswith("conv_transpose")

    def _origin(self, name: str) -> str:
        """The first call that had these values."""
        calls = self._trace.calls
        while name in calls and calls[name].op in _MOVES and calls[name].inputs:
            before = calls[name].inputs[0]
            if before is None:
                break
            name = before
        return name

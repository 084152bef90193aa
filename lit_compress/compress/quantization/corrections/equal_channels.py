"""Find layers between which each channel can be scaled without changing the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_compress.compress.calibration import evaluation_mode
from lit_compress.compress.quantization.calls import (
    LAYER_OPS,
    Call,
    Trace,
    record_calls,
    seen_calls,
    tensors_in,
)

__all__ = ["ChannelPair", "find_pairs"]

# f(s * x) == s * f(x) for s > 0, value by value.
_ELEMENTWISE = frozenset(
    {"relu", "leaky_relu", "prelu", "contiguous", "clone", "detach", "dropout", "dropout1d",
     "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}
)  # fmt: skip
# The same, channel by channel.
_POOLS = frozenset(
    f"{kind}_pool{n}d" for n in (1, 2, 3)
    for kind in ("max", "avg", "adaptive_max", "adaptive_avg")
)  # fmt: skip
_RESHAPES = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze"})
_CLIPS = frozenset({"relu6", "hardtanh", "clamp"})


@dataclass(frozen=True)
class ChannelPair:
    """A layer that writes channels and the only one that reads them.

    Attributes:
        first: Name of the layer that writes.
        second: Name of the layer that reads.
        weight: Parameter of ``first``, channels in dimension 0.
        bias: Its bias, where it has one.
        norm: Path of the batch norm behind it, where there is one.
        reader: Parameter of ``second``: ``[outputs, channels / groups, ...]``.
        groups: Of ``second``.
        activation: Greatest magnitude of each channel where ``second`` reads it: float32,
            ``[channels]``.
    """

    first: str
    second: str
    weight: str
    bias: str | None
    norm: str | None
    reader: str
    groups: int
    activation: Tensor


class _NoPair(Exception):
    """Says why the outputs of a layer cannot share factors with another one's inputs."""


def find_pairs(
    network: nn.Module, run: Callable[[nn.Module], Any]
) -> tuple[list[ChannelPair], dict[str, str]]:
    """Pairs of layers, in forward order, and why the other layers' outputs are in none.

    Args:
        network: The network; unchanged.
        run: Calls it once, as in ``lambda network: network(images)``.

    Raises:
        ValueError: If the network was not run.
    """
    trace = record_calls(network, run)
    flow = _Flow(network, trace)
    with torch.no_grad(), evaluation_mode(network), seen_calls(network, flow.see):
        run(network)
    pairs, left_alone = [], {}
    for call in trace.calls.values():
        if call.op in LAYER_OPS:
            try:
                pairs.append(flow.pair(call))
            except _NoPair as reason:
                left_alone[_layer(call)] = str(reason)
    return pairs, left_alone


def _layer(call: Call) -> str:
    return call.weight.rpartition(".")[0] if call.weight else call.module or call.name


class _Flow:
    """What follows on what, and what keeps channels apart."""

    def __init__(self, network: nn.Module, trace: Trace) -> None:
        self._network = network
        self._trace = trace
        self._users = trace.users()
        self._names = Counter(id(p) for _, p in network.named_parameters(remove_duplicate=False))
        self._uses = Counter(
            name for call in trace.calls.values() for name in (call.weight, call.bias) if name
        )
        self._elsewhere: set[int] = set()  # parameters that other calls than layers take
        self._norm_uses = Counter(c.module for c in trace.calls.values() if c.op == "batch_norm")
        self._passing: set[str] = set()
        self._dims: dict[str, int] = {}
        self._read: dict[str, tuple[Tensor, int]] = {}  # by layer: largest magnitudes, groups

    def see(
        self,
        name: str,
        op: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Remember of a call what its name does not say."""
        result = func(*args, **kwargs)
        given = args[0] if args else kwargs.get("input")
        if isinstance(result, Tensor) and isinstance(given, Tensor):
            self._dims[name] = result.dim()
            if op in LAYER_OPS:
                self._read[name] = (_channel_magnitudes(op, given), _groups(args, kwargs))
            elif _keeps_channels(op, given, result, args, kwargs):
                self._passing.add(name)
        if op not in LAYER_OPS and op != "batch_norm":
            self._elsewhere |= {id(value) for value in tensors_in(args, kwargs)} & set(self._names)
        return result

    def pair(self, first: Call) -> ChannelPair:
        """The layer that reads what this one writes."""
        self._check_own(first, "it")
        if first.op.startswith("conv_transpose"):
            raise _NoPair("transposed convolutions are skipped")
        name, norm = self._follower(first.name), None
        tokens = first.op == "linear" and self._dims[first.name] > 2
        if self._trace.calls[name].op == "batch_norm" and not tokens:
            norm, name = self._norm(self._trace.calls[name]), self._follower(name)
        while self._trace.calls[name].op not in LAYER_OPS:
            self._check_passes(self._trace.calls[name], tokens)
            name = self._follower(name)
        second = self._trace.calls[name]
        self._check_own(second, f"the next layer, {_layer(second)},")
        return self._made(first, norm, second, tokens)

    def _made(self, first: Call, norm: str | None, second: Call, tokens: bool) -> ChannelPair:
        if second.op.startswith("conv_transpose") or (tokens and second.op != "linear"):
            raise _NoPair(f"{_layer(second)} is a {second.op}, which is skipped behind it")
        assert first.weight is not None
        assert second.weight is not None
        activation, groups = self._read[second.name]
        channels = len(self._network.get_parameter(first.weight))
        if len(activation) != channels:
            raise _NoPair(f"{_layer(second)} does not read its {channels} channels one by one")
        return ChannelPair(_layer(first), _layer(second), first.weight, first.bias, norm,
                           second.weight, groups, activation)  # fmt: skip

    def _check_own(self, call: Call, who: str) -> None:
        if call.weight is None:
            raise _NoPair(f"{who} has a weight that is computed in forward and is no parameter")
        for name in (call.weight, call.bias):
            if name is not None and self._is_shared(name):
                raise _NoPair(f"{who} shares {name} with other calls or modules")

    def _is_shared(self, name: str) -> bool:
        key = id(self._network.get_parameter(name))
        return self._uses[name] > 1 or self._names[key] > 1 or key in self._elsewhere

    def _norm(self, call: Call) -> str:
        module = self._network.get_submodule(call.module)
        if not isinstance(module, _BatchNorm) or module.running_var is None or not module.affine:
            raise _NoPair("its batch norm has no weights or no running statistics")
        if self._norm_uses[call.module] > 1:
            raise _NoPair(f"its batch norm {call.module} is called more than once")
        if any(self._names[id(p)] > 1 for p in module.parameters()):
            raise _NoPair(f"its batch norm {call.module} shares its weights")
        return call.module

    def _follower(self, name: str) -> str:
        users = self._users.get(name, [])
        if name in self._trace.outputs:
            raise _NoPair("the network returns what it gives")
        if len(users) != 1:
            raise _NoPair(f"{len(users)} calls take what it gives")
        return users[0]

    def _check_passes(self, call: Call, tokens: bool) -> None:
        if call.op in _CLIPS:
            raise _NoPair(f"{call.op} clips at fixed values, so factors do not pass it")
        if call.name not in self._passing or (tokens and call.op not in _ELEMENTWISE):
            raise _NoPair(f"{call.op} does not let factors of channels pass")


def _keeps_channels(
    op: str, given: Tensor, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether each channel (dimension 1) of a result holds what came in it, times its factor."""
    if op in _ELEMENTWISE:
        return result.shape == given.shape
    if given.dim() < 2 or result.dim() < 2 or result.shape[:2] != given.shape[:2]:
        return False
    if op in _POOLS:
        return result.dim() == given.dim()
    if op in _RESHAPES:  # nothing but dimensions of size 1 came or went
        return given.shape[:2].numel() == given.numel()
    if op == "mean":
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dims = [dims] if isinstance(dims, int) else dims
        return dims is not None and all(int(dim) % given.dim() > 1 for dim in dims)
    if op == "pad":
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
        return not value and result.dim() == given.dim()
    return False


def _channel_magnitudes(op: str, x: Tensor) -> Tensor:
    """Greatest magnitude of each input channel of a layer's call: float32."""
    spatial = 0 if op == "linear" else int(op[-2])
    channels_first = x.float().abs().movedim(x.dim() - spatial - 1, 0)
    return channels_first.flatten(1).amax(1) if x.dim() > 1 else channels_first


def _groups(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of a convolution: ``(input, weight, bias, stride, padding, dilation, groups)``."""
    return int(kwargs.get("groups", args[6] if len(args) > 6 else 1))

"""The data flow of a traced network: which calls run in integers and which are fused."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_compress.compress.quantization.calls import Call, Trace
from lit_compress.compress.quantization.gates import GATES
from lit_compress.compress.quantization.scheme import QuantizationScheme

__all__ = ["Flow"]

# Integer kernels exist for them where their inputs are integers.
_ARITHMETIC = frozenset([
    "add", "mul", "cat", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d",
])  # fmt: skip
# They move values without changing them (or add zeros), so the grid stays the same.
_MOVES = frozenset([
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "flatten", "unflatten", "reshape", "view", "permute", "transpose", "movedim", "swapaxes",
    "t", "get", "getitem", "chunk", "split", "tensor_split", "unbind", "squeeze", "unsqueeze",
    "contiguous", "clone", "detach", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "pad", "expand",
    "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "native_channel_shuffle", "to",
    "float",
])  # fmt: skip
# They scale what they leave by 1 / (1 - p) in training, beyond the range that inference has.
_DROPOUTS = frozenset([
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout",
    "feature_alpha_dropout",
])  # fmt: skip
# They are fused into the layer before them.
_CLIPS = frozenset([
    "relu", "relu6", "hardtanh",
])  # fmt: skip


class Flow:
    """What follows on what in a trace.

    Args:
        network: The network that was traced.
        trace: Its calls.
        quantized: Names of the calls of layers that are quantized.
    """

    def __init__(self, network: nn.Module, trace: Trace, quantized: set[str]) -> None:
        self._network = network
        self._trace = trace
        self._users = trace.users()
        self._layers = quantized
        self._integer = quantized | self._arithmetic()
        self._gates = self._gates_of_integers()
        self._integer |= set(self._gates)

    def activations(self, scheme: QuantizationScheme) -> dict[str, str]:
        """By name of a call or input: the quantizer that its result goes through."""
        if scheme.activation_bits is None:
            return {}
        points: dict[str, None] = {}
        dynamic = scheme.activation_ranges == "dynamic"
        for name in self._trace.calls:
            if name in (self._layers if dynamic else self._integer):
                inputs = (i for i in self._inputs(name) if i is not None)
                points.update(dict.fromkeys(map(self.before_dropout, inputs)))
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

    def gates(self, points: Mapping[str, str]) -> dict[str, str]:
        """By name of a call of a sigmoid, or of a product with one: its input, which is rounded."""
        return {name: x for name, x in self._gates.items() if name in points and x in points}

    def batch_norms(self) -> dict[str, str]:
        """By a batch norm's call: the layer's call into which it goes."""
        found = {}
        for name in self._trace.calls:  # in their order, for files that are the same every time
            if name not in self._layers or self._is_transposed(name):
                continue  # channels of its groups lie along the weight's inputs
            follower = self._only_user(name)
            if follower is not None and self._is_batch_norm(follower, name):
                found[follower] = name
        return found

    # --- Which calls compute with integers --------------------------------------------------------

    def _arithmetic(self) -> set[str]:
        """Sums, products and the like whose values reach a layer with nothing else between."""
        calls = self._trace.calls
        reaching: set[str] = set(self._layers)
        for name in reversed(calls):
            if calls[name].op in _ARITHMETIC | _MOVES | _CLIPS | GATES.keys() and any(
                user in reaching for user in self._users.get(name, ())
            ):
                reaching.add(name)
        self._reaching = reaching
        return {
            name
            for name in reaching - self._layers
            if calls[name].op in _ARITHMETIC and self._takes_tensors(calls[name])
        }

    def _gates_of_integers(self) -> dict[str, str]:
        """Sigmoids and products with them that take integers and whose values reach a layer."""
        ends = {self._fused_end(name) for name in self._integer}
        found: dict[str, str] = {}
        for name, call in self._trace.calls.items():
            if call.op in GATES and name in self._reaching and call.inputs[0] is not None:
                given = self.before_dropout(call.inputs[0])
                if self._origin(given) in ends | found.keys():
                    found[name] = given
        return found

    @staticmethod
    def _takes_tensors(call: Call) -> bool:
        needed = 2 if call.op in ("add", "mul") else 1
        return len(call.inputs) >= needed and None not in call.inputs

    def _gives_integers(self, name: str) -> bool:
        end = self._fused_end(name)
        if self._is_output(end):
            return False
        if self._trace.calls[name].op != "linear":
            return True
        return any(self._reaches_integers(user) for user in self._users.get(end, ()))

    def _is_output(self, name: str) -> bool:
        """Whether the network returns these values, as they are or moved."""
        if name in self._trace.outputs:
            return True
        users = self._users.get(name, ())
        return any(self._trace.calls[u].op in _MOVES and self._is_output(u) for u in users)

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
        return follower if layer and self._is_batch_norm(follower, name) else None

    def _fused_end(self, name: str) -> str:
        for end in self._fused(name):
            name = end
        return name

    def _fused(self, name: str) -> list[str]:
        """What follows a call and is fused into it, in order."""
        followers: list[str] = []
        if self._trace.calls[name].op in GATES:
            return followers
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

    def _is_batch_norm(self, name: str, layer: str) -> bool:
        """Whether a call is a batch norm over the channels that a layer before it gives."""
        call, before = self._trace.calls[name], self._trace.calls[layer]
        if call.op != "batch_norm" or before.weight is None:
            return False
        if before.dims != self._network.get_parameter(before.weight).dim():
            return False  # channels of unbatched or higher-dimensional results lie elsewhere
        module = self._network.get_submodule(call.module)
        return (
            isinstance(module, _BatchNorm)
            and module.track_running_stats
            and module.running_var is not None
        )

    def _is_transposed(self, name: str) -> bool:
        return self._trace.calls[name].op.startswith("conv_transpose")

    def before_dropout(self, name: str) -> str:
        """What was dropped out to become this; in inference it is the same."""
        calls = self._trace.calls
        while name in calls and calls[name].op in _DROPOUTS and calls[name].inputs:
            before = calls[name].inputs[0]
            if before is None:
                break
            name = before
        return name

    def _origin(self, name: str) -> str:
        """The first call that had these values."""
        calls = self._trace.calls
        while name in calls and calls[name].op in _MOVES and calls[name].inputs:
            before = calls[name].inputs[0]
            if before is None:
                break
            name = before
        return name

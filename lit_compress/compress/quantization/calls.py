"""Record or change each call of a torch function that a network makes in its own forward.

Torch's functions are intercepted where Python calls them, above autograd, so that a network needs
no export: modules, hooks, training mode, mixed precision and control flow work as they always do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lit_compress.compress.calibration import evaluation_mode

__all__ = ["Call", "Handle", "Trace", "input_name", "record_calls", "seen_calls", "tensors_in"]

Handle: TypeAlias = Callable[[str, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""``(name, op, function, args, kwargs) -> result`` of one call."""

# They return no values that are computed with, or are asked for by torch itself.
_NOT_COMPUTED = frozenset([
    "size", "dim", "numel", "shape", "stride", "storage_offset", "data_ptr", "is_contiguous",
    "is_floating_point", "is_complex", "requires_grad", "set", "item", "tolist", "len", "bool",
    "int", "repr", "hash", "format", "element_size", "has_names", "register_hook", "retain_grad",
])  # fmt: skip
_ALIASES = {"iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "concat": "cat",
            "concatenate": "cat", "hardtanh_": "hardtanh", "multiply": "mul"}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call of a torch function.

    Attributes:
        name: ``"module.path:op:n"``, the n-th call of this operator inside of this module.
        op: The function's name without the underscores of its variants: ``conv2d``, ``add``.
        inputs: Where the tensors among its arguments come from: a call's name or an input's;
            ``None`` for parameters, buffers and constants. Weights and biases of layers are left
            out.
        weight: Name of the layer's weight, if it is a parameter of the network.
        bias: Name of the layer's bias, if it is one.
        computes_bias: Whether the layer has a bias that is no parameter.
        dims: Number of dimensions of the (first) result.
    """

    name: str
    op: str
    inputs: tuple[str | None, ...] = ()
    weight: str | None = None
    bias: str | None = None
    computes_bias: bool = False
    dims: int = 0

    @property
    def module(self) -> str:
        """Path of the innermost module in which it happens; empty for the network itself."""
        return self.name.partition(":")[0]


@dataclass(frozen=True)
class Trace:
    """All calls of one forward pass.

    Attributes:
        calls: By name, in order.
        outputs: Names of what the network returned.
        readers: Names of the calls that take a parameter, by the parameter's name.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()
    readers: dict[str, list[str]] = field(default_factory=dict)

    def users(self) -> dict[str, list[str]]:
        """Which calls take the result of a call (or an input), by name."""
        users: dict[str, list[str]] = {}
        for call in self.calls.values():
            for name in dict.fromkeys(call.inputs):
                if name is not None:
                    users.setdefault(name, []).append(call.name)
        return users


LAYER_OPS = frozenset([
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "linear",
])  # fmt: skip
"""Operators with a weight that can be quantized: ``(input, weight, bias, ...)``."""


def input_name(index: int) -> str:
    """The name of the n-th tensor among a network's arguments."""
    return f"input:{index}"


@contextmanager
def seen_calls(network: nn.Module, handle: Handle) -> Iterator[dict[str, int]]:
    """Inside, each call of a torch function in this thread goes through ``handle``.

    Args:
        network: The network whose forward runs inside, once.
        handle: What is done in place of each call that computes something.

    Yields:
        How often each operator was called in each module so far, by ``"module.path:op"``.
    """
    mode = _CallMode(network, handle)
    hooks = [
        register_module_forward_pre_hook(mode.enter),
        register_module_forward_hook(mode.leave, always_call=True),
    ]
    try:
        with mode:
            yield mode.counts
    finally:
        for hook in hooks:
            hook.remove()


def record_calls(network: nn.Module, run: Callable[[nn.Module], Any]) -> Trace:
    """The calls of a network in evaluation mode, and what flows from one to the other.

    Args:
        network: The network; unchanged.
        run: Calls it once, as in ``lambda network: network(images)``.

    Raises:
        ValueError: If the network's forward was not run.
    """
    recorder = _Recorder(network)
    with torch.no_grad(), evaluation_mode(network), _recorded_by(recorder, network):
        run(network)
    if not recorder.calls:
        raise ValueError(
            f"running {type(network).__name__} called no torch function inside of it; the function "
            "that runs it must call the network itself, as in lambda network: network(inputs)."
        )
    return Trace(recorder.calls, frozenset(recorder.outputs), recorder.readers)


@contextmanager
def _recorded_by(recorder: _Recorder, network: nn.Module) -> Iterator[None]:
    """Inside, the network's first forward is recorded, and nothing that happens around it."""
    forward, own = network.forward, vars(network).get("forward")

    def recorded(*args: Any, **kwargs: Any) -> Any:
        if recorder.calls:
            return forward(*args, **kwargs)
        recorder.begin(args, kwargs)
        with seen_calls(network, recorder.handle):
            result = forward(*args, **kwargs)
        recorder.end(result)
        return result

    network.forward = recorded
    try:
        yield
    finally:
        if own is None:
            del network.forward
        else:
            network.forward = own


def tensors_in(*values: Any) -> list[Tensor]:
    """All tensors in nested arguments, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _CallMode(TorchFunctionMode):
    def __init__(self, network: nn.Module, handle: Handle) -> None:
        super().__init__()
        self._handle = handle
        self._paths = {id(module): name for name, module in network.named_modules()}
        self._stack = [""]
        self.counts: dict[str, int] = {}
        self._thread = threading.get_ident()

    def enter(self, module: nn.Module, args: Any) -> None:
        if self._is_inside(module):
            self._stack.append(self._paths[id(module)])

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._is_inside(module):
            self._stack.pop()

    def _is_inside(self, module: nn.Module) -> bool:
        # Hooks on all modules are called in all threads, function modes in their own.
        return id(module) in self._paths and threading.get_ident() == self._thread

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        op = getattr(func, "__name__", "").strip("_")
        op = _ALIASES.get(op, op)
        if not op or op in _NOT_COMPUTED:
            return func(*args, **(kwargs or {}))
        kind = f"{self._stack[-1]}:{op}"
        count = self.counts.get(kind, 0)
        self.counts[kind] = count + 1
        return self._handle(f"{kind}:{count}", op, func, args, kwargs or {})


class _Recorder:
    def __init__(self, network: nn.Module) -> None:
        self._parameters: dict[int, str] = {}
        for name, value in network.named_parameters(remove_duplicate=False):
            self._parameters.setdefault(id(value), name)
        self._stored = {*self._parameters, *map(id, network.buffers())}
        self._from: dict[int, str] = {}
        self._alive: list[Tensor] = []  # an id says something as long as its tensor lives
        self.calls: dict[str, Call] = {}
        self.outputs: set[str] = set()
        self.readers: dict[str, list[str]] = {}

    def begin(self, args: Any, kwargs: Any) -> None:
        for index, value in enumerate(tensors_in(args, kwargs)):
            self._note(value, input_name(index))

    def end(self, result: Any) -> None:
        self.outputs |= {self._from[id(t)] for t in tensors_in(result) if id(t) in self._from}

    def handle(
        self,
        name: str,
        op: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        weight = bias = None
        computes_bias = False
        given = tensors_in(args, kwargs)
        read = dict.fromkeys(self._parameters.get(id(value)) for value in given)
        if op in LAYER_OPS:
            value, weight_value, bias_value = layer_arguments(args, kwargs)
            weight = self._parameters.get(id(weight_value))
            bias = self._parameters.get(id(bias_value))
            computes_bias = bias is None and bias_value is not None
            given = [value]
        inputs = tuple(self._from.get(id(value)) for value in given)
        result = func(*args, **kwargs)
        results = tensors_in(result)
        if results:
            dims = results[0].dim()
            self.calls[name] = Call(name, op, inputs, weight, bias, computes_bias, dims)
            made = [value for value in results if id(value) not in self._stored]
            for value in made:
                self._note(value, name)
            for parameter in read if made else ():
                if parameter is not None:
                    self.readers.setdefault(parameter, []).append(name)
        return result

    def _note(self, value: Tensor, name: str) -> None:
        self._from[id(value)] = name
        self._alive.append(value)


def layer_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias among the arguments of one of :data:`LAYER_OPS`."""
    names = ("input", "weight", "bias")
    found = [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
    return found[0], found[1], found[2]  # type: ignore[return-value]


def with_layer_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, bias: Tensor | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another weight and bias."""
    positional, named = list(args), dict(kwargs)
    for index, (name, value) in enumerate((("weight", weight), ("bias", bias)), start=1):
        if index < len(positional):
            positional[index] = value
        else:
            named[name] = value
    return tuple(positional), named

"""Record a network's inputs, outputs and layer features while it trains."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper, Removable
from lit_compress.compress.layers import plain_name


@dataclass(frozen=True)
class NetworkCall:
    """One call of a network.

    Attributes:
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
        features: What each watched layer returned, in the order of its calls.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    features: dict[str, list[Any]]


class NetworkCalls:
    """Records the calls of ``network`` inside :meth:`recording`, and nothing outside.

    Args:
        network: The network to watch. A LightningModule is watched by wrapping ``forward``, since
            strategies redirect the forward of the whole module; others by a forward hook.
        layers: Names of layers inside the network whose outputs are wanted.
        requires_grad: Record only calls that build a graph, as those of a student that trains.

    Raises:
        ValueError: If a name is no layer of the network.
    """

    def __init__(
        self, network: nn.Module, layers: Iterable[str] = (), requires_grad: bool = True
    ) -> None:
        self._network = network
        self._layers = {name: find_layer(network, name) for name in layers}
        self._requires_grad = requires_grad
        self._armed = False
        self._calls: list[NetworkCall] = []
        self._features: dict[str, list[Any]] = {}
        self._handles: list[Removable] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> NetworkCalls:
        # Hooks travel into copies of the network; there they find a recorder that never records.
        return NetworkCalls(nn.Identity())

    @property
    def description(self) -> str:
        """The network in words."""
        kind = type(self._network).__name__
        own = isinstance(self._network, LightningModule)
        return f"the forward of {kind}" if own else f"its network, a {kind},"

    def install(self) -> None:
        """Begin to watch the network."""
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(_LayerHook(self, name)))
        if isinstance(self._network, LightningModule):
            self._handles.append(MethodWrapper(self._network, "forward", self._around_forward))
        else:
            hook = self._network.register_forward_hook(self._on_call, with_kwargs=True)
            self._handles.append(hook)

    @contextmanager
    def recording(self, armed: bool = True) -> Iterator[None]:
        """Record the calls made in this block (``armed=False``: none of them)."""
        before, self._armed = self._armed, armed
        try:
            yield
        finally:
            self._armed = before

    def take(self) -> list[NetworkCall]:
        """The calls recorded since the last time, which are forgotten here."""
        calls, self._calls, self._features = self._calls, [], {}
        return calls

    def remove(self) -> None:
        """Leave the network as it was."""
        while self._handles:
            self._handles.pop().remove()
        self.take()

    def is_recording(self) -> bool:
        """Whether a call made now would be recorded."""
        return self._armed and (torch.is_grad_enabled() or not self._requires_grad)

    def keep_feature(self, name: str, output: Any) -> None:
        """Note the output of a watched layer for the call that is under way."""
        if self.is_recording():
            self._features.setdefault(name, []).append(output)

    def _on_call(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self.is_recording():
            self._calls.append(NetworkCall(args, kwargs, output, self._features))
            self._features = {}

    def _around_forward(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if self.is_recording():
            self._calls.append(NetworkCall(args, kwargs, output, self._features))
            self._features = {}
        return output


class _LayerHook:
    """A forward hook that knows its layer's name."""

    def __init__(self, calls: NetworkCalls, name: str) -> None:
        self._calls = calls
        self._name = name

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._calls.keep_feature(self._name, output)


def find_layer(module: nn.Module, name: str) -> nn.Module:
    """The layer of that name, wherever ``torch.compile`` has wrapped a part of the module.

    Raises:
        ValueError: If there is none; the nearest names are given.
    """
    modules: dict[str, nn.Module] = {}
    for known, layer in module.named_modules():
        modules.setdefault(plain_name(known), layer)
    if name in modules:
        return modules[name]
    nearest = difflib.get_close_matches(name, list(modules), n=3, cutoff=0.5)
    known = nearest or [known for known in modules if known][:5]
    raise ValueError(
        f"{name!r} is no module of {type(module).__name__}; "
        f"{'the nearest are' if nearest else 'it has'} {', '.join(map(repr, known)) or 'none'}."
    )


def find_network(pl_module: LightningModule, name: str | None) -> nn.Module:
    """The network of a LightningModule.

    Args:
        pl_module: The module to look into.
        name: Dotted name of the network; by default the only child that holds all parameters, or
            else the module itself.

    Raises:
        ValueError: If there is no module of that name.
    """
    if name is not None:
        return find_layer(pl_module, name)
    everything = set(pl_module.parameters())
    complete = [child for child in pl_module.children() if set(child.parameters()) == everything]
    return complete[0] if len(complete) == 1 and everything else pl_module


def find_uncompiled_network(pl_module: LightningModule) -> nn.Module:
    """The network of a LightningModule, without the wrapper of ``torch.compile``."""
    network = find_network(pl_module, None)
    original: nn.Module = getattr(network, "_orig_mod", network)
    return original


def name_of_network(pl_module: LightningModule, network: nn.Module | None = None) -> str:
    """The dotted name of a network in the LightningModule; empty where it is the module itself.

    Args:
        pl_module: The module.
        network: A part of it; by default what :func:`find_network` finds.
    """
    network = find_network(pl_module, None) if network is None else network
    return plain_name(next(name for name, part in pl_module.named_modules() if part is network))


def is_compiled(pl_module: LightningModule) -> bool:
    """Whether the module or a part of it runs through ``torch.compile``."""
    return pl_module._compiler_ctx is not None or any(
        isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None
        for module in pl_module.modules()
    )


def logits_of(output: Any) -> Tensor:
    """The tensor that stands for an output.

    A tensor itself, the first element of a tuple or list, the entry ``"logits"`` of a mapping, or
    the attribute ``logits``.

    Raises:
        ValueError: If the output is none of these.
    """
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    held = f" with the keys {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise ValueError(
        f"The network returned a {type(output).__name__}{held}, expected a tensor, a tuple whose "
        "first element is one, a mapping with the key 'logits' or an object with the attribute "
        "'logits'. Name the part of the network that returns its logits, as in "
        "student='model.head'."
    )

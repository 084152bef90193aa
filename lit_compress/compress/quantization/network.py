"""Networks that compute as if with integers, and are otherwise what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lit_compress.compress.calibration import Forward, evaluation_mode
from lit_compress.compress.quantization.affine import MIN_BITS
from lit_compress.compress.quantization.calls import (
    input_name,
    layer_arguments,
    record_calls,
    seen_calls,
    tensors_in,
    with_layer_arguments,
)
from lit_compress.compress.quantization.placement import Placement, place
from lit_compress.compress.quantization.quantizers import (
    ActivationQuantizer,
    DynamicQuantizer,
    Quantizer,
    WeightQuantizer,
)
from lit_compress.compress.quantization.ranges import (
    RangeKind,
    RangeObserver,
    mse_weight_scale,
    range_observer,
)
from lit_compress.compress.quantization.scheme import QuantizationScheme

__all__ = [
    "Quantization",
    "attach",
    "calibrate",
    "is_quantized",
    "prepare",
    "quantization_record",
    "quantized_network",
    "remove_quantization",
    "without_quantizers",
]

_CHILD = "quantization"
_VERSION = 1


class Quantization(nn.Module):
    """All quantizers of a network, as a child module of it.

    Attributes:
        scheme: What was declared.
        placement: Where quantizers are.
        activations: Quantizers of activations, by name with ``/`` for ``.``.
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
            self.activations[_key(name)] = _activation_quantizer(scheme)
        for name in placement.outputs.values():  # observed only, so there is nothing to learn
            self.activations[_key(name)] = _activation_quantizer(scheme, learned=False)
        for call, name in placement.weights.items():
            if _key(name) not in self.weights:
                self.weights[_key(name)] = _weight_quantizer(network, scheme, call, name)
        self._activation_of = {c: _key(n) for c, n in placement.activations.items()}
        self._output_of = {c: _key(n) for c, n in placement.outputs.items()}
        self._weight_of = {c: _key(n) for c, n in placement.weights.items()}
        self._observers: Mapping[str, RangeObserver] = {}
        self._least_weight_bits = MIN_BITS

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
    def observed_by(self, observers: Mapping[str, RangeObserver]) -> Iterator[None]:
        """Inside, observers see the activations, by the keys of :attr:`activations`."""
        self._observers = observers
        try:
            yield
        finally:
            self._observers = {}

    def unready(self) -> list[str]:
        """Activations that no calibration batch reached."""
        return [
            name
            for name in dict.fromkeys(self.placement.activations.values())
            if not self.activation(name).ready
        ]

    def activation(self, name: str) -> ActivationQuantizer | DynamicQuantizer:
        """The quantizer of an activation, by the name that the placement has for it."""
        found = self.activations[_key(name)]
        assert isinstance(found, ActivationQuantizer | DynamicQuantizer)
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
            grid = self.scheme.weight_grid(name.rpartition(".")[0])
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
        with seen_calls(network, self._handle):
            return forward(*args, **kwargs)

    def _quantize_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        count = -1

        def through(value: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return self._quantize(input_name(count), value)

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
        name: str,
        op: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        key = self._weight_of.get(name)
        if key is not None:
            _, weight, bias = layer_arguments(args, kwargs)
            args, kwargs = with_layer_arguments(args, kwargs, self.weights[key](weight), bias)
        return self._quantize(name, func(*args, **kwargs))


# --- Into a network and out of it -----------------------------------------------------------------


def prepare(
    network: nn.Module, scheme: QuantizationScheme, run: Callable[[nn.Module], Any]
) -> Quantization:
    """Give a network quantizers, which do nothing until they are told to.

    The network stays the same object with the same parameters under the same names. It gets a
    child module ``quantization`` and a subclass of its own class whose ``forward`` runs the
    original one.

    Args:
        network: The network; not compiled, and not quantized yet.
        scheme: What is to be quantized.
        run: Calls the network once on real inputs, as in ``lambda network: network(images)``.

    Returns:
        The child module.

    Raises:
        ValueError: If the network is quantized or compiled, has an attribute of that name, nothing
            in it can be quantized, or a name pattern matches no layer.
    """
    _refuse_unsuitable(network)
    placement = place(network, record_calls(network, run), scheme)
    return _attach(network, scheme, placement)


def quantization_record(network: nn.Module) -> dict[str, Any] | None:
    """What :func:`attach` needs to prepare a network of this class again, as plain data.

    Returns:
        ``None`` where the network is not quantized. Scales are in its ``state_dict``.
    """
    if not is_quantized(network):
        return None
    quantization = quantized_network(network)
    return {
        "version": _VERSION,
        "scheme": quantization.scheme.to_plain(),
        "placement": quantization.placement.to_plain(),
    }


def attach(network: nn.Module, record: Mapping[str, Any]) -> Quantization:
    """Prepare a network as its record says, without running it.

    Args:
        network: A network of the structure that the record is of; one that is quantized gets
            quantizers of this record.
        record: From :func:`quantization_record`.

    Raises:
        ValueError: If the record is none, of a later version, or of another network; the network
            is then as it was.
    """
    version = record.get("version") if isinstance(record, Mapping) else None
    if version != _VERSION:
        raise ValueError(
            f"the quantization record has version {version!r}, expected {_VERSION}. It was written "
            "by another version of this library; load it with that one."
        )
    scheme = QuantizationScheme(**record["scheme"])
    placement = Placement.from_plain(record["placement"])
    named = dict(network.named_parameters(remove_duplicate=False))
    missing = [name for name in placement.weights.values() if name not in named]
    if missing:
        raise ValueError(
            f"the quantization record quantizes {missing[0]!r}, which {type(network).__name__} "
            "does not have. Build the network with the arguments that it had when it was quantized."
        )
    if is_quantized(network):
        remove_quantization(network)
    _refuse_unsuitable(network)
    return _attach(network, scheme, placement)


def remove_quantization(network: nn.Module) -> None:
    """Take the quantizers off; weights keep the values that they have.

    Raises:
        ValueError: If it has none.
    """
    quantized_network(network)
    delattr(network, _CHILD)
    network.__class__ = _original_class(type(network))


def without_quantizers(module: nn.Module) -> nn.Module:
    """The same module after the quantizers of all networks inside of it were taken off."""
    for part in list(module.modules()):
        if is_quantized(part):
            remove_quantization(part)
    return module


def is_quantized(network: nn.Module) -> bool:
    """Whether a network has quantizers of its own."""
    return isinstance(getattr(network, _CHILD, None), Quantization)


def quantized_network(network: nn.Module) -> Quantization:
    """The quantizers of a network.

    Raises:
        ValueError: If it has none.
    """
    found = getattr(network, _CHILD, None)
    if not isinstance(found, Quantization):
        raise ValueError(
            f"{type(network).__name__} is not quantized; use prepare or attach, or one of the "
            "quantization callbacks, first."
        )
    return found


def _attach(network: nn.Module, scheme: QuantizationScheme, placement: Placement) -> Quantization:
    quantization = Quantization(network, scheme, placement)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    setattr(network, _CHILD, quantization.to(device).train(network.training))
    network.__class__ = _quantized_class(type(network))
    return quantization


@cache
def _quantized_class(original: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run: Callable[..., Any] = getattr(self, _CHILD).run
        return run(self, super(quantized, self).forward, args, kwargs)

    def own_parts(self: Any) -> Iterator[nn.Module]:
        return (part for part in self._modules.values() if not isinstance(part, Quantization))

    def count(self: Any) -> int:
        return len(self._modules) - 1

    body: dict[str, Any] = {"forward": forward, "__module__": original.__module__, "__doc__": original.__doc__,
            "__qualname__": original.__qualname__, "_lit_compress_quantizes": original}  # fmt: skip
    if issubclass(original, nn.Sequential):  # its parts are what is in it, one after the other
        body |= {"__iter__": own_parts, "__len__": count}
    quantized: type[nn.Module] = type(original.__name__, (original,), body)
    return quantized


def _original_class(quantized: type[nn.Module]) -> type[nn.Module]:
    original: type[nn.Module] = vars(quantized)["_lit_compress_quantizes"]
    return original


def _refuse_unsuitable(network: nn.Module) -> None:
    name = type(network).__name__
    if isinstance(network, torch._dynamo.OptimizedModule):
        raise ValueError(
            "the network is compiled by torch.compile, which has fixed what it computes; quantize "
            "the module itself and compile afterwards."
        )
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(f"{name} is a TorchScript module; quantize the Python module instead.")
    if is_quantized(network):
        raise ValueError(f"{name} is quantized already; remove_quantization takes it off.")
    if hasattr(network, _CHILD):
        raise ValueError(
            f"{name} has an attribute {_CHILD!r}, the name under which quantizers are kept; rename "
            "it in the network."
        )


# --- Ranges ---------------------------------------------------------------------------------------


def calibrate(
    network: nn.Module,
    forward: Forward,
    batches: Iterable[Any],
    ranges: RangeKind = "mse",
    percentile: float = 99.99,
) -> int:
    """Find the ranges of a prepared network's activations and weights, and begin to quantize.

    The network runs in evaluation mode with nothing rounded; batch norms and random state stay as
    they are.

    Args:
        network: From :func:`prepare` or :func:`attach`.
        forward: Runs it on a batch.
        batches: At least one; of the training data.
        ranges: How ranges come from the values seen.
        percentile: For ``ranges="percentile"``: percent of the values inside of the range.

    Returns:
        How many batches there were.

    Raises:
        ValueError: If there is no batch, an activation is NaN or infinite, or no batch reached a
            layer.
    """
    quantization = quantized_network(network)
    grid = quantization.scheme.activation_grid
    observed = {
        key: quantizer
        for key, quantizer in quantization.activations.items()
        if isinstance(quantizer, ActivationQuantizer)
    }
    observers = {}
    if grid is not None:
        observers = {key: range_observer(ranges, grid, percentile=percentile) for key in observed}
    quantization.set_mode(observing=False, quantizing=False)
    count = 0
    with quantization.observed_by(observers), torch.no_grad(), evaluation_mode(network):
        for batch in batches:
            forward(network, batch)
            count += 1
    if count == 0:
        raise ValueError(
            "there was no calibration batch; at least one batch of training data is needed to find "
            "the ranges of activations."
        )
    for key, quantizer in observed.items():
        if observers[key].seen:
            quantizer.set_range(*observers[key].range())
    fit_weights(network)
    missing = quantization.unready()
    if missing:
        raise ValueError(
            f"no calibration batch reached {missing[0]!r}; give batches that run the whole network, "
            "or put the layers that follow into ignored_layers."
        )
    quantization.set_mode(observing=False, quantizing=True)
    return count


@torch.no_grad()
def fit_weights(network: nn.Module) -> None:
    """Fit the scales of a prepared network's weights to their values."""
    quantization = quantized_network(network)
    for name in dict.fromkeys(quantization.placement.weights.values()):
        quantizer, weight = quantization.weight(name), network.get_parameter(name)
        if quantizer.ranges == "minmax":
            quantizer.follow(weight)
        else:
            scale = mse_weight_scale(weight.detach(), quantizer.grid, quantizer.axis)
            quantizer.set_scale(scale)


# --- Details --------------------------------------------------------------------------------------


def _key(name: str) -> str:
    return name.replace(".", "/")


def _activation_quantizer(scheme: QuantizationScheme, learned: bool = True) -> Quantizer:
    grid = scheme.activation_grid
    assert grid is not None
    if scheme.activation_ranges == "dynamic":
        return DynamicQuantizer(grid)
    return ActivationQuantizer(grid, learned and scheme.activation_ranges == "learned")


def _weight_quantizer(
    network: nn.Module, scheme: QuantizationScheme, call: str, name: str
) -> WeightQuantizer:
    weight, layer = network.get_parameter(name), name.rpartition(".")[0]
    axis = 1 if call.partition(":")[2].startswith("conv_transpose") else 0
    channels: int | None = weight.shape[axis]
    # Groups of a transposed convolution lie along its inputs, so axis 1 is not all of its channels.
    grouped = axis == 1 and getattr(network.get_submodule(layer), "groups", 1) > 1
    if grouped or name in scheme.per_tensor_weights:
        channels = None
    return WeightQuantizer(scheme.weight_grid(layer), channels, axis, scheme.weight_ranges)

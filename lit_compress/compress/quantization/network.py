"""Attach quantizers to a network and remove them: prepare, record, attach, remove."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lit_compress.compress.calibration import Forward, evaluation_mode
from lit_compress.compress.quantization.attached import Quantization
from lit_compress.compress.quantization.calls import record_calls
from lit_compress.compress.quantization.placement import Placement, place, with_layer_names
from lit_compress.compress.quantization.quantizers import ActivationQuantizer
from lit_compress.compress.quantization.ranges import RangeKind, mse_weight_scale, range_observer
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
_ORIGINAL = "_lit_compress_quantizes"  # on the subclass: the class that the network had
_VERSION = 1
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}  # by class, the subclass that quantizes


# --- Into a network and out of it -----------------------------------------------------------------


def prepare(
    network: nn.Module,
    scheme: QuantizationScheme,
    run: Callable[[nn.Module], Any],
    prefix: str = "",
) -> Quantization:
    """Give a network quantizers, which do nothing until they are told to.

    The network stays the same object with the same parameters under the same names. It gets a
    child module ``quantization`` and a subclass of its own class whose ``forward`` runs the
    original one.

    Args:
        network: The network; not compiled, and not quantized yet.
        scheme: What is to be quantized.
        run: Calls the network once on real inputs, as in ``lambda network: network(images)``.
        prefix: Dotted name of the network in a LightningModule, which name patterns may begin with.

    Returns:
        The child module; its scheme has names of layers in the place of patterns.

    Raises:
        ValueError: If the network is quantized or compiled, has an attribute of that name, nothing
            in it can be quantized, or a name pattern matches no layer.
    """
    _refuse_unsuitable(network)
    trace = record_calls(network, run)
    scheme = with_layer_names(scheme, trace, prefix)
    return _attach(network, Quantization(network, scheme, place(network, trace, scheme)))


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
    scheme, placement = _parts(record)
    _check_parts(network, placement)
    quantization = Quantization(network, scheme, placement)
    if is_quantized(network):
        remove_quantization(network)
    _refuse_unsuitable(network)
    return _attach(network, quantization)


def remove_quantization(network: nn.Module) -> None:
    """Take the quantizers off; weights keep the values that they have.

    Raises:
        ValueError: If it has none, or something else changed its class since.
    """
    quantized_network(network)
    original = vars(type(network)).get(_ORIGINAL)
    if original is None:
        raise ValueError(
            f"the class of the network was changed to {type(network).__name__} after it was "
            "quantized, as fully_shard and parametrizations do; take that off first."
        )
    _drop_bound_forward(network)
    delattr(network, _CHILD)
    network.__class__ = original


def without_quantizers(module: nn.Module) -> nn.Module:
    """The same module after the quantizers of all networks inside of it were taken off."""
    for part in list(module.modules()):
        if is_quantized(part):
            remove_quantization(part)
    return module


def is_quantized(network: nn.Module) -> bool:
    """Whether a network has quantizers of its own."""
    return isinstance(network._modules.get(_CHILD), Quantization)


def quantized_network(network: nn.Module) -> Quantization:
    """The quantizers of a network.

    Raises:
        ValueError: If it has none.
    """
    found = network._modules.get(_CHILD)
    if not isinstance(found, Quantization):
        raise ValueError(
            f"{type(network).__name__} is not quantized; use prepare or attach, or one of the "
            "quantization callbacks, first."
        )
    return found


def _parts(record: Mapping[str, Any]) -> tuple[QuantizationScheme, Placement]:
    try:
        return QuantizationScheme.from_plain(record["scheme"]), Placement.from_plain(
            record["placement"]
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the quantization record is incomplete or has unknown parts ({error}). It was not "
            "written by this library."
        ) from error


def _check_parts(network: nn.Module, placement: Placement) -> None:
    """Refuse what is placed on parameters and modules that a network does not have."""
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    modules = {name for name, _ in network.named_modules(remove_duplicate=False)}
    wanted = [*placement.weights.values(), *placement.biases.values()]
    missing = [name for name in wanted if name not in parameters]
    norms = (call.partition(":")[0] for call in placement.batch_norms)
    missing += [name for name in norms if name not in modules]
    if missing:
        raise ValueError(
            f"the quantization record quantizes {missing[0]!r}, which {type(network).__name__} "
            "does not have. Build the network with the arguments that it had when it was quantized."
        )


def _attach(network: nn.Module, quantization: Quantization) -> Quantization:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    _drop_bound_forward(network)
    setattr(network, _CHILD, quantization.to(device).train(network.training))
    network.__class__ = _quantized_class(type(network))
    return quantization


def _quantized_class(original: type[nn.Module]) -> type[nn.Module]:
    if original in _CLASSES:
        return _CLASSES[original]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run: Callable[..., Any] = getattr(self, _CHILD).run
        return run(self, super(quantized, self).forward, args, kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # The class has no name of its own under which pickle would find it.
        constructor, arguments, *rest = super(quantized, self).__reduce_ex__(protocol)
        named = (original if a is quantized else a for a in arguments)
        return (_unpickled, (original, constructor, *named), *rest)

    body: dict[str, Any] = {"forward": forward, "__reduce_ex__": reduce, _ORIGINAL: original,
            "__module__": original.__module__, "__doc__": original.__doc__,
            "__qualname__": original.__qualname__}  # fmt: skip
    if issubclass(original, nn.Sequential):
        body |= _sequence_without_child(original)
    quantized: type[nn.Module] = type(original.__name__, (original,), body)
    _CLASSES[original] = quantized
    return quantized


def _unpickled(original: type[nn.Module], constructor: Callable[..., Any], *arguments: Any) -> Any:
    quantized = _quantized_class(original)
    return constructor(*(quantized if a is original else a for a in arguments))


def _sequence_without_child(original: type[nn.Sequential]) -> dict[str, Any]:
    """Methods of a Sequential whose parts are those that run one after the other."""

    def own(self: Any) -> list[tuple[str, nn.Module]]:
        return [
            (n, part) for n, part in self._modules.items() if not isinstance(part, Quantization)
        ]

    def parts(self: Any) -> Iterator[nn.Module]:
        return (part for _, part in own(self))

    def count(self: Any) -> int:
        return len(own(self))

    def part(self: Any, index: int | slice) -> nn.Module:
        if isinstance(index, slice):
            return original(OrderedDict(own(self)[index]))
        return own(self)[index][1]

    return {"__iter__": parts, "__len__": count, "__getitem__": part}


def _drop_bound_forward(network: nn.Module) -> None:
    """Take off a forward that was put on the instance and is that of its class, as DDP leaves."""
    own = vars(network).get("forward")
    if getattr(own, "__func__", None) is type(network).forward:
        del network.forward


def _refuse_unsuitable(network: nn.Module) -> None:
    name = type(network).__name__
    if isinstance(network, torch._dynamo.OptimizedModule):
        raise ValueError(
            "the network is compiled by torch.compile, which has fixed what it computes; quantize "
            "the module itself and compile afterwards."
        )
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError(f"{name} is a TorchScript module; quantize the Python module instead.")
    own = vars(network).get("forward")
    if own is not None and getattr(own, "__func__", None) is not type(network).forward:
        raise ValueError(
            f"forward of this {name} was replaced on the instance, so that its quantizers would "
            "never run; quantize the network first and replace forward afterwards, or write a "
            "subclass."
        )
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
        observers = {
            key: range_observer("minmax" if q.extremes else ranges, grid, percentile=percentile)
            for key, q in observed.items()
        }
    count = 0
    with (
        quantization.in_floating_point(),
        quantization.observed_by(observers),
        torch.no_grad(),
        evaluation_mode(network),
    ):
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
            f"no calibration batch reached {missing[0]!r}; give batches that run the whole "
            "network, or put the layers that follow into ignored_layers."
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
            quantizer.set_scale(quantizer.safe(scale, weight))

"""Export a network to a file, run the file in its runtime, and compare it with torch."""

from __future__ import annotations

import contextlib
import copy
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from lit_compress.compress.quantization.integers import Spelling, integer_network
from lit_compress.compress.quantization.network import (
    is_quantized,
    quantized_network,
    without_quantizers,
)
from lit_compress.compress.quantization.placement import layer_of
from lit_compress.deploy.exporting import exported_program, where_batch_is_fixed
from lit_compress.deploy.flat_call import FlatCall, flat_inputs
from lit_compress.deploy.parity import Parity, ParityError, ParityTolerance, compare
from lit_compress.deploy.places import layers_named_in, listed, place_of_error, words_of_error
from lit_compress.deploy.route import ExportError, MissingExtra, Route, Target, Tensors
from lit_compress.deploy.runtimes import LoadedFile, content_of, load_file, route_to
from lit_compress.files import replacing
from lit_compress.measure.inputs import (
    ExampleInputs,
    describe,
    evaluating,
    infer_batch_size,
    with_batch_size,
)
from lit_compress.measure.processor import describe_processor, processor
from lit_compress.measure.size import compressed_length
from lit_compress.measure.table import aligned, megabytes

__all__ = ["ExportedFile", "export", "export_as"]


@dataclass(frozen=True)
class ExportedFile:
    """A file that computes what torch computes, within the tolerance.

    Attributes:
        path: The file; weights beside it (OpenVINO) have its name and a suffix of their own.
        target: Where it runs.
        integers: Whether it is of a quantized network.
        batch_size: Examples that it takes at a time; ``None`` for any number.
        size_bytes: Its size, with what stands beside it.
        compressed_size_bytes: Its size after deflate.
        parity: How close its outputs are to those of the network in torch, the quantized one where
            the file is of integers; measured on ``cpu``.
        cpu: The processor on which file and torch were compared.
        slow_layers: Layers whose integers could saturate on x86 without VNNI, and which are written
            so that they do not, at up to half the speed; none where the network was quantized with
            ``avoid_saturation``.
        needs_vnni: Layers with which the file computes something else on x86 without VNNI; none
            unless ``assume_vnni`` was given.
        seconds: What writing took.
    """

    path: Path
    target: Target
    integers: bool
    batch_size: int | None
    size_bytes: int
    compressed_size_bytes: int
    parity: Parity
    seconds: float
    cpu: str = ""
    slow_layers: tuple[str, ...] = ()
    needs_vnni: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [
            ("target", self.target),
            ("numbers", "int8" if self.integers else "float"),
            ("batch", "any" if self.batch_size is None else str(self.batch_size)),
            ("size", megabytes(self.size_bytes)),
            ("size, deflate", megabytes(self.compressed_size_bytes)),
        ]
        holds = "processors with VNNI or ARM dot products" if self.needs_vnni else "any processor"
        rows += [("compared on", self.cpu), ("holds on", holds)]
        lines = [*aligned((str(self.path), ""), rows), "", str(self.parity)]
        if self.slow_layers:
            lines += [
                "",
                f"{_named(self.slow_layers)} could saturate on x86 without VNNI and got a "
                "form that is slower. Quantize with avoid_saturation=True.",
            ]
        if self.needs_vnni:
            lines += ["", f"{_named(self.needs_vnni)} may saturate on x86 without VNNI."]
        return "\n".join(lines)


def export(
    network: nn.Module,
    target: Target,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    check_inputs: Sequence[ExampleInputs] | None = None,
    tolerance: ParityTolerance | None = None,
    num_threads: int = 1,
    assume_vnni: bool = False,
) -> ExportedFile:
    """Write a network to a file, run the file in its runtime and compare it with torch.

    The file gets its name only when its outputs are within the tolerance; a file beyond it is
    removed, and one that had the name before stays.

    Args:
        network: A network of floats, or one that is quantized; unchanged, in any mode. A quantized
            one is written with integers, a float one as it is.
        target: ``"onnx"`` and ``"ort-int8"`` (ONNX Runtime; the second takes quantized networks
            only), ``"openvino"``, ``"executorch"``, ``"litert"`` or ``"inductor"`` (AOTInductor).
        path: The file; the runtime's suffix is added where it is missing.
        example_inputs: One batch; a tensor, a tuple of arguments or a dict of keyword arguments.
            Files for ONNX Runtime and OpenVINO take any batch size, the others that of this batch.
        check_inputs: Batches of real inputs, like ``example_inputs`` but for the batch size, on
            which file and torch are compared; by default the example inputs. Where the file's
            batch size is fixed, they are cut into batches of that size, the last one filled up.
        tolerance: What is close enough; by default a cosine of .999, a largest error of 2 % and an
            argmax agreement of .95.
        num_threads: Threads of the runtime while comparing, at least 1.
        assume_vnni: Write int8 weights also where two products may exceed 16 bits, which is the
            fastest form, but wrong on x86 processors without VNNI.

    Returns:
        What was written.

    Raises:
        ExportError: If the runtime cannot take the network; it names the layers, where the
            exporter does.
        MissingExtra: If the runtime is not installed.
        ParityError: If the outputs differ too much.
        ValueError: If a value is out of range, the network is of floats and the target takes
            integers only, or it does not run on the inputs.

    Warns:
        UserWarning: If the file could take any batch size, but the network itself fixes it.
    """
    spelling = integer_spelling(target, assume_vnni)
    integers = is_quantized(network)
    if target == "ort-int8" and not integers:
        raise ValueError(
            f"{type(network).__name__} is a network of floats; {target} takes quantized ones. "
            "Quantize it first, with lit-compress quantize, PostTrainingQuantization or "
            "QuantizationAwareTraining, or export it to onnx."
        )
    return export_as(
        network,
        target,
        path,
        example_inputs,
        spelling if integers else None,
        check_inputs=check_inputs,
        tolerance=tolerance,
        num_threads=num_threads,
    )


def export_as(
    network: nn.Module,
    target: Target,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    spelling: Spelling | None,
    *,
    check_inputs: Sequence[ExampleInputs] | None = None,
    tolerance: ParityTolerance | None = None,
    num_threads: int = 1,
) -> ExportedFile:
    """As :func:`export`, in a spelling of its own.

    Args:
        network: As in :func:`export`.
        target: Likewise.
        path: Likewise.
        example_inputs: Likewise.
        spelling: How a quantized network is written; ``None``: without integers, which is compared
            with what it computes without its quantizers.
        check_inputs: As in :func:`export`.
        tolerance: Likewise.
        num_threads: Likewise.

    Raises:
        ExportError: As :func:`export`, as the others.
        MissingExtra: Likewise.
        ParityError: Likewise.
        ValueError: Likewise, or if a network of floats is to be spelled.
    """
    route, integers = route_to(target), spelling is not None
    path = _with_suffix(Path(path), route)
    _check_settings(tolerance, num_threads)
    form = None if spelling is None else spelling.saturating_weights
    batches = list(check_inputs) if check_inputs is not None else [example_inputs]
    if not batches:
        raise ValueError("check_inputs holds no batch; give at least one, or leave it out.")
    with _in_evaluation_on_cpu(network) as on_cpu:
        reference = _checked_call(on_cpu, example_inputs)
        written, saturating = _spelled(on_cpu, spelling, example_inputs)
        if spelling is None and is_quantized(network):
            reference = written  # a form without integers is what the network was in floats
        inputs = flat_inputs(example_inputs)
        written.fixed_batch = route.any_batch and not _takes_another_batch(
            reference, example_inputs
        )
        layers = _quantized_layers(on_cpu) if integers else []
        with replacing(path, *route.companions) as temporary:
            start = time.perf_counter()
            _write(written, route, target, temporary, inputs, layers)
            seconds = time.perf_counter() - start
            with _loaded_anew(temporary, target, num_threads, reference) as loaded:
                size = loaded.batch_size
                if route.any_batch and size is not None:
                    warnings.warn(_about_the_batch(path, size, reference, inputs), stacklevel=2)
                parity = compare(_pairs(reference, loaded, _resized(batches, size)))
            try:
                (tolerance or ParityTolerance()).check(parity, f"{path} ({target})")
            except ParityError as error:
                if form == "int8" and saturating and processor()[1]["vnni"] is False:
                    raise ParityError(
                        f"{error} It was written for processors with VNNI, which this one is not: "
                        f"{_named(saturating)} may saturate here. Write it on the processor that "
                        "it is for, or leave out assume_vnni (--assume-vnni)."
                    ) from error
                raise
    data = content_of(path)
    return ExportedFile(
        path=path,
        target=target,
        integers=integers,
        batch_size=size,
        size_bytes=len(data),
        compressed_size_bytes=compressed_length(data),
        parity=parity,
        seconds=seconds,
        cpu=describe_processor(),
        slow_layers=saturating if form in ("uint8", "float") else (),
        needs_vnni=saturating if form == "int8" else (),
    )


def integer_spelling(target: Target, assume_vnni: bool = False) -> Spelling:
    """How quantized networks are written for a target.

    Args:
        target: As in :func:`export`.
        assume_vnni: Likewise.

    Raises:
        ValueError: If there is no such target, or ``assume_vnni`` is no flag.
    """
    if not isinstance(assume_vnni, bool):
        raise ValueError(f"assume_vnni is {assume_vnni!r}, expected true or false.")
    spelling = route_to(target).spelling
    if assume_vnni and spelling.saturating_weights != "exact":
        return replace(spelling, saturating_weights="int8")
    return spelling


def _check_settings(tolerance: object, num_threads: object) -> None:
    if tolerance is not None and not isinstance(tolerance, ParityTolerance):
        raise ValueError(
            f"tolerance is {tolerance!r}, expected a ParityTolerance, as in "
            "ParityTolerance(max_error=0.05)."
        )
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
        raise ValueError(f"num_threads is {num_threads!r}, expected a whole number of at least 1.")


def _named(layers: Sequence[str], at_most: int = 4) -> str:
    names = ", ".join(layers[:at_most])
    more = len(layers) - at_most
    return f"{names} and {more} more layers" if more > 0 else names


def _spelled(
    network: nn.Module, spelling: Spelling | None, inputs: ExampleInputs
) -> tuple[FlatCall, tuple[str, ...]]:
    """What is written, and its layers with which x86 without VNNI may saturate."""
    if spelling is not None:
        integers = integer_network(network, spelling)
        return FlatCall(integers, inputs), integers.saturating
    if is_quantized(network):
        network = without_quantizers(copy.deepcopy(network))
    return FlatCall(network, inputs), ()


def _with_suffix(path: Path, route: Route) -> Path:
    path = path if path.suffix == route.suffix else path.with_name(path.name + route.suffix)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file.")
    for companion in route.files_of(path)[1:]:
        if companion.exists() and not path.exists():
            raise ValueError(
                f"{companion} exists and would be overwritten: {path.name} needs a file of that "
                "name beside it. Give another name, or remove it."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _in_evaluation_on_cpu(network: nn.Module) -> Iterator[nn.Module]:
    """The network itself where it is on the CPU, else a copy there."""
    tensors = (*network.parameters(), *network.buffers())
    if any(tensor.device.type != "cpu" for tensor in tensors):
        network = copy.deepcopy(network).cpu()
    with evaluating(network), torch.no_grad():
        yield network


def _checked_call(network: nn.Module, example_inputs: ExampleInputs) -> FlatCall:
    call = FlatCall(network, example_inputs)
    try:
        call(*flat_inputs(example_inputs))
    except Exception as error:
        said = _what_was_raised(error, network)
        raise ValueError(
            f"{type(network).__name__} raised {said} on example_inputs of "
            f"{describe(example_inputs)}. {_remedy_for_a_batch(call, example_inputs)}"
        ) from error
    return call


def _what_was_raised(error: Exception, network: nn.Module) -> str:
    place = place_of_error(error, network)
    said = f"{type(error).__name__} ({str(error).rstrip('.')})"
    return said if place is None else f"{said} in {place}"


def _remedy_for_a_batch(call: FlatCall, example_inputs: ExampleInputs) -> str:
    """What to pass instead of inputs on which a network fails: at best a batch of another size."""
    flat = flat_inputs(example_inputs)
    if flat[0].dim() > 0 and len(flat[0]) > 0:
        for size in _SIZES_TO_TRY:
            with contextlib.suppress(Exception):
                call(*flat_inputs(with_batch_size(example_inputs, size)))
                return (
                    f"It runs on a batch of {size}: the network itself fixes its batch size. Pass "
                    f"a batch of {size} (--batch-size {size}), or take the batch size from the "
                    "input's shape there, as in x.shape[0]."
                )
    return "Pass one batch as it takes it."


# A network that runs on none of these is taken to have another fault than its batch size.
_SIZES_TO_TRY = (1, 2, 4, 8, 16, 32)


def _takes_another_batch(call: FlatCall, batch: ExampleInputs) -> bool:
    """Whether the network itself runs on a batch of another size."""
    if flat_inputs(batch)[0].dim() == 0:
        return False
    try:
        call(*flat_inputs(_of_another_size(batch)))
    except Exception:  # whatever it is: on a batch of this size it ran
        return False
    return True


def _of_another_size(batch: ExampleInputs) -> ExampleInputs:
    return with_batch_size(batch, 1 if infer_batch_size(batch) > 1 else 2)


def _about_the_batch(path: Path, size: int, call: FlatCall, inputs: Tensors) -> str:
    """Why a file takes batches of one size only."""
    network = _network_of(call)
    try:
        call(*flat_inputs(_of_another_size(inputs)))
        place = where_batch_is_fixed(call, inputs, network)
    except Exception as error:  # the network's own
        place = place_of_error(error, network)
    where = f"in {place}" if place is not None else "torch.export does not say where"
    return (
        f"{path} takes batches of {size} only: {type(network).__name__} itself fixes its batch "
        f"size, {where}. For any batch size take it from the input's shape there, as in "
        "x.shape[0]; or export with the size that you need (example_inputs, --batch-size)."
    )


def _quantized_layers(network: nn.Module) -> list[str]:
    """Layers of integers in the order of their calls; none of a network of floats."""
    if not is_quantized(network):
        return []
    weights = quantized_network(network).placement.weights.values()
    return list(dict.fromkeys(map(layer_of, weights)))


def _write(
    call: FlatCall,
    route: Route,
    target: Target,
    path: Path,
    inputs: Tensors,
    quantized: Sequence[str],
) -> None:
    try:
        route.export(call.eval(), inputs, path, integers=bool(quantized))
    except MissingExtra:
        raise
    except Exception as error:  # each exporter has errors of its own
        network = _network_of(call)
        where, layers = _where(error, call, inputs)
        raise ExportError(
            f"{type(network).__name__} cannot be written for {target}; its exporter says "
            f"{words_of_error(error)}. {where} {_remedy(layers, quantized, str(error))}"
        ) from error


def _where(error: Exception, call: FlatCall, inputs: Tensors) -> tuple[str, list[str]]:
    """The layers of which an exporter's error speaks: in words, and their paths."""
    place = place_of_error(error, _network_of(call))
    if place is not None:
        return f"That is in {place}.", [place.layer]
    try:
        program = exported_program(call, inputs)
        found = layers_named_in(error, program)
        if not found:  # exporters take larger operators apart before they look
            found = layers_named_in(error, program.run_decompositions())
    except Exception:  # torch.export has its own say then, which the error gives
        found = []
    layers = list(dict.fromkeys(layer for _, layer in found if layer))
    if not layers:
        return "It names no layer.", []
    operators = ", ".join(dict.fromkeys(operator for operator, _ in found))
    return f"That is {operators} in {listed(layers)}.", layers


def _remedy(layers: Sequence[str], quantized: Sequence[str], said: str) -> str:
    if "choose_qparams" in said:  # what activation_ranges="dynamic" is written with
        return 'Quantize with activation_ranges="observed" or "learned", or choose another target.'
    integers = [layer for layer in layers if layer in quantized]
    if not integers:
        return (
            "Replace that operation, keep it out of the exported network, or choose another target."
        )
    if integers == [quantized[-1]]:
        how = f"quantize_last_layer=False, or ignored_layers=[{integers[0]!r}]"
    else:
        how = f"ignored_layers=[{listed(integers)}]"
    return (
        f"Leave it in floating point ({how}, when the network is quantized), replace that "
        "operation, or choose another target."
    )


@contextlib.contextmanager
def _loaded_anew(
    path: Path, target: Target, num_threads: int, call: FlatCall
) -> Iterator[LoadedFile]:
    """A file just written, in its runtime.

    Raises:
        ExportError: If the runtime does not load it: it was not damaged since.
    """
    try:
        loaded = load_file(path, num_threads)
    except ValueError as error:
        raise ExportError(
            f"{type(_network_of(call)).__name__} was written for {target}, but the runtime does "
            f"not load the file: {words_of_error(error.__cause__ or error)}. It names no layer. "
            "Choose another target."
        ) from error
    with loaded:
        yield loaded


def _network_of(call: FlatCall) -> nn.Module:
    network = getattr(call.network, "network", call.network)
    assert isinstance(network, nn.Module)
    return network


def _pairs(
    reference: FlatCall, loaded: LoadedFile, batches: Iterator[Tensors]
) -> Iterator[tuple[Tensors, Tensors]]:
    for batch in batches:
        # Runtimes and modules may write to their inputs.
        yield _of_torch(reference, batch), _of_file(loaded, reference, batch)


def _of_torch(reference: FlatCall, batch: Tensors) -> Tensors:
    try:
        outputs: Tensors = reference(*(t.clone() for t in batch))
    except Exception as error:  # the network's own
        network = _network_of(reference)
        raise ValueError(
            f"{type(network).__name__} raised {_what_was_raised(error, network)} on check_inputs "
            f"of {describe(batch)}; on example_inputs it ran. Where the network itself fixes or "
            "limits its batch size, give batches that it takes, or take the batch size from the "
            "input's shape there, as in x.shape[0]."
        ) from error
    return outputs


def _of_file(loaded: LoadedFile, reference: FlatCall, batch: Tensors) -> Tensors:
    try:
        return loaded(batch)
    except ValueError:  # inputs of other shapes: check_inputs are not like example_inputs
        raise
    except Exception as error:  # each runtime has errors of its own
        raise ExportError(
            f"{type(_network_of(reference)).__name__} was written for {loaded.target}, but the "
            f"runtime fails on {describe(batch)}: {words_of_error(error)}. It names no layer. "
            "Choose another target."
        ) from error


def _resized(batches: Sequence[ExampleInputs], batch_size: int | None) -> Iterator[Tensors]:
    """Batches of the size that a file takes; without one, as they are and one of another size."""
    if batch_size is None:
        yield flat_inputs(_of_another_size(batches[0]))
        for batch in batches:
            yield flat_inputs(batch)
        return
    for batch in batches:
        present = infer_batch_size(batch)
        tensors = flat_inputs(with_batch_size(batch, -(-present // batch_size) * batch_size))
        for start in range(0, present, batch_size):
            yield tuple(
                t[start : start + batch_size] if t.dim() and t.shape[0] > batch_size else t
                for t in tensors
            )

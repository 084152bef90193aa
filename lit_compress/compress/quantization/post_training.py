"""Quantize a trained network in one call, by the method that a user declares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lit_compress.compress.calibration import Forward, evaluation_mode
from lit_compress.compress.quantization.calls import tensors_in
from lit_compress.compress.quantization.corrections.bias_correction import correct_bias
from lit_compress.compress.quantization.corrections.equalization import equalize
from lit_compress.compress.quantization.corrections.rounding import round_adaptively
from lit_compress.compress.quantization.formats.conversions import (
    is_converted,
    note_conversion,
    remove_conversion,
)
from lit_compress.compress.quantization.formats.fixed_point import FixedPoint, quantize_fixed_point
from lit_compress.compress.quantization.formats.half import to_half
from lit_compress.compress.quantization.formats.linear_kernels import LinearKind, quantize_linears
from lit_compress.compress.quantization.network import (
    calibrate,
    is_quantized,
    prepare,
    remove_quantization,
)
from lit_compress.compress.quantization.ranges import RangeKind
from lit_compress.compress.quantization.scheme import ActivationRanges, QuantizationScheme

__all__ = [
    "Correction",
    "PostTrainingMethod",
    "PostTrainingOutcome",
    "PostTrainingScheme",
    "quantize_after_training",
]

PostTrainingMethod: TypeAlias = Literal[
    "static",
    "dynamic",
    "weight_only",
    "float16",
    "bfloat16",
    "fixed_point",
    "int8_dynamic_linear",
    "int8_weight_only_linear",
    "int4_weight_only_linear",
]
"""How a trained network is quantized; see :class:`PostTrainingScheme`."""
Correction: TypeAlias = Literal["equalization", "bias_correction", "adaround"]
"""What makes up for few bits; see :class:`PostTrainingScheme`."""

_ROUNDED = {"avoid_saturation", "weight_bits", "layer_bits", "corrections", "ignored_layers"}
_TAKES: dict[str, set[str]] = {
    "static": {*_ROUNDED, "activation_bits", "ranges", "percentile"},
    "dynamic": {*_ROUNDED, "activation_bits"},
    "weight_only": _ROUNDED,
    "float16": set(),
    "bfloat16": set(),
    "fixed_point": {"fixed_point"},
    "int8_dynamic_linear": {"ignored_layers"},
    "int8_weight_only_linear": {"ignored_layers"},
    "int4_weight_only_linear": {"ignored_layers"},
}
_ACTIVATION_RANGES: dict[str, ActivationRanges] = {"static": "observed", "dynamic": "dynamic"}


@dataclass(frozen=True)
class PostTrainingScheme:
    """What a user declares about the quantization of a trained network.

    Attributes:
        method: ``"static"``: weights on a grid for each output channel, activations on grids that
            calibration finds. ``"dynamic"``: the grids of activations are found again for each
            batch. ``"weight_only"``: activations stay in floating point. ``"float16"``,
            ``"bfloat16"``: all in half precision, but the norms' statistics. ``"fixed_point"``: see
            :class:`~lit_compress.compress.quantization.formats.fixed_point_record.FixedPoint`.
            ``"int8_dynamic_linear"``, ``"int8_weight_only_linear"``,
            ``"int4_weight_only_linear"``: linear layers run on torchao's kernels in eager torch,
            and nothing else changes.
        weight_bits: Bits of weights, 2 to 8, for the first three methods.
        activation_bits: Bits of activations, 2 to 8, for the first two.
        layer_bits: Bits of weights by name pattern of the layer, where they differ, for the first
            three.
        ranges: How ranges of activations come from the values seen, for ``"static"``.
        percentile: Percent of the values inside of the range, in (50, 100], for
            ``ranges="percentile"``.
        corrections: For the first three methods. ``"equalization"``: consecutive layers share out
            the spread of their channels. ``"adaround"``: weights are rounded up or down as the
            layer's output needs it. ``"bias_correction"``: biases make up for the mean error.
            They are applied in this order, in whatever order they are given.
        ignored_layers: Name patterns of layers that stay in floating point; not for half precision
            and fixed point.
        fixed_point: What is rounded, for ``"fixed_point"``; ``None`` for its defaults.
        avoid_saturation: As in
            :class:`~lit_compress.compress.quantization.scheme.QuantizationScheme`, for the first
            three methods.

    Raises:
        ValueError: If a value is out of range or of the wrong kind, or belongs to another method.
    """

    method: PostTrainingMethod = "static"
    weight_bits: int = 8
    activation_bits: int | None = 8
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    ranges: RangeKind = "mse"
    percentile: float = 99.99
    corrections: Sequence[Correction] = ()
    ignored_layers: Sequence[str] = ()
    fixed_point: FixedPoint | None = None
    avoid_saturation: bool = True

    def __post_init__(self) -> None:
        _check_choice("method", self.method, PostTrainingMethod)
        _check_choice("ranges", self.ranges, RangeKind)
        if isinstance(self.corrections, str):
            raise ValueError(
                f"corrections is the string {self.corrections!r}; give a list, as in "
                f"[{self.corrections!r}]."
            )
        for correction in self.corrections:
            _check_choice("a correction", correction, Correction)
        if self.fixed_point is not None and not isinstance(self.fixed_point, FixedPoint):
            raise ValueError(f"fixed_point is {self.fixed_point!r}; give a FixedPoint or nothing.")
        _check_percentile(self.percentile)
        object.__setattr__(self, "corrections", tuple(self.corrections))
        object.__setattr__(self, "layer_bits", dict(self.layer_bits or {}))
        self.quantizers()  # refuses bits and patterns that are none
        object.__setattr__(self, "ignored_layers", tuple(self.ignored_layers))
        self._refuse_arguments_of_others()

    def num_batches(self, available: int) -> int:
        """How many calibration batches are used where so many are available, at least 1."""
        fixed_point = self.fixed_point or FixedPoint()
        if self.method.endswith("_linear"):
            return 0
        if self.method == "fixed_point" and fixed_point.activation_bits is None:
            return 0
        ranges = self.method in ("static", "fixed_point")
        return available if ranges or self.corrections else 1  # to see what is computed

    def quantizers(self, per_tensor_weights: Sequence[str] = ()) -> QuantizationScheme:
        """The scheme of the quantizers, for the methods that have them.

        Args:
            per_tensor_weights: Names of weights with one scale for all channels.
        """
        return QuantizationScheme(
            self.weight_bits,
            None if self.method == "weight_only" else self.activation_bits,
            self.layer_bits,
            "mse",  # fixed once, so that what corrections put on the grid stays there
            _ACTIVATION_RANGES.get(self.method, "observed"),
            self.ignored_layers,
            per_tensor_weights=per_tensor_weights,
            avoid_saturation=self.avoid_saturation,
        )

    def _refuse_arguments_of_others(self) -> None:
        for one in fields(self):
            default = {} if one.default is MISSING else one.default
            given = getattr(self, one.name)
            implied = one.name == "activation_bits" and self.method == "weight_only"
            if (
                one.name != "method"
                and given != default
                and one.name not in _TAKES[self.method]
                and not (implied and given is None)
            ):
                takers = [repr(method) for method, names in _TAKES.items() if one.name in names]
                raise ValueError(
                    f"{one.name} is {given!r}, which method={self.method!r} has no use for; leave "
                    f"it out, or choose {' or '.join(takers)}."
                )
        if self.activation_bits is None and self.method in ("static", "dynamic"):
            raise ValueError(
                f"activation_bits is None with method={self.method!r}; choose "
                "method='weight_only' to leave activations in floating point."
            )
        if self.percentile != 99.99 and self.ranges != "percentile":
            raise ValueError(
                f"percentile is {self.percentile}, which ranges={self.ranges!r} has no use for; "
                "leave it out, or choose ranges='percentile'."
            )


@dataclass(frozen=True)
class PostTrainingOutcome:
    """What was quantized.

    Attributes:
        quantized: Names of the layers on integers or in another format, in the network's order;
            empty where the whole network is.
        floating: The layers that stay in floating point, and why.
        remarks: What corrections and formats have to say, one paragraph each.
        num_batches: Calibration batches that were used.
    """

    quantized: tuple[str, ...]
    floating: Mapping[str, str]
    remarks: tuple[str, ...]
    num_batches: int


def quantize_after_training(
    network: nn.Module,
    scheme: PostTrainingScheme,
    batches: Sequence[Any] = (),
    forward: Forward = lambda network, batch: network(batch),
    per_tensor_weights: Sequence[str] = (),
    prefix: str = "",
) -> PostTrainingOutcome:
    """Quantize a trained network, in place.

    Its class, parameters and buffers keep their names, and a checkpoint with the record that
    :func:`~lit_compress.compress.quantization.stored.quantization_records` gives loads into a fresh
    network. Batch norms and random state stay as they are.

    Args:
        network: A float network; unchanged if anything fails.
        scheme: How.
        batches: Calibration batches of training data; weights alone, half precision and linear
            layers need at most the first.
        forward: Runs the network on one batch.
        per_tensor_weights: Names of weights with one scale for all channels, so that equal values
            stay equal; those of clustered layers.
        prefix: Dotted name of the network in a LightningModule, which name patterns may begin with.

    Returns:
        What was quantized and what was not.

    Raises:
        ValueError: If the network is quantized already, in whole or in part, a batch is missing or
            does not run through it, a weight or an activation (which is named) is NaN or infinite,
            a name pattern matches nothing, or no layer can be quantized.
        ModuleNotFoundError: If the method needs torchao and it is missing.
    """
    for name, part in network.named_modules():
        if is_quantized(part) or is_converted(part):
            raise ValueError(
                f"{type(network).__name__} is quantized already"
                f"{f' (in {name!r})' if name else ''}; load the float weights into a new module, "
                "or take the quantization off first."
            )
    batches = batches[: scheme.num_batches(max(len(batches), 1))]
    needs_batches = scheme.num_batches(1) > 0 and scheme.method not in ("float16", "bfloat16")
    if needs_batches and not len(batches):
        raise ValueError(
            f"there is no calibration batch, and method={scheme.method!r} needs at least one of "
            "training data to see what the network computes; give batches."
        )
    for name, parameter in network.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise ValueError(
                f"{name!r} holds NaN or infinite values; load the weights of a run that did not "
                "diverge."
            )
    run = _explaining(forward, batches)
    with _unchanged_on_error(network):
        if scheme.method in ("static", "dynamic", "weight_only"):
            return _with_quantizers(network, scheme, batches, run, per_tensor_weights, prefix)
        if scheme.method == "fixed_point":
            return _in_fixed_point(network, scheme.fixed_point or FixedPoint(), batches, run)
        if scheme.method == "float16" or scheme.method == "bfloat16":
            return _in_half(network, scheme.method, batches, run)
        return _on_linear_kernels(network, scheme, prefix)


def _with_quantizers(
    network: nn.Module,
    scheme: PostTrainingScheme,
    batches: Sequence[Any],
    forward: Forward,
    per_tensor_weights: Sequence[str],
    prefix: str,
) -> PostTrainingOutcome:
    remarks: list[str] = []
    float_weights: Mapping[str, Tensor] | None = None
    if "equalization" in scheme.corrections:
        remarks.append(str(equalize(network, lambda net: forward(net, batches[0]))))
    quantization = prepare(
        network, scheme.quantizers(per_tensor_weights), lambda net: forward(net, batches[0]), prefix
    )
    calibrate(network, forward, batches, scheme.ranges, scheme.percentile)
    if "adaround" in scheme.corrections:
        rounding = round_adaptively(network, forward, batches)
        float_weights = rounding.float_weights
        remarks.append(str(rounding))
    if "bias_correction" in scheme.corrections:
        corrected = correct_bias(network, forward, batches, float_weights=float_weights)
        remarks.append(str(corrected))
    placement = quantization.placement
    layers = dict.fromkeys(name.rpartition(".")[0] for name in placement.weights.values())
    floating = {call.partition(":")[0]: reason for call, reason in placement.floating.items()}
    return PostTrainingOutcome(tuple(layers), floating, tuple(remarks), len(batches))


def _in_fixed_point(
    network: nn.Module, fixed_point: FixedPoint, batches: Sequence[Any], forward: Forward
) -> PostTrainingOutcome:
    record = quantize_fixed_point(network, fixed_point, batches, forward).record
    note_conversion(network, record)
    clipped = [t for t in record.tensors if t.num_overflow]
    worst = max(clipped, key=lambda t: t.num_overflow / t.num_values, default=None)
    remarks = [f"{len(record.tensors)} tensors are in fixed point, {fixed_point}."]
    if worst is not None:
        share = worst.num_overflow / worst.num_values
        remarks.append(
            f"Values beyond their range were clipped in {len(clipped)} of them, most of all in "
            f"{worst.name!r}: {share:.3%}."
        )
    return PostTrainingOutcome((), {}, tuple(remarks), len(batches))


def _in_half(
    network: nn.Module, dtype: str, batches: Sequence[Any], forward: Forward
) -> PostTrainingOutcome:
    was_finite = _finite(network, batches, forward)
    record = to_half(network, getattr(torch, dtype))
    note_conversion(network, record)
    if was_finite and not _finite(network, batches, forward):
        raise ValueError(
            f"an activation passes the range of {dtype} (up to "
            f"{torch.finfo(getattr(torch, dtype)).max:g}): on the first calibration batch the "
            "network's output is NaN or infinite, and in float32 it is not. Choose "
            "method='bfloat16', which has the range of float32."
        )
    remarks = []
    if record.num_flushed:
        count = sum(record.num_flushed.values())
        remarks.append(f"{count} weights other than zero became zero in {dtype}.")
    if record.kept:
        remarks.append(f"{len(record.kept)} tensors of batch and instance norms stay in float32.")
    return PostTrainingOutcome((), {}, tuple(remarks), len(batches))


def _on_linear_kernels(
    network: nn.Module, scheme: PostTrainingScheme, prefix: str
) -> PostTrainingOutcome:
    kinds = {f"{kind}_linear": kind for kind in get_args(LinearKind)}
    kernels = quantize_linears(
        network, kinds[scheme.method], ignored_layers=scheme.ignored_layers, prefix=prefix
    )
    note_conversion(network, kernels)
    return PostTrainingOutcome(kernels.quantized, kernels.skipped, (), 0)


# --- Details --------------------------------------------------------------------------------------


def _explaining(forward: Forward, batches: Sequence[Any]) -> Forward:
    """The same, with a batch that does not run named."""

    def run(network: nn.Module, batch: Any) -> Any:
        try:
            return forward(network, batch)
        except (RuntimeError, TypeError, IndexError) as error:
            index = next((i for i, known in enumerate(batches) if known is batch), 0)
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(batch))
            first = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(batches[0]))
            than = f", where the first batch has {first}" if index else ""
            raise ValueError(
                f"calibration batch {index} does not run through {type(network).__name__} "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
                f"its tensors have the shapes {shapes or 'of nothing'}{than}. Give batches as "
                "training has them."
            ) from error

    return run


def _finite(network: nn.Module, batches: Sequence[Any], forward: Forward) -> bool:
    """Whether the outputs are; also where there is no batch."""
    with torch.no_grad(), evaluation_mode(network):
        outputs = [tensors_in(forward(network, batch)) for batch in batches]
    return all(bool(t.isfinite().all()) for each in outputs for t in each)


@contextmanager
def _unchanged_on_error(network: nn.Module) -> Iterator[None]:
    tensors: list[Tensor] = [*network.parameters(), *network.buffers()]
    before = [(tensor, tensor.detach().clone()) for tensor in tensors]
    finished = False
    try:
        yield
        finished = True
    finally:
        if not finished:
            if is_quantized(network):
                remove_quantization(network)
            if is_converted(network):
                remove_conversion(network)
            for tensor, value in before:
                tensor.data = value


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}.")


def _check_percentile(percentile: Any) -> None:
    is_number = isinstance(percentile, int | float) and not isinstance(percentile, bool)
    if not is_number or not 50 < percentile <= 100:
        raise ValueError(f"percentile is {percentile!r}; expected a number above 50 and up to 100.")

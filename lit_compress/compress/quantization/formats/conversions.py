"""Convert a network to half precision, fixed point or torchao's linear layers, with a record.

Quantizers are a child module and bring their own record; these formats leave nothing in a network
by which they could be told again. So the network keeps its record, as plain data in its
``__dict__``, where copies of it take it along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from lit_compress.compress.quantization.formats.fixed_point import (
    apply_fixed_point,
    remove_fixed_point,
)
from lit_compress.compress.quantization.formats.fixed_point_record import FixedPointRecord
from lit_compress.compress.quantization.formats.half import HalfPrecision, apply_half, remove_half
from lit_compress.compress.quantization.formats.linear_kernels import (
    LinearKernels,
    apply_linear_kernels,
    remove_linear_kernels,
)

__all__ = [
    "Conversion",
    "ConversionKind",
    "convert_as",
    "is_conversion",
    "is_converted",
    "note_conversion",
    "remove_conversion",
    "stored_conversion",
]

ConversionKind = Literal["half", "fixed_point", "linear_kernels"]
Conversion = HalfPrecision | FixedPointRecord | LinearKernels
"""What was done to a network, as the functions that did it say."""

_RECORD = "_conversion_record"
"""Attribute of a converted network: ``{"kind": ..., "record": ...}``."""


class _Format(NamedTuple):
    type: type[Any]
    apply: Callable[[nn.Module, Any], Any]
    remove: Callable[[nn.Module, Any], None]


_FORMATS: dict[str, _Format] = {
    "half": _Format(HalfPrecision, apply_half, remove_half),
    "fixed_point": _Format(FixedPointRecord, apply_fixed_point, remove_fixed_point),
    "linear_kernels": _Format(LinearKernels, apply_linear_kernels, remove_linear_kernels),
}


def note_conversion(network: nn.Module, conversion: Conversion) -> None:
    """Have a network remember what was done to it, for checkpoints."""
    kind = next(kind for kind, known in _FORMATS.items() if isinstance(conversion, known.type))
    vars(network)[_RECORD] = {"kind": kind, "record": conversion.to_plain()}


def stored_conversion(network: nn.Module) -> dict[str, Any] | None:
    """What :func:`convert_as` needs to do the same again, as plain data; ``None`` if nothing."""
    record: dict[str, Any] | None = vars(network).get(_RECORD)
    return record


def is_converted(network: nn.Module) -> bool:
    """Whether a network is in another number format."""
    return _RECORD in vars(network)


def is_conversion(record: Any) -> bool:
    """Whether plain data look like what :func:`stored_conversion` gives."""
    return isinstance(record, Mapping) and "kind" in record


def convert_as(network: nn.Module, record: Mapping[str, Any]) -> None:
    """Do to a float network what was done to another one; it then takes that one's state dict.

    Args:
        network: A network of the same structure, in place.
        record: From :func:`stored_conversion`.

    Raises:
        ValueError: If the record is none, or of another network; nothing was changed then.
        ModuleNotFoundError: If the kernels come from a package that is missing.
    """
    kind = record.get("kind")
    if kind not in _FORMATS:
        raise ValueError(
            f"a number format is recorded as {kind!r}, expected one of "
            f"{', '.join(get_args(ConversionKind))}. The record was written by another version of "
            "this library; load it with that one."
        )
    conversion = _FORMATS[kind].type.from_plain(record.get("record"))
    _FORMATS[kind].apply(network, conversion)
    note_conversion(network, conversion)


def remove_conversion(network: nn.Module) -> None:
    """Bring a network back to float32, for other weights: those it has are rounded, or lost.

    Raises:
        ValueError: If it is not converted.
    """
    record = stored_conversion(network)
    if record is None:
        raise ValueError(f"{type(network).__name__} is in no other number format.")
    known = _FORMATS[record["kind"]]
    known.remove(network, known.type.from_plain(record["record"]))
    del vars(network)[_RECORD]

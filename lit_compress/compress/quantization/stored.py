"""Save quantized networks in checkpoints, and restore them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lit_compress.compress.quantization.formats.conversions import (
    convert_as,
    is_conversion,
    is_converted,
    remove_conversion,
    stored_conversion,
)
from lit_compress.compress.quantization.network import (
    attach,
    is_quantized,
    quantization_record,
    remove_quantization,
)

__all__ = [
    "QUANTIZATION_KEY",
    "belongs_to_quantizers",
    "holds_torchao_weights",
    "quantization_records",
    "quantization_within",
    "take_quantization",
]

QUANTIZATION_KEY = "lit_compress_quantization"
"""Where a checkpoint keeps the records of its quantized networks, by name in the module."""


def quantization_records(module: nn.Module) -> dict[str, Any]:
    """Records of all quantized networks inside of a module (or of itself), by name; plain data."""
    return {
        name: quantization_record(part) if is_quantized(part) else stored_conversion(part)
        for name, part in module.named_modules()
        if is_quantized(part) or is_converted(part)
    }


def quantization_within(
    module: nn.Module, checkpoint: Mapping[str, Any], prefix: str = "", source: str = "checkpoint"
) -> dict[str, Mapping[str, Any]]:
    """The quantization records that a checkpoint has of a module, which is not changed.

    Args:
        module: The module.
        checkpoint: It may hold records under :data:`QUANTIZATION_KEY`.
        prefix: What the module's names begin with in the checkpoint.
        source: Where the checkpoint came from, for the message.

    Returns:
        By name of the network within the module.

    Raises:
        ValueError: If the records are none, or of another model.
    """
    stored = checkpoint.get(QUANTIZATION_KEY) or {}
    if not isinstance(stored, Mapping) or not all(isinstance(r, Mapping) for r in stored.values()):
        raise ValueError(
            f"{source} holds a {type(stored).__name__} under {QUANTIZATION_KEY!r}, expected a "
            "quantization record for each network. The file was not written by this library."
        )
    wanted = {
        name: record
        for full, record in stored.items()
        if (name := _within(full, prefix)) is not None
    }
    known = dict(module.named_modules(remove_duplicate=False))
    unknown = next((name for name in wanted if name not in known), None)
    if unknown is not None:
        raise ValueError(
            f"{source} has a quantized network {unknown!r}, which {type(module).__name__} does not "
            "have. Build it with the arguments that it had in the run that wrote the file."
        )
    return wanted


def take_quantization(
    module: nn.Module, checkpoint: Mapping[str, Any], prefix: str = "", source: str = "checkpoint"
) -> None:
    """Quantize what a checkpoint has quantized, and nothing else; scales come with the weights.

    Args:
        module: A module of the structure that the checkpoint needs.
        checkpoint: As for :func:`quantization_within`.
        prefix: Likewise.
        source: Likewise.

    Raises:
        ValueError: If the records are none, or of another model; nothing was changed then.
    """
    wanted = quantization_within(module, checkpoint, prefix, source)
    present = quantization_records(module)
    for name in present:
        if present[name] != wanted.get(name):
            _back_to_float(module.get_submodule(name))
    for name, record in wanted.items():
        if present.get(name) == record and is_conversion(record):
            continue  # quantizers are made again: weights may have other sizes by now
        network = module.get_submodule(name)
        if is_conversion(record):
            convert_as(network, record)
        else:
            attach(network, record)


def belongs_to_quantizers(name: str) -> bool:
    """Whether an entry of a state dict is of quantizers, not of the model itself."""
    return name.startswith("quantization.") or ".quantization." in name


def holds_torchao_weights(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has layers on torchao's kernels."""
    records = checkpoint.get(QUANTIZATION_KEY)
    stored = records.values() if isinstance(records, Mapping) else ()
    return any(is_conversion(r) and r["kind"] == "linear_kernels" for r in stored)


def _back_to_float(network: nn.Module) -> None:
    if is_quantized(network):
        remove_quantization(network)
    else:
        remove_conversion(network)


def _within(name: str, prefix: str) -> str | None:
    """A network's name as the module under ``prefix`` has it; ``None`` if it lies outside."""
    if name + "." == prefix:
        return ""
    return name[len(prefix) :] if name.startswith(prefix) else None

"""Packed checkpoints: quantized weights stored as the integers that they are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress.compress.packing.packed_file import PackedContent, write_packed
from lit_compress.compress.packing.tensors import Integers
from lit_compress.compress.quantization.affine import dequantize, quantize
from lit_compress.compress.quantization.network import is_quantized, quantized_network
from lit_compress.compress.quantization.quantizers import WeightQuantizer
from lit_compress.compress.quantization.stored import QUANTIZATION_KEY, quantization_records
from lit_compress.compress.structure import record_of
from lit_compress.compress.structure_record import STRUCTURE_KEY

__all__ = ["unpacked_checkpoint", "write_packed_checkpoint"]

_SCALES = "scales"
_EXTRA = "extra_state"


@torch.no_grad()
def write_packed_checkpoint(path: str | os.PathLike[str], module: nn.Module) -> int:
    """Write the state of a module into a packed file, whole or not at all.

    Weights on integers are stored as these, in as many bits as they have; clustered and sparse
    weights as :func:`~lit_compress.compress.packing.packed_file.write_packed` stores them. With
    the weights come the structure and the quantizers, so that
    :func:`~lit_compress.compress.weight_files.load_checkpoint` opens the file as a checkpoint.
    Outputs are then the same bit by bit, but the weights are those on the grid: to train on with
    what rounding takes away, keep a checkpoint.

    Args:
        path: The file; an older one is replaced.
        module: A network or a module around it, quantized in any way or not.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: If a tensor is no plain one (it is named), as weights on kernels of torchao are
            not, or the module has extra state that is no plain data. An older file stays as it was.
    """
    state = module.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        if type(value.data) is not Tensor:
            raise ValueError(
                f"{name!r} is a {type(value.data).__name__}, and packed files hold plain tensors; "
                "save a checkpoint instead."
            )
    records = quantization_records(module)
    integers, scales = {}, {}
    for name, found, scale, axis in _integer_weights(module, records):
        integers[name], scales[name] = found, [scale, axis]
    record: dict[str, Any] = {
        _SCALES: scales,
        _EXTRA: {name: value for name, value in state.items() if name not in tensors},
        QUANTIZATION_KEY: {name: _with_fixed_scales(plain) for name, plain in records.items()},
    }
    structure = record_of(module)
    if structure:
        record[STRUCTURE_KEY] = structure.to_plain()
    others = {name: value for name, value in tensors.items() if name not in integers}
    return write_packed(path, others, integers, record)


def unpacked_checkpoint(content: PackedContent) -> dict[str, Any]:
    """What a packed file holds, in the form of a checkpoint.

    Args:
        content: Of a file from :func:`write_packed_checkpoint`, or of another packed file without
            integers.

    Returns:
        Tensors by name under ``state_dict``, and the records that belong to them.

    Raises:
        ValueError: If the file has integers, and does not say what they stand for.
    """
    record = content.record
    scales = record.get(_SCALES, {})
    state: dict[str, Any] = dict(content.state_dict)
    for name, integers in content.integers.items():
        scale_name, axis = scales.get(name, (None, None))
        scale = state.get(scale_name)
        if scale is None:
            raise ValueError(
                f"the packed file has {name!r} as integers and no scales for them; write it with "
                "write_packed_checkpoint, or read it with read_packed."
            )
        zero = torch.zeros_like(scale, dtype=torch.int32)
        state[name] = dequantize(integers.values, scale, zero, axis)
    known = (STRUCTURE_KEY, QUANTIZATION_KEY)
    records = {key: record[key] for key in known if key in record}
    return {"state_dict": state | record.get(_EXTRA, {}), **records}


def _integer_weights(
    module: nn.Module, records: Mapping[str, Any]
) -> Iterator[tuple[str, Integers, str, int | None]]:
    """Name, integers, name of the scales and axis of each weight that is used as integers only."""
    owners = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    for place in records:
        network = module.get_submodule(place)
        if not is_quantized(network) or not quantized_network(network).quantizing:
            continue
        quantization = quantized_network(network)
        names = {id(part): name for name, part in module.named_modules()}
        floating = {call.partition(":")[0] for call in quantization.placement.floating}
        for name in dict.fromkeys(quantization.placement.weights.values()):
            weight, quantizer = network.get_parameter(name), quantization.weight(name)
            if owners[id(weight)] > 1 or name.rpartition(".")[0] in floating:
                continue
            integers = _integers_of(weight.detach(), quantizer)
            if integers is not None:
                full = f"{place}.{name}" if place else name
                yield full, integers, f"{names[id(quantizer)]}.scale", quantizer.axis


def _integers_of(weight: Tensor, quantizer: WeightQuantizer) -> Integers | None:
    """The integers that stand for exactly what the network computes with, if there are such."""
    quantizer.set_scale(quantizer.step_for(weight))
    rounded = quantizer(weight)
    scale, zero = quantizer.scale.detach(), quantizer.zero_point
    values = quantize(weight, scale, zero, quantizer.grid, quantizer.axis)
    exact = dequantize(values, scale, zero, quantizer.axis).to(weight.dtype)
    return Integers(values.to(torch.int8), quantizer.grid.bits) if exact.equal(rounded) else None


def _with_fixed_scales(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with scales that are not found again from weights that are rounded."""
    scheme = record.get("scheme")
    if not isinstance(scheme, Mapping) or scheme["weight_ranges"] != "minmax":
        return dict(record)
    return {**record, "scheme": {**scheme, "weight_ranges": "mse"}}

"""The bytes of a quantized network, each number at the bits that it has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_compress.compress.quantization.formats.conversions import stored_conversion
from lit_compress.compress.quantization.formats.fixed_point_record import FixedPointRecord
from lit_compress.compress.quantization.network import (
    Quantization,
    is_quantized,
    quantized_network,
)

__all__ = ["stored_bytes"]


def stored_bytes(network: nn.Module) -> int:
    """Bytes of parameters and buffers where each number takes as many bits as it has.

    Weights on integers count with their bits, and scales with 4 bytes each; numbers in fixed point
    with theirs; all else as it is in memory. It is what a file needs before compression, without
    its names and headers; shared tensors count once.

    Args:
        network: A float network, or one that is quantized in any way.
    """
    bits = _bits_by_tensor(network)
    parts = [m for m in network.modules() if isinstance(m, Quantization)]
    inner = {id(t) for part in parts for t in (*part.parameters(), *part.buffers())}
    total = 0.0
    for tensor in (*network.parameters(), *network.buffers()):
        if id(tensor) in bits:
            total += tensor.numel() * bits[id(tensor)] / 8
        elif id(tensor) not in inner:
            total += _bytes_in_memory(tensor)
    scales = [q.scale.numel() for part in parts for q in part.quantizers]
    return round(total) + 4 * sum(scales)


def _bits_by_tensor(network: nn.Module) -> dict[int, int]:
    """Bits of the tensors that have fewer than in memory, by identity."""
    bits = {}
    for part in network.modules():
        if is_quantized(part):
            quantization = quantized_network(part)
            for name in quantization.placement.weights.values():
                bits[id(part.get_parameter(name))] = quantization.weight(name).grid.bits
        record = stored_conversion(part)
        if record is not None and record["kind"] == "fixed_point":
            tensors = {**dict(part.named_parameters()), **dict(part.named_buffers())}
            for one in FixedPointRecord.from_plain(record["record"]).tensors:
                if one.kind != "activation":
                    bits[id(tensors[one.name])] = one.grid.bits
    return bits


def _bytes_in_memory(tensor: Tensor) -> int:
    """Also of tensors that are made of several, as those of torchao are."""
    data = tensor.data
    if type(data) is Tensor or not hasattr(data, "__tensor_flatten__"):
        return data.nbytes
    names, _ = data.__tensor_flatten__()
    inner = [getattr(data, name) for name in names]
    return sum(_bytes_in_memory(part) for part in inner if isinstance(part, torch.Tensor))

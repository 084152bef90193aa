"""Rewrite global average pools so that ONNX Runtime computes them in integers.

The exporter writes a global average pool as ``ReduceMean``, which ONNX Runtime computes in floating
point, between dequantization and quantization of a whole map; for ``GlobalAveragePool`` it has an
integer kernel. On one thread of a CPU with AVX2, the 17 of EfficientNet-B0 take .3 ms instead of 3.

All here works on an ONNX graph as it is, a protocol buffer, and imports nothing of ONNX.
"""

from __future__ import annotations

import struct
from typing import Any

__all__ = ["pool_with_integers"]


def pool_with_integers(graph: Any) -> int:
    """Rewrite means over height and width that are kept as dimensions, in place.

    Args:
        graph: A ``GraphProto`` that knows the shapes of its values.

    Returns:
        How many there were.
    """
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.value_info, *graph.input)}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    count = 0
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) != 2 or ranks.get(node.input[0]) != 4:
            continue
        kept = {attribute.name: attribute.i for attribute in node.attribute}
        axes = _integers(constants.get(node.input[1]))
        if kept.get("keepdims", 1) == 1 and {axis % 4 for axis in axes} == {2, 3}:
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
            count += 1
    return count


def _integers(tensor: Any) -> tuple[int, ...]:
    if tensor is None:
        return ()
    if tensor.raw_data:
        return struct.unpack(f"<{len(tensor.raw_data) // 8}q", tensor.raw_data)
    return tuple(tensor.int64_data)

"""Integer weights of linear layers with float results, in LiteRT flatbuffers.

From a linear layer that takes integers and whose result is on no grid the converter makes a float
layer with float weights. LiteRT has an integer kernel for it all the same: of float inputs and int8
weights it finds the range of each row at each call. The converter cannot be told to write that
beside layers with fixed ranges, so the weights are put into its file. Of convolutions it stores the
integers, and computes in floating point.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["store_as_integers"]

# From this version of FULLY_CONNECTED on: float inputs and int8 weights with a scale a channel.
_VERSION = 12
_TOLERANCE = 1e-5


def store_as_integers(path: Path, weights: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Replace float weights of linear layers by the integers for which they stand, in place.

    Args:
        path: A ``.tflite`` file.
        weights: Of layers: the weight as real numbers on its grid, ``[out, in]``, and the scale,
            ``[out]``.

    Returns:
        How many were replaced.
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    known = [(weight.numpy(), scale.numpy().astype(np.float32)) for weight, scale in weights]
    model = flatbuffer_utils.read_model(path)
    replaced = 0
    for graph in model.subgraphs:
        for index, users in _float_weights(schema, model, graph).items():
            tensor = graph.tensors[index]
            buffer = model.buffers[tensor.buffer]
            values = np.frombuffer(bytes(buffer.data), np.float32).reshape(tuple(tensor.shape))
            found = _integers(values, known)
            if found is None:
                continue
            integers, scale = found
            buffer.data = np.frombuffer(integers.tobytes(), np.uint8)
            tensor.type = schema.TensorType.INT8
            tensor.quantization = grid = schema.QuantizationParametersT()
            grid.scale, grid.zeroPoint = scale, np.zeros(len(scale), np.int64)
            for operator in users:
                code = model.operatorCodes[operator.opcodeIndex]
                code.version = max(code.version, _VERSION)
                operator.builtinOptions.asymmetricQuantizeInputs = True
            replaced += 1
    if replaced:
        flatbuffer_utils.write_model(model, path)
    return replaced


def _float_weights(schema: Any, model: Any, graph: Any) -> dict[int, list[Any]]:
    """By tensor that is the float weight of linear layers and nothing else: these layers."""
    users: dict[int, list[Any]] = {}
    others: set[int] = set()
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        kind = max(code.builtinCode, code.deprecatedBuiltinCode)
        for place, index in enumerate(map(int, operator.inputs)):
            if place == 1 and kind == schema.BuiltinOperator.FULLY_CONNECTED:
                users.setdefault(index, []).append(operator)
            else:
                others.add(index)
    return {
        index: operators
        for index, operators in users.items()
        if index not in others
        and graph.tensors[index].type == schema.TensorType.FLOAT32
        and model.buffers[graph.tensors[index].buffer].data is not None
    }


def _integers(values: Any, known: list[tuple[Any, Any]]) -> tuple[Any, Any] | None:
    """The integers and scales of a weight that is one of the known ones."""
    for weight, scale in known:
        if weight.shape == values.shape and np.allclose(weight, values, _TOLERANCE, 0):
            return np.round(values / scale[:, None]).astype(np.int8), scale
    return None

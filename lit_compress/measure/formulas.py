"""Floating-point operations of the operators that torch's counter does not know.

``torch.utils.flop_counter.FlopCounterMode`` counts convolutions, matrix products and the CUDA
attention kernels. It passes silently over the operators below. Each formula gets the shapes of
the operator's arguments and returns operations, two per MAC, as torch's own do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import torch

Shape: TypeAlias = Sequence[int]


def _attention(query: Shape, key: Shape, value: Shape, *args: Any, **kwargs: Any) -> int:
    """Q·Kᵀ and weights·V of ``(..., heads, length, head_dim)``; a causal mask saves nothing."""
    *batch_and_heads, query_length, head_dim = query
    return 2 * prod(batch_and_heads) * query_length * key[-2] * (head_dim + value[-1])


def _lstm_layer(inputs: Shape, weight_ih: Shape, weight_hh: Shape, *args: Any, **kw: Any) -> int:
    """One direction of one layer: ``inputs`` is ``(time, batch, features)`` in either order."""
    return 2 * prod(inputs[:-1]) * (prod(weight_ih) + prod(weight_hh))


def _recurrent_stack(inputs: Shape, weights: Sequence[Shape], *args: Any, **kw: Any) -> int:
    """All layers and directions in one call: each weight matrix meets each time step once."""
    return 2 * prod(inputs[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _bilinear(left: Shape, weight: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    """``nn.Bilinear``: weight ``(out, left, right)`` contracted with ``left``, then ``right``."""
    out_features, left_features, right_features = weight
    return 2 * left[0] * out_features * right_features * (left_features + 1)


def _matrix_vector(matrix: Shape, vector: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(matrix)


def _add_matrix_vector(bias: Shape, matrix: Shape, vector: Shape, *args: Any, **kw: Any) -> int:
    return 2 * prod(matrix)


def _matrix_matrix(left: Shape, right: Shape, *args: Any, **kwargs: Any) -> int:
    return 2 * prod(left) * right[-1]


def _add_batched_product(bias: Shape, left: Shape, right: Shape, *args: Any, **kw: Any) -> int:
    return 2 * prod(left) * right[-1]


_FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    "mkldnn_rnn_layer": _lstm_layer,
    "_cudnn_rnn": _recurrent_stack,
    "miopen_rnn": _recurrent_stack,
    "_trilinear": _bilinear,
    "mv": _matrix_vector,
    "dot": _matrix_vector,
    "vdot": _matrix_vector,
    "addmv": _add_matrix_vector,
    "addbmm": _add_batched_product,
    "_int_mm": _matrix_matrix,
}


def missing_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas for ``FlopCounterMode(custom_mapping=...)``, keyed by torch's operators."""
    return {
        getattr(torch.ops.aten, name): formula
        for name, formula in _FORMULAS.items()
        if hasattr(torch.ops.aten, name)
    }

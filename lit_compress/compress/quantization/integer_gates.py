"""Sigmoids, SiLU and hardswish written with the integer kernels that a runtime has."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, nn
from torch.nn import functional as F

from lit_compress.compress.quantization.gates import PRODUCTS, gated

__all__ = ["Constants", "GateSpelling", "keep_one", "round_trip", "write_gate"]

GateSpelling: TypeAlias = Literal["whole", "sigmoids", "sums", "steps"]
"""How activations with gates are written.

``"whole"``: as one operator on real numbers, whose gate is not rounded. All others round it, and
write a soft sigmoid as an operator of its own; they differ in hard ones. ``"sigmoids"``: these are
an operator on real numbers, too. ``"sums"``: ``x / 6 + 1 / 2`` is a sum of the integers of ``x``,
read with a sixth of their scale, and a constant; the grid of the gate clips it at 0 and 1.
``"steps"``: ``x + 3`` on a grid of 0 to 6, and a product with 1 / 6 at the end, for runtimes in
which integers have one scale only.
"""
Constants: TypeAlias = tuple[float, int, int, int, torch.dtype]
"""Scale, zero point, ends and dtype of a grid, as the operators take them."""

_OPS = torch.ops.quantized_decomposed


def write_gate(
    op: str,
    x: Tensor,
    given: Constants,
    gate: Constants,
    result: Constants,
    spelling: GateSpelling,
    owner: nn.Module,
) -> Tensor:
    """An operator of :data:`~lit_compress.compress.quantization.gates.GATES` on integers.

    Args:
        op: The operator.
        x: Real numbers on their grid.
        given: The grid of ``x``.
        gate: The grid of the gate.
        result: The grid of the result, on which it is not yet.
        spelling: How it is written; not ``"whole"``, which needs nothing of this.
        owner: Keeps constants; see :func:`keep_one`.

    Returns:
        Of the shape of ``x``.
    """
    hard = op.startswith("hard")
    if not hard or spelling == "sigmoids":
        if op in PRODUCTS:
            return gated(op, x, lambda g: round_trip(g, gate))
        return F.hardsigmoid(x) if hard else torch.sigmoid(x)
    if spelling == "sums":
        integers = _OPS.quantize_per_tensor(x, *given)
        total = _OPS.dequantize_per_tensor(integers, given[0] / 6, *given[1:])
        ends = torch.iinfo(gate[-1])
        one = owner.get_buffer("one")
        total = total + _OPS.dequantize_per_tensor(one, 0.5, 0, ends.min, ends.max, gate[-1])
        return x * round_trip(total, gate) if op in PRODUCTS else total
    total = round_trip(x + _constant(x, 3.0, gate), (gate[0] * 6, *gate[1:]))
    if op in PRODUCTS:
        total = round_trip(x * total, (result[0] * 6, *result[1:]))
    return total * _constant(x, 1 / 6, gate)


def round_trip(x: Tensor, grid: Constants) -> Tensor:
    """Quantization and dequantization, as operators with constants."""
    scale, zero, low, high, _ = grid
    if high - low < 255:  # runtimes clip at the ends of eight bits only
        x = x.clamp((low - zero) * scale, (high - zero) * scale)
    integers = _OPS.quantize_per_tensor(x, *grid)
    result: Tensor = _OPS.dequantize_per_tensor(integers, *grid)
    return result


def keep_one(owner: nn.Module, dtype: torch.dtype) -> None:
    """Give a network the integer 1, which :func:`write_gate` reads with a scale of 1 / 2."""
    owner.register_buffer("one", torch.ones((), dtype=dtype))


def _constant(x: Tensor, value: float, like: Constants) -> Tensor:
    """A number on a grid on which it is 1, of as many dimensions as ``x``."""
    ends = torch.iinfo(like[-1])
    number = torch.full([1] * x.dim(), value)
    return round_trip(number, (value, 0, ends.min, ends.max, like[-1]))

"""Sigmoid, SiLU and hardswish with quantized gates, as integer kernels compute them.

SiLU is ``x * sigmoid(x)``, hardswish ``x * clip(x / 6 + 1 / 2, 0, 1)``. Runtimes have fast integer
kernels for products, sums and tables of sigmoids, not for these as a whole, so that the gate
between 0 and 1 is rounded as well. Its range is known: nothing is calibrated or learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["GATES", "PRODUCTS", "gate_input", "gated", "is_in_place", "operator_of"]

GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardsigmoid,
}
"""By operator: its gate, from 0 to 1."""

PRODUCTS = frozenset(["silu", "hardswish"])
"""Operators that multiply their input by its gate; the others are the gate."""


def gated(op: str, x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """SiLU or hardswish with a gate that is rounded.

    Args:
        op: One of :data:`PRODUCTS`.
        x: Any shape.
        rounding: What is done to the gate.

    Returns:
        The product, of the shape of ``x``.
    """
    return x * rounding(GATES[op](x))


def gate_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The tensor among the arguments of an operator of :data:`GATES`."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x


def is_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes its result into its input, where later calls read it."""
    flags = (*args[1:], kwargs.get("inplace", False))
    return any(flag is True for flag in flags) or getattr(func, "__name__", "").endswith("_")


def operator_of(call: str) -> str:
    """The operator in a call's name."""
    return call.rpartition(":")[0].rpartition(":")[2]

"""A cache of computed layer weights with a limit in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeAlias

from torch import Tensor

__all__ = ["Rewritten", "WeightCache"]

Rewritten: TypeAlias = tuple[Tensor, Tensor | None]
"""A layer's new weight and its new bias; ``None`` where the bias stays."""


class WeightCache:
    """Weights and biases by key; where they take too many bytes, those longest unused go.

    Args:
        max_bytes: What they take at most, at least 0; the newest is kept in any case.

    Raises:
        ValueError: If ``max_bytes`` is negative.

    Examples:
        >>> import torch
        >>> cache = WeightCache(max_bytes=2**20)
        >>> cache.get("conv", lambda: (torch.ones(2), None))[0].tolist()
        [1.0, 1.0]
        >>> cache.get("conv", lambda: (torch.zeros(2), None))[0].tolist()
        [1.0, 1.0]
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes}, expected at least 0.")
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Hashable, Rewritten] = OrderedDict()
        self.num_bytes = 0

    def get(self, key: Hashable, make: Callable[[], Rewritten]) -> Rewritten:
        """What is kept under a key, made where there is none."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = make()
        self._kept[key] = made
        self.num_bytes += _num_bytes(made)
        while self.num_bytes > self._max_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= _num_bytes(dropped)
        return made

    def clear(self) -> None:
        """Forget all of them."""
        self._kept.clear()
        self.num_bytes = 0


def _num_bytes(made: Rewritten) -> int:
    return sum(tensor.nbytes for tensor in made if tensor is not None)

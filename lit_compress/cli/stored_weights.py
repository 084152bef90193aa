"""The weights of a checkpoint as a module to measure, where its own class is not known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["StoredWeights"]

# Buffers that a state dict cannot be told from parameters, but by their names.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class StoredWeights(nn.Module):
    """A state dict as a module to measure: layers by name, without a forward.

    Args:
        weights: Tensors by dotted name. Running statistics become buffers, all else parameters.
    """

    def __init__(self, weights: Mapping[str, Any]) -> None:
        super().__init__()
        for name, value in weights.items():
            if isinstance(value, Tensor):
                self._put(name, value)

    def _put(self, name: str, value: Tensor) -> None:
        *path, leaf = name.split(".")
        module: nn.Module = self
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if leaf in _STATISTICS or not value.is_floating_point():
            module.register_buffer(leaf, value)
        else:
            module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))

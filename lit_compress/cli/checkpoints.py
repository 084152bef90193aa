"""Checkpoints, read safely, and the modules that they are of."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress.compress.layers import plain_name

__all__ = ["StoredWeights", "load_into", "read_checkpoint"]

# Buffers that a state dict cannot be told from parameters, but by their names.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, without running anything that it holds.

    Args:
        path: A Lightning checkpoint, a state dict, or a mapping with one as ``state_dict``.

    Returns:
        The file's content; a bare state dict is put under ``state_dict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, not from torch, or holds no weights.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}; give the path of a checkpoint.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
        raise ValueError(
            f"{str(path)!r} cannot be read as a checkpoint ({reason}): it is truncated, was not "
            "written by torch.save, or holds pickled objects, which are never loaded. The file "
            "was left as it is; give another checkpoint."
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not any(isinstance(w, Tensor) for w in weights.values()):
        held = f"the keys {list(content)[:5]}" if isinstance(content, Mapping) else type(content)
        raise ValueError(
            f"{str(path)!r} holds no weights but {held}; expected a Lightning checkpoint or a "
            "state dict of tensors."
        )
    return dict(content) if "state_dict" in content else {"state_dict": dict(content)}


def load_into(network: nn.Module, weights: Mapping[str, Any], prefix: str, source: str) -> None:
    """Load weights into a network; nothing is changed if they do not fit.

    Args:
        network: The network, maybe a part of a LightningModule.
        weights: The network's weights, or those of the LightningModule around it.
        prefix: The network's name in the LightningModule, with a dot; ``""`` for the module itself.
        source: Where the weights came from, for the message.

    Raises:
        ValueError: If a weight is missing, unknown or of another shape; the first is named.
    """
    given = {plain_name(name): value for name, value in weights.items()}
    if prefix and any(name.startswith(prefix) for name in given):
        given = {n[len(prefix) :]: v for n, v in given.items() if n.startswith(prefix)}
    keys = {plain_name(key): key for key in network.state_dict()}
    own = {name: network.state_dict()[key] for name, key in keys.items()}
    misfit = next((f"{name!r} is missing" for name in own if name not in given), None)
    misfit = misfit or next((f"{name!r} is unknown" for name in given if name not in own), None)
    misfit = misfit or next(
        (
            f"{name!r} has shape {tuple(given[name].shape)}, expected {tuple(value.shape)}"
            for name, value in own.items()
            if isinstance(value, Tensor) and given[name].shape != value.shape
        ),
        None,
    )
    if misfit:
        raise ValueError(
            f"the weights in {source!r} do not fit {type(network).__name__}: {misfit}. Give the "
            "configuration of the run that wrote them, as --config FILE."
        )
    network.load_state_dict({keys[name]: value for name, value in given.items()})


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

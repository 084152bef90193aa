"""Weights in files: read without running anything, and loaded whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress.compress.layers import plain_name

__all__ = ["load_weights", "read_checkpoint", "read_weights"]

FilePath = str | os.PathLike[str]


def read_checkpoint(
    path: FilePath, load: Callable[[FilePath], Any] | None = None
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with ``weights_only=True``.

    Args:
        path: A Lightning checkpoint, a state dict, or a mapping with one as ``state_dict``.
        load: How to open the file, where it is not a local one.

    Returns:
        The file's content; a bare state dict is put under ``state_dict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, not from torch, or holds no weights.
    """
    name = os.fspath(path)
    try:
        content = (load or _load)(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no file {name!r}; give the path of a checkpoint or of a state dict."
        ) from error
    except Exception as error:  # torch answers broken files with errors of many types
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else "no reason given"
        raise ValueError(
            f"{name!r} cannot be read as a checkpoint or weights ({type(error).__name__}: "
            f"{reason}): it is truncated, was not written by torch.save, or holds pickled objects, "
            "which are never loaded. The file was left as it is; give another one, or save the "
            "weights alone with torch.save(module.state_dict(), path)."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{name!r} holds a {type(content).__name__}, expected a Lightning checkpoint or a "
            "state dict of tensors. Save one with torch.save(module.state_dict(), path)."
        )
    weights = content.get("state_dict", content)
    if not isinstance(weights, Mapping) or not any(isinstance(w, Tensor) for w in weights.values()):
        raise ValueError(
            f"{name!r} holds no weights but the keys {list(content)[:5]}, expected a Lightning "
            "checkpoint or a state dict of tensors. Save one with "
            "torch.save(module.state_dict(), path)."
        )
    return dict(content) if "state_dict" in content else {"state_dict": dict(content)}


def read_weights(path: FilePath, load: Callable[[FilePath], Any] | None = None) -> dict[str, Any]:
    """The state dict in a file; as :func:`read_checkpoint`, without what else the file holds."""
    return dict(read_checkpoint(path, load)["state_dict"])


def load_weights(
    network: nn.Module, weights: Mapping[str, Any], source: FilePath, mend: str
) -> None:
    """Load weights into a network, whatever prefix they carry.

    Args:
        network: The network that takes the weights; unchanged if they do not fit.
        weights: Tensors by name. Where they lie under a prefix, as in ``model.conv.weight``, it is
            stripped, and what lies outside of it is ignored.
        source: Where the weights came from, for the message.
        mend: What to do where they do not fit, for the message.

    Raises:
        ValueError: If a weight is missing, has another shape, or is unknown to the network; the
            first of them is named.
    """
    keys = {plain_name(key): key for key in network.state_dict()}
    own = {plain_name(key): value for key, value in network.state_dict().items()}
    given = {plain_name(name): value for name, value in weights.items()}
    prefix = _common_prefix(list(own), list(given))
    given = {name[len(prefix) :]: v for name, v in given.items() if name.startswith(prefix)}
    misfit = _first_misfit(own, given)
    if misfit is not None:
        under = f" under {prefix!r}" if prefix else ""
        raise ValueError(
            f"the weights in {os.fspath(source)!r}{under} do not fit {type(network).__name__}: "
            f"{misfit}. {mend}"
        )
    network.load_state_dict({keys[name]: value for name, value in given.items()})


def _load(path: FilePath) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _first_misfit(own: Mapping[str, Any], given: Mapping[str, Any]) -> str | None:
    for name, value in own.items():
        if name not in given:
            return f"{name!r} is missing"
        if isinstance(value, Tensor) and value.shape != given[name].shape:
            return f"{name!r} has shape {tuple(given[name].shape)}, expected {tuple(value.shape)}"
    return next((f"{name!r} is unknown to it" for name in given if name not in own), None)


def _common_prefix(own: list[str], given: list[str]) -> str:
    """The prefix under which most of the network's names are found, the shortest of equals."""
    known = set(given)
    prefixes = {""}
    for name in own:
        prefixes |= {g[: -len(name)] for g in given if g.endswith("." + name)}
        if len(prefixes) > 1:
            break
    return max(
        sorted(prefixes, key=len), key=lambda prefix: sum(prefix + name in known for name in own)
    )

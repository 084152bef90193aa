"""Read weights from files without running code, and load them whole or not at all."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress.compress.layers import plain_name
from lit_compress.compress.packing.checkpoint import unpacked_checkpoint
from lit_compress.compress.packing.packed_file import packed_content
from lit_compress.compress.quantization.formats.linear_kernels import torchao_weights_readable
from lit_compress.compress.quantization.stored import (
    belongs_to_quantizers,
    quantization_within,
    take_quantization,
)
from lit_compress.compress.structure import record_of, replay, values_after
from lit_compress.compress.structure_record import StructureRecord, Value

__all__ = [
    "load_checkpoint",
    "load_weights",
    "read_checkpoint",
    "read_weights",
    "structure_for",
    "take_structure",
]

FilePath = str | os.PathLike[str]


def read_checkpoint(
    path: FilePath, load: Callable[[FilePath], Any] | None = None
) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with ``weights_only=True``.

    Args:
        path: A Lightning checkpoint, a state dict, a mapping with one as ``state_dict``, or a
            packed file.
        load: How to open the file, where it is not a local one.

    Returns:
        The file's content; a bare state dict is put under ``state_dict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If it holds weights on kernels of torchao, and that is missing.
        ValueError: If the file is truncated, not from torch, or holds no weights.
    """
    name = os.fspath(path)
    try:
        content = _opened(path, load or _load)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no file {name!r}; give the path of a checkpoint or of a state dict."
        ) from error
    except ModuleNotFoundError:  # it says what to install
        raise
    except Exception as error:  # torch answers broken files with errors of many types
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else "no reason given"
        raise ValueError(
            f"{name!r} cannot be read as a checkpoint or weights ({type(error).__name__}: "
            f"{reason}): it is truncated, was not written by torch.save, or holds pickled objects, "
            "which are never loaded. The file was left as it is; give another one, or save the "
            "weights alone with torch.save(module.state_dict(), path)."
        ) from error
    packed = packed_content(content, name)
    if packed is not None:
        return unpacked_checkpoint(packed)
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
    network: nn.Module, weights: Mapping[str, Any], source: FilePath, fix: str
) -> None:
    """Load bare weights into a network; as :func:`load_checkpoint`."""
    load_checkpoint(network, {"state_dict": weights}, source, fix)


def load_checkpoint(
    network: nn.Module,
    checkpoint: Mapping[str, Any],
    source: FilePath,
    fix: str,
    strict: bool = True,
) -> None:
    """Load weights into a network, whatever prefix they carry and whatever cuts they saw.

    Args:
        network: The network that takes the weights; unchanged if they do not fit. It gets the
            structure that they need, see :func:`structure_for`.
        checkpoint: Tensors by name under ``state_dict``, and a structure record if they are of a
            network that was cut. Where the names have a prefix, as in ``model.conv.weight``, it is
            stripped, and what lies outside of it is ignored.
        source: Where the checkpoint came from, for the message.
        fix: What to do where it does not fit, for the message.
        strict: Whether each weight of the network must be there, and no other.

    Raises:
        ValueError: If the structure record does not fit the network, or a weight is missing, has
            another shape, or is unknown to the network; the first of them is named.
    """
    state = {k: v for k, v in network.state_dict().items() if not belongs_to_quantizers(k)}
    keys = {plain_name(key): key for key in state}
    given = {plain_name(name): value for name, value in checkpoint["state_dict"].items()}
    prefix = _common_prefix(list(keys), list(given))
    given = {name[len(prefix) :]: v for name, v in given.items() if name.startswith(prefix)}
    resized = values_after(network, structure_for(network, checkpoint, prefix), _of_record(source))
    expected = {name: resized.get(name, _shape(state[key])) for name, key in keys.items()}
    misfit = _first_misfit(expected, given, strict)
    if misfit is not None:
        under = f" under {prefix!r}" if prefix else ""
        raise ValueError(
            f"the weights in {os.fspath(source)!r}{under} do not fit {type(network).__name__}: "
            f"{misfit}. {fix}"
        )
    take_structure(network, checkpoint, source, prefix)
    keys = {plain_name(key): key for key in network.state_dict()}
    fitting = {keys[name]: value for name, value in given.items() if name in keys}
    network.load_state_dict(fitting, strict=strict)


def take_structure(
    module: nn.Module, checkpoint: Mapping[str, Any], source: FilePath, prefix: str = ""
) -> None:
    """Give a module the cuts and the quantizers of a checkpoint: the one way back, for all readers.

    The hook in ``Trainer.fit(ckpt_path=)``, ``load_compressed`` and the command line use it.

    Args:
        module: The module that is about to take the weights, dense or as another run left it.
        checkpoint: What :func:`read_checkpoint` gave.
        source: Where it came from, for the message.
        prefix: What the module's names begin with in the checkpoint.

    Raises:
        ValueError: If a record is none, or does not fit the module, which is then as it was.
    """
    record = structure_for(module, checkpoint, prefix)
    quantization_within(module, checkpoint, prefix, repr(os.fspath(source)))
    replay(module, record, _of_record(source))
    take_quantization(module, checkpoint, prefix, repr(os.fspath(source)))


def _of_record(source: FilePath) -> str:
    return f"the structure record in {os.fspath(source)!r}"


def structure_for(
    network: nn.Module, checkpoint: Mapping[str, Any], prefix: str = ""
) -> StructureRecord:
    """The structure that a network must have to take the weights of a checkpoint.

    It is what the checkpoint's own record says. Without one, the weights are of a network as it
    was built, or else as the present one is, if they fit it.

    Args:
        network: A network as it was built, or that was cut.
        checkpoint: Tensors by name under ``state_dict``, and perhaps a record.
        prefix: What the names of the network's weights begin with in the checkpoint.

    Raises:
        ValueError: If what lies in the place of the record is none.
    """
    stored = StructureRecord.in_checkpoint(checkpoint)
    if stored is not None:
        return stored.under(prefix)
    given = {plain_name(name): value for name, value in checkpoint["state_dict"].items()}
    present = record_of(network)
    fits = all(
        tuple(given[prefix + name].shape) == size
        for name, (_, size) in present.values().items()
        if isinstance(given.get(prefix + name), Tensor)
    )
    return present if fits else StructureRecord()


def _opened(path: FilePath, load: Callable[[FilePath], Any]) -> Any:
    try:
        return load(path)
    except pickle.UnpicklingError as error:
        if "torchao" not in str(error):
            raise
    with torchao_weights_readable():
        return load(path)


def _load(path: FilePath) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of a tensor; ``None`` for a lazy one and for extra state, which may be anything."""
    is_sized = isinstance(value, Tensor) and not nn.parameter.is_lazy(value)
    return tuple(value.shape) if is_sized else None


def _first_misfit(own: Mapping[str, Value], given: Mapping[str, Any], strict: bool) -> str | None:
    for name, shape in own.items():
        if name not in given:
            if strict:
                return f"{name!r} is missing"
        elif shape is not None and given[name].shape != shape:
            return f"{name!r} has shape {tuple(given[name].shape)}, expected {shape}"
    if not strict:
        return None
    unknown = (n for n in given if n not in own and not belongs_to_quantizers(n))
    return next((f"{name!r} is unknown to it" for name in unknown), None)


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

"""The teacher of a distillation: its weights from a file, its place, its answers."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_compress.callbacks._network_calls import NetworkCall, NetworkCalls
from lit_compress.compress.layers import plain_name

__all__ = ["Teacher", "TeacherFile", "copy_network", "load_weights", "read_weights"]

_COMPILED_METHODS = ("forward", "training_step", "validation_step", "test_step", "predict_step")


class Teacher:
    """A frozen network that answers what a student was asked.

    Args:
        network: The teacher; put into eval mode and frozen here.
        layers: Names of its layers whose features are wanted.

    Raises:
        ValueError: If a name is no layer of the teacher.
    """

    def __init__(self, network: nn.Module, layers: Iterable[str] = ()) -> None:
        self.network = network.eval().requires_grad_(False)
        self._calls = NetworkCalls(network, layers, requires_grad=False)
        self._calls.install()

    @torch.no_grad()
    def answer(self, call: NetworkCall) -> NetworkCall:
        """The teacher's own call with the inputs of the student's."""
        with self._calls.recording():
            self.network(*call.args, **call.kwargs)
        return self._calls.take()[-1]

    def remove(self) -> None:
        """Take the hooks off the teacher."""
        self._calls.remove()

    def refuse_shared_parameters(self, module: nn.Module) -> None:
        """Make sure that training ``module`` leaves the teacher alone.

        Raises:
            MisconfigurationException: If the two have a parameter or its memory in common.
        """
        storages = {p.untyped_storage().data_ptr(): name for name, p in module.named_parameters()}
        for name, parameter in self.network.named_parameters():
            shared = storages.get(parameter.untyped_storage().data_ptr())
            if shared is not None and parameter.numel():
                raise MisconfigurationException(
                    f"The teacher's {name!r} is the same memory as {shared!r} of the module that "
                    "trains, so they would change together and the teacher would be saved in the "
                    "checkpoints. Keep the teacher outside of the LightningModule, and copy shared "
                    "parts with copy.deepcopy."
                )


@dataclass(frozen=True)
class TeacherFile:
    """Where the weights of a snapshot lie: plain state dict, beside the checkpoints.

    Attributes:
        sha256: Digest of the names, types, shapes and contents of the weights.
        directory: The first directory the file was written to, absolute or a URL.
    """

    sha256: str
    directory: str

    @property
    def name(self) -> str:
        """The file's name."""
        return f"distillation-teacher-{self.sha256[:12]}.pt"

    def write(self, weights: Mapping[str, Any], directory: str) -> None:
        """Write the weights into a directory, all of the file or nothing."""
        TorchCheckpointIO().save_checkpoint(dict(weights), os.path.join(directory, self.name))

    def read(self, beside: str | Path | None) -> dict[str, Any]:
        """Read the weights from beside a checkpoint, or else from where they were written.

        Args:
            beside: The checkpoint that is being resumed.

        Raises:
            FileNotFoundError: If the file is in neither place.
            ValueError: If the file is damaged.
        """
        places = [] if beside is None else [os.path.dirname(os.fspath(beside))]
        paths = [os.path.join(place, self.name) for place in [*places, self.directory]]
        for path in paths:
            try:
                weights = read_weights(path)
            except FileNotFoundError:
                continue
            if digest(weights) != self.sha256:
                raise ValueError(
                    f"The teacher's weights in {path} are not those that the checkpoint was "
                    f"trained with (expected digest {self.sha256[:12]}, got "
                    f"{digest(weights)[:12]}). Restore the file from where the checkpoint was "
                    "written."
                )
            return weights
        raise FileNotFoundError(
            f"The checkpoint was trained with a snapshot as its teacher, and {self.name} is "
            f"neither at {' nor at '.join(dict.fromkeys(paths))}. Copy it beside the checkpoint, "
            "or give the teacher by checkpoint=."
        )


def copy_network(network: nn.Module) -> nn.Module:
    """A deep copy that runs uncompiled and remembers nothing of the original."""
    if isinstance(network, torch._dynamo.OptimizedModule):
        network = network._orig_mod
    memo: dict[int, Any] = {}
    context = network._compiler_ctx if isinstance(network, LightningModule) else None
    if isinstance(network, LightningModule) and context is not None:
        memo[id(context)] = None
    copied = copy.deepcopy(network, memo)
    if context is not None:
        # A LightningModule is compiled by putting compiled bound methods on the instance; in a
        # copy these would still run the original.
        for name in _COMPILED_METHODS:
            vars(copied).pop(name, None)
    return copied


def digest(weights: Mapping[str, Any]) -> str:
    """SHA-256 of a state dict's names, types, shapes and contents."""
    sha = hashlib.sha256()
    for name, value in weights.items():
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            sha.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
            sha.update(data.flatten().view(torch.uint8).numpy().data)
        else:
            sha.update(f"{name} {value!r}\n".encode())
    return sha.hexdigest()


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a state dict from a file, safely.

    Args:
        path: A Lightning checkpoint, a state dict, or a mapping that holds one as ``state_dict``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, holds no weights, or holds pickled objects.
    """
    if not os.path.exists(path) and "://" not in os.fspath(path):
        raise FileNotFoundError(
            f"There is no file {os.fspath(path)!r} to take the teacher's weights from. Give the "
            "path of a checkpoint or a state dict."
        )
    try:
        content = TorchCheckpointIO().load_checkpoint(
            path, map_location=lambda storage, location: storage, weights_only=True
        )
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever torch makes of a broken file
        raise ValueError(
            f"{os.fspath(path)!r} cannot be read as weights: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no reason given'}. It may be "
            "truncated, no PyTorch file, or hold pickled objects, which are not loaded for "
            "safety's sake; save the weights alone with torch.save(module.state_dict(), path)."
        ) from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        held = (
            f"a mapping with the keys {list(content)[:5]}"
            if isinstance(content, Mapping)
            else f"a {type(content).__name__}"
        )
        raise ValueError(
            f"{os.fspath(path)!r} holds {held}, expected a Lightning checkpoint or a state dict "
            "of tensors. Save one with torch.save(module.state_dict(), path)."
        )
    return dict(content)


def load_weights(network: nn.Module, weights: Mapping[str, Any], source: str | Path) -> None:
    """Load weights into a network, whatever prefix they carry in the file.

    Args:
        network: The network that takes the weights; unchanged if they do not fit.
        weights: The file's weights. Where they lie under a prefix, as in ``model.conv.weight``,
            it is stripped and what lies outside of it is ignored.
        source: Named in errors.

    Raises:
        ValueError: If a weight is missing, has another shape, or is unknown to the network; the
            first of them is named.
    """
    keys = {plain_name(key): key for key in network.state_dict()}
    own = {plain_name(key): value for key, value in network.state_dict().items()}
    given = {plain_name(name): value for name, value in weights.items()}
    prefix = _common_prefix(list(own), list(given))
    given = {name[len(prefix) :]: v for name, v in given.items() if name.startswith(prefix)}
    of = f"the weights in {os.fspath(source)!r}" + (f" under {prefix!r}" if prefix else "")
    mend = (
        "Give a file of the same architecture, or the teacher itself with teacher= when it has "
        "another architecture than the student."
    )
    for name, value in own.items():
        if name not in given:
            raise ValueError(
                f"{of} do not fit {type(network).__name__}: {name!r} is missing. {mend}"
            )
        if isinstance(value, Tensor) and value.shape != given[name].shape:
            raise ValueError(
                f"{of} do not fit {type(network).__name__}: {name!r} has shape "
                f"{tuple(given[name].shape)}, expected {tuple(value.shape)}. {mend}"
            )
    unknown = [name for name in given if name not in own]
    if unknown:
        raise ValueError(
            f"{of} do not fit {type(network).__name__}: {unknown[0]!r} is unknown to it. {mend}"
        )
    network.load_state_dict({keys[name]: value for name, value in given.items()})


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

"""The teacher of a distillation: a frozen network, and the file that holds its weights."""

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
from torch.utils._pytree import tree_leaves

from lit_compress.callbacks.lightning.network_calls import NetworkCall, NetworkCalls
from lit_compress.compress.structure import record_of
from lit_compress.compress.structure_record import STRUCTURE_KEY
from lit_compress.compress.weight_files import read_checkpoint

__all__ = ["Teacher", "TeacherFile", "copy_network", "copy_uncompiled", "digest", "read_remote"]

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

    def check_shared_parameters(self, module: nn.Module) -> None:
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
    """Where the weights of a snapshot lie, beside the checkpoints.

    It is a plain state dict, or has one beside the structure record of a network that was cut.

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

    def write(self, network: nn.Module, directory: str) -> None:
        """Write a network's weights into a directory, all of the file or nothing."""
        content: dict[str, Any] = dict(network.state_dict())
        record = record_of(network)
        if record:
            content = {"state_dict": content, STRUCTURE_KEY: record.to_plain()}
        TorchCheckpointIO().save_checkpoint(content, os.path.join(directory, self.name))

    def read(self, beside: str | Path | None) -> dict[str, Any]:
        """Read the file from beside a checkpoint, or else from where it was written.

        Args:
            beside: The checkpoint that is being resumed.

        Returns:
            The weights under ``state_dict``, and the structure record if there is one.

        Raises:
            FileNotFoundError: If the file is in neither place.
            ValueError: If the file is damaged.
        """
        places = [] if beside is None else [os.path.dirname(os.fspath(beside))]
        paths = [os.path.join(place, self.name) for place in [*places, self.directory]]
        for path in paths:
            try:
                content = read_checkpoint(path, read_remote)
            except FileNotFoundError:
                continue
            found = digest(content["state_dict"])
            if found != self.sha256:
                raise ValueError(
                    f"The teacher's weights in {path} are not those that the checkpoint was "
                    f"trained with (expected digest {self.sha256[:12]}, got {found[:12]}). "
                    "Restore the file from where the checkpoint was written."
                )
            return content
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
    for module in network.modules():
        for value in tree_leaves(vars(module)):
            if isinstance(value, Tensor) and not value.is_leaf:  # torch refuses to copy these
                memo[id(value)] = value.detach()
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


def copy_uncompiled(network: nn.Module) -> nn.Module:
    """A deep copy no part of which is compiled, so that all of its layers have plain names."""
    copied = copy_network(network)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch._dynamo.OptimizedModule):
                setattr(module, name, child._orig_mod)
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


def read_remote(path: str | os.PathLike[str]) -> Any:
    """Open a checkpoint as Lightning does, so that a URL will do."""
    place: Any = "cpu"  # not a function, which tensors of torchao do not take
    return TorchCheckpointIO().load_checkpoint(
        os.fspath(path), map_location=place, weights_only=True
    )

"""load_compressed: a LightningModule from the checkpoint of a compressed run."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lit_compress.callbacks.distillation.teacher import read_remote
from lit_compress.callbacks.lightning.structure_in_checkpoints import carry_structure
from lit_compress.compress.quantization.formats.linear_kernels import torchao_weights_readable
from lit_compress.compress.quantization.stored import holds_torchao_weights
from lit_compress.compress.weight_files import load_checkpoint, read_checkpoint, take_structure

__all__ = ["load_compressed"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_OTHER_MODEL = "Build it with the arguments that it had in the run that wrote the checkpoint."
_HOOK = "on_load_checkpoint"
_patching = threading.RLock()


def load_compressed(
    checkpoint_path: str | os.PathLike[str],
    module: type[ModuleT] | ModuleT,
    *,
    map_location: Any = None,
    strict: bool | None = None,
    **init_args: Any,
) -> ModuleT:
    """Load a checkpoint, as slim as its model was, into a module that is built dense.

    Checkpoints of models that were never cut are loaded all the same, and a module that was cut
    before goes back to what the checkpoint needs. Nothing is unpickled but tensors and plain data.
    A LightningModule that comes back carries its structure: checkpoints that any Trainer writes of
    it load in the same way.

    Args:
        checkpoint_path: A checkpoint that Lightning wrote, as a path or URL; for a plain network
            also a state dict.
        module: A LightningModule class, built with the hyper-parameters in the checkpoint as
            ``load_from_checkpoint`` does; or a LightningModule, built already; or the network
            inside of one, whose part of the checkpoint is found by its names.
        map_location: Where the weights of a class go, as in ``load_from_checkpoint``. What is
            built already stays where it is.
        strict: Whether the checkpoint must hold exactly the module's weights; by default, what
            the module's ``strict_loading`` says, and true for a plain network.
        **init_args: Arguments of the class in place of those in the checkpoint.

    Returns:
        The module that was given or built, slim, in training mode if it was so.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated or no checkpoint, ``module`` is none of the above,
            ``init_args`` are given for what is built already, or the structure record or the
            weights do not fit. The first mismatch is named; of a record's, before anything changed.
        RuntimeError: If the weights do not fit a class, as ``load_from_checkpoint`` has it.

    Example::

        slim = load_compressed("last.ckpt", MyLightningModule)
    """
    content = read_checkpoint(checkpoint_path, read_remote)
    if isinstance(module, type) and issubclass(module, LightningModule):
        _check_has_hyper_parameters(content, checkpoint_path, module)
        with _replaying_first(_classes(module, content), checkpoint_path), ExitStack() as readable:
            if holds_torchao_weights(content):
                readable.enter_context(torchao_weights_readable())
                map_location = map_location or "cpu"  # such tensors take no function
            loaded = module.load_from_checkpoint(
                os.fspath(checkpoint_path),
                map_location,
                strict=strict,
                weights_only=True,
                **init_args,
            )
        carry_structure(loaded)
        return loaded
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"module is {module!r}, expected a LightningModule class, or a LightningModule or "
            "torch.nn.Module that is built already."
        )
    if init_args:
        raise ValueError(
            f"{', '.join(init_args)} given for a {type(module).__name__} that is built already; "
            "give the class, or build the module with them."
        )
    if not isinstance(module, LightningModule):
        load_checkpoint(module, content, checkpoint_path, _OTHER_MODEL, strict is not False)
        return module
    if is_overridden("configure_model", module):
        module.configure_model()
    take_structure(module, content, checkpoint_path)
    carry_structure(module)
    module.on_load_checkpoint(content)
    strict = module.strict_loading if strict is None else strict
    load_checkpoint(module, content, checkpoint_path, _OTHER_MODEL, strict)
    return module


# --- Classes --------------------------------------------------------------------------------------


@contextmanager
def _replaying_first(
    classes: Iterable[type[LightningModule]], source: str | os.PathLike[str]
) -> Iterator[None]:
    """Have modules of some classes take the structure of a checkpoint before its weights.

    Nothing but its own hook comes between a module's construction and the loading of its weights.
    A subclass with the hook would do where ``load_from_checkpoint`` builds that, but not for what
    ``LightningCLI`` wrote, where it builds the class that the checkpoint names.
    """
    with _patching, ExitStack() as undo:
        for patched in classes:
            original = getattr(patched, _HOOK)

            def replay_first(
                self: LightningModule,
                checkpoint: dict[str, Any],
                original: Callable[..., None] = original,
            ) -> None:
                take_structure(self, checkpoint, source)
                original(self, checkpoint)

            if _HOOK in vars(patched):
                undo.callback(setattr, patched, _HOOK, original)
            else:
                undo.callback(delattr, patched, _HOOK)
            setattr(patched, _HOOK, replay_first)
        yield


def _classes(
    given: type[LightningModule], content: Mapping[str, Any]
) -> list[type[LightningModule]]:
    """The class that was given, and the one that ``LightningCLI`` noted where it is another."""
    hyper_parameters = content.get(given.CHECKPOINT_HYPER_PARAMS_KEY) or {}
    module, _, name = str(hyper_parameters.get("_class_path", "")).rpartition(".")
    noted = getattr(sys.modules.get(module), name, None)
    if isinstance(noted, type) and issubclass(noted, given) and noted is not given:
        return [given, noted]
    return [given]


def _check_has_hyper_parameters(
    content: Mapping[str, Any], path: str | os.PathLike[str], module: type[LightningModule]
) -> None:
    if "pytorch-lightning_version" not in content:
        raise ValueError(
            f"{os.fspath(path)!r} holds weights but is no Lightning checkpoint, so it does not say "
            f"how to build a {module.__name__}. Build one and give load_compressed that."
        )

"""Save a module's cuts and quantizers in every checkpoint, and restore them from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper
from lit_compress.callbacks.lightning.weight_averages import averaged_modules
from lit_compress.compress.quantization.stored import (
    QUANTIZATION_KEY,
    quantization_records,
)
from lit_compress.compress.structure import record_of
from lit_compress.compress.structure_record import STRUCTURE_KEY
from lit_compress.compress.weight_files import take_structure

__all__ = ["CarriedStructure", "carry_structure"]


class CarriedStructure:
    """Stands around the checkpoint hooks of a LightningModule until :meth:`remove`.

    The module is asked for every checkpoint, also where Lightning saves weights only and asks no
    callback, and it is asked before Lightning loads its weights, whereas callbacks come after.
    So this is where a checkpoint gets its record and the module the structure of its checkpoint.

    Args:
        pl_module: The module.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._pl_module = pl_module
        self._wrappers = [
            MethodWrapper(pl_module, "on_save_checkpoint", self._save),
            MethodWrapper(pl_module, "on_load_checkpoint", self._load),
        ]

    def remove(self) -> None:
        """Give the module its own hooks back; checkpoints then hold no record any more."""
        for wrapper in self._wrappers:
            wrapper.remove()

    def _save(self, save: Callable[..., None], checkpoint: dict[str, Any]) -> None:
        save(checkpoint)
        record = record_of(self._pl_module)
        if record:
            checkpoint[STRUCTURE_KEY] = record.to_plain()
        quantized = quantization_records(self._pl_module)
        if quantized:
            checkpoint[QUANTIZATION_KEY] = quantized

    def _load(self, load: Callable[..., None], checkpoint: dict[str, Any]) -> None:
        trainer = self._pl_module._trainer
        averages = [] if trainer is None else averaged_modules(trainer)
        path = None if trainer is None else trainer.ckpt_path
        for module in (self._pl_module, *averages):
            take_structure(module, checkpoint, path or "a checkpoint")
        load(checkpoint)


def carry_structure(pl_module: LightningModule) -> CarriedStructure:
    """Have every checkpoint of a module hold its structure, and come back in it.

    To be called in a callback's ``setup``, at every stage. From then on a checkpoint that any
    Trainer writes of a module that was cut holds, under :data:`STRUCTURE_KEY`, what
    :meth:`StructureRecord.to_plain` says; where one is loaded by ``ckpt_path``, the module and the
    averages that callbacks keep of it first get the structure of that time, also a denser one, and
    the quantizers of that time.

    It is not to be removed when a run ends: ``Trainer.save_checkpoint`` may come later, and
    weights without their structure are lost. As long as the module is dense it does nothing.

    Args:
        pl_module: The module; calling again for the same one changes nothing.

    Returns:
        What stands around the module's hooks. Once it is there, loading raises ``ValueError`` if
        the checkpoint's record does not fit the module, which is then as it was.
    """
    method = vars(pl_module).get("on_save_checkpoint")
    while isinstance(method, MethodWrapper):
        owner = getattr(method._around, "__self__", None)
        if isinstance(owner, CarriedStructure):
            return owner
        method = method._method
    return CarriedStructure(pl_module)

"""Run the user's validation at the end of a fit, where ``Trainer.validate`` cannot be called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lit_compress.callbacks.lightning.resident_validation import ResidentValidation, ValidationBatch

__all__ = ["validation_in_fit"]


def validation_in_fit(
    trainer: pl.Trainer, pl_module: pl.LightningModule, network: nn.Module
) -> Callable[[], dict[str, float]] | None:
    """The validation of a network as it is when the result is called.

    Batches are loaded again each time. In several processes each one validates its share; metrics
    of torchmetrics are of all shares, and for other values the mean over processes is taken.

    Args:
        trainer: A Trainer in ``on_fit_end``, with or without epochs before it.
        pl_module: The module, on the Trainer's device.
        network: The network inside of it, or the module itself.

    Returns:
        What gives the metrics of the epoch by the names that they have in
        ``trainer.callback_metrics``; ``None`` where there is no validation.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if not is_overridden("validation_step", pl_module) or not loop._data_source.is_defined():
        return None
    loop.setup_data()
    if loop._combined_loader is None or loop.skip:
        return None
    batches = _LoadedBatches(trainer, loop._combined_loader, loop.max_batches)
    several = loop.num_dataloaders > 1 and loop._is_sequential
    validate = ResidentValidation(pl_module, network, batches, trainer, several)

    def metrics() -> dict[str, float]:
        values = validate(network)
        if trainer.world_size == 1:
            return values
        device = trainer.strategy.root_device
        reduce = trainer.strategy.reduce
        return {
            name: float(reduce(torch.tensor(values[name], device=device), reduce_op="mean"))
            for name in sorted(values)
        }

    return metrics


class _LoadedBatches(Iterable[ValidationBatch]):
    """The batches of a validation loop, on their device, loaded by each iteration again."""

    def __init__(
        self, trainer: pl.Trainer, loader: CombinedLoader, limits: list[int | float]
    ) -> None:
        self._trainer = trainer
        self._loader = loader
        self._limits = limits

    def __iter__(self) -> Iterator[ValidationBatch]:
        module = self._trainer.lightning_module
        # An iterator of its own: that of the loop may be in the middle.
        combined = CombinedLoader(self._loader.iterables, self._loader._mode)
        combined.limits = self._limits
        for batch, index, loader in combined:
            batch = self._trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=loader)
            batch = self._trainer.strategy.batch_to_device(batch, dataloader_idx=loader)
            yield ValidationBatch(batch, index, loader)

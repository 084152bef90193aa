"""Rebuild the model of a checkpoint, and its data, from the run's configuration."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import instantiate_module
from torch import nn

from lit_compress.callbacks.lightning.network_calls import NetworkCalls, find_network
from lit_compress.cli.training import NAMED_CALLBACKS, CompressionCLI
from lit_compress.compress.weight_files import read_checkpoint
from lit_compress.measure import ExampleInputs
from lit_compress.measure.inputs import with_batch_size

__all__ = ["Subject", "find_subject", "quiet"]

_OF_THE_TRAINER = ("accelerator", "strategy", "devices", "logger", "callbacks", "plugins")


@dataclass
class Subject:
    """A LightningModule to measure, its weights still to be loaded.

    Attributes:
        module: The LightningModule, freshly built.
        data: Its data module, if a configuration names one.
        input_shape: Shape of one example, if the user gave it.
    """

    module: LightningModule
    data: LightningDataModule | None = None
    input_shape: tuple[int, ...] | None = None

    @property
    def network(self) -> nn.Module:
        """The network inside the module, or else the module itself."""
        return find_network(self.module, None)

    def example_inputs(self) -> ExampleInputs | None:
        """One example: of the shape given, of the data, or the module's own; or ``None``."""
        if self.input_shape is not None:
            return torch.randn(1, *self.input_shape, generator=torch.Generator().manual_seed(0))
        seen = self.real_inputs(1)
        if seen:
            return with_batch_size(seen[0], 1)
        example: ExampleInputs | None = self.module.example_input_array
        return example

    def validate(self) -> Mapping[str, float]:
        """What validation logs over all of the data."""
        return self._validate(limit_val_batches=1.0)

    def real_inputs(self, num_batches: int) -> list[ExampleInputs]:
        """What the first validation batches call the network with; empty where there is no data."""
        if self.data is None:
            return []
        calls = NetworkCalls(self.network, requires_grad=False)
        calls.install()
        try:
            with calls.recording():
                self._validate(limit_val_batches=num_batches)
            taken = calls.take()
        finally:
            calls.remove()
        return [call.kwargs or call.args for call in taken if not (call.args and call.kwargs)]

    def _validate(self, limit_val_batches: int | float) -> Mapping[str, float]:
        with quiet():
            trainer = Trainer(
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=limit_val_batches,
            )
            (metrics,) = trainer.validate(self.module, self.data, verbose=False)
        return metrics


class _ModelOnlyCLI(CompressionCLI):
    """Builds what a run's configuration says, except for the run."""

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        config = self.config[self.subcommand]
        for name in NAMED_CALLBACKS:
            config[name] = None
        for name in _OF_THE_TRAINER:
            config.trainer[name] = self._parser(self.subcommand).get_default(f"trainer.{name}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A Trainer that leaves no trace."""
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Do not train."""


def find_subject(
    checkpoint: str | None, configs: Sequence[str], input_shape: tuple[int, ...] | None
) -> Subject | None:
    """Build the model that a checkpoint is of.

    Args:
        checkpoint: Path of the checkpoint; without one, configurations alone say what to build.
        configs: Configurations of the run. Without one, the ``config.yaml`` that ``fit`` wrote is
            looked for (beside the checkpoint, or beside its folder ``checkpoints``), then the class
            that the checkpoint itself names.
        input_shape: Shape of one example, if the user gave it.

    Returns:
        The model and its data; ``None`` if nothing says what they are.

    Raises:
        FileNotFoundError: If the checkpoint is missing.
        ValueError: If it cannot be read.
    """
    content = {} if checkpoint is None else read_checkpoint(checkpoint)
    files = list(configs) or ([] if checkpoint is None else _beside(checkpoint))
    if files:
        arguments = [f"--config={file}" for file in files]
        with quiet():
            cli = _ModelOnlyCLI(["fit", *arguments, "--ckpt_path=null"])
        return Subject(cli.model, cli.datamodule, input_shape)
    parameters = dict(content.get("hyper_parameters") or {})
    if parameters.pop("_instantiator", None) is None or "_class_path" not in parameters:
        return None
    return Subject(instantiate_module(LightningModule, parameters), None, input_shape)


def _beside(checkpoint: str) -> list[str]:
    folder = Path(checkpoint).resolve().parent
    file = (folder.parent if folder.name == "checkpoints" else folder) / "config.yaml"
    return [str(file)] if file.is_file() else []


@contextmanager
def quiet() -> Iterator[None]:
    """Run without the Trainer's words on accelerators, seeds and how it could be faster."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

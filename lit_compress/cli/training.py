"""``lit-compress fit|validate|test|predict``: LightningCLI with the callbacks by name."""

from __future__ import annotations

import contextlib
import importlib
import os
from pathlib import Path
from typing import Any

import torch.distributed
from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lit_compress.callbacks.compression_summary import CompressionSummary
from lit_compress.callbacks.distillation.distillation import Distillation
from lit_compress.callbacks.lightning.structure_in_checkpoints import carry_structure
from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.callbacks.pruning.channel_pruning import ChannelPruning
from lit_compress.callbacks.quantization.post_training_quantization import PostTrainingQuantization
from lit_compress.callbacks.quantization.quantization_aware_training import (
    QuantizationAwareTraining,
)
from lit_compress.callbacks.search.ratio_search import RatioSearch
from lit_compress.callbacks.weight_clustering import WeightClustering
from lit_compress.cli.commands import COMMANDS
from lit_compress.cli.parsing import CommandParser
from lit_compress.compress.weight_files import read_checkpoint

__all__ = ["NAMED_CALLBACKS", "CompressionCLI"]

# In the order in which they stand in the Trainer: what watches the network, and what finds numbers
# for others, comes before what changes its weights, then what removes weights, sets them to zero,
# makes them equal and rounds them. The user's own callbacks come between them and the summary.
NAMED_CALLBACKS: dict[str, type[Callback]] = {
    "distillation": Distillation,
    "search": RatioSearch,
    "pruning": ChannelPruning,
    "sparsity": MagnitudeSparsity,
    "clustering": WeightClustering,
    "quantization": QuantizationAwareTraining,
    "ptq": PostTrainingQuantization,
    "summary": CompressionSummary,
}


class CompressionCLI(LightningCLI):
    """LightningCLI with the callbacks of :data:`NAMED_CALLBACKS` and ``--assets``.

    A named callback takes part when any of its keys is given, on the command line or in a YAML
    file; later files and arguments change single keys, and ``null`` takes it out again.
    ``trainer.callbacks`` works as ever.

    Args:
        args: A command (``fit``, ``validate``, ``test`` or ``predict``) and its arguments.
    """

    def __init__(self, args: list[str]) -> None:
        # Without subclasses, a callback's keys stand under its name, not under init_args.
        set_parsing_settings(subclasses_disabled=list(NAMED_CALLBACKS.values()))
        # Known by their short names where the example tasks' packages are installed.
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("lit_compress.tasks")
        commands = {
            name: {"usage": _usage(name), "description": COMMANDS[name]}
            for name in self.subcommands()
        }
        super().__init__(
            parser_class=CommandParser,
            parser_kwargs={"prog": "lit-compress", **commands},
            save_config_kwargs={"overwrite": True},  # a run may be repeated
            seed_everything_default=0,
            args=args,
        )
        # A process that exits with a live group may abort, when gloo's threads outlive it.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Put our own arguments before the Trainer's many."""
        super().add_default_arguments_to_parser(parser)
        parser.add_argument(
            "--assets",
            type=str | None,
            default=None,
            help="Folder with data/ and weights/; sets LIT_COMPRESS_ASSETS for this run.",
        )
        for name, callback in NAMED_CALLBACKS.items():
            parser.add_argument(
                f"--{name}",
                type=callback | None,
                default=None,
                help=f"{callback.__name__}, one key at a time: --{name}.KEY=VALUE",
            )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; ``main`` hands over the process's arguments, which LightningCLI warns of."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and Path(path).is_file():
            read_checkpoint(path)
        super()._parse_ckpt_path()

    def before_instantiate_classes(self) -> None:
        """Set the folder of assets before anything looks for it."""
        assets = self._get(self.config, "assets")
        if assets is not None:
            os.environ["LIT_COMPRESS_ASSETS"] = str(assets)

    def after_instantiate_classes(self) -> None:
        """Have the model take the cuts and quantizers of whatever checkpoint it is given."""
        carry_structure(self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put the named callbacks around those of ``trainer.callbacks``."""
        given = self._get(self.config_init, "trainer").get("callbacks") or []
        users = list(given) if isinstance(given, list | tuple) else [given]
        named = {name: self._get(self.config_init, name) for name in NAMED_CALLBACKS}
        last = named.pop("summary")
        callbacks = [*named.values(), *users, last]
        return super().instantiate_trainer(
            callbacks=[callback for callback in callbacks if callback is not None], **kwargs
        )


def _usage(command: str) -> str:
    return f"lit-compress {command} [--config FILE]... [--KEY=VALUE]..."

"""Log tables, images and artifacts to any Lightning logger, in more detail to W&B.

``wandb`` is imported by Lightning when its logger is made; nothing here imports it without one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

__all__ = ["log_artifact", "log_images", "log_metrics", "log_table", "log_text"]


def log_metrics(trainer: pl.Trainer, metrics: Mapping[str, float]) -> None:
    """Send numbers to every logger, at the step that Lightning's own logging uses."""
    if not trainer.loggers or not metrics:
        return
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)


def log_table(
    trainer: pl.Trainer, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """A table, to the loggers that have tables (W&B) or text (TensorBoard)."""
    for logger in _writing_loggers(trainer):
        if isinstance(logger, WandbLogger):
            logger.log_table(key, columns=list(columns), data=[list(row) for row in rows])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, _markdown_table(columns, rows))


def log_text(trainer: pl.Trainer, key: str, markdown: str) -> None:
    """A Markdown text, to TensorBoard (W&B gets tables and artifacts instead)."""
    for logger in _writing_loggers(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, markdown)


def log_images(trainer: pl.Trainer, key: str, files: Sequence[Path]) -> None:
    """PNG files, to W&B."""
    for logger in _writing_loggers(trainer):
        if isinstance(logger, WandbLogger) and files:
            logger.log_image(key, images=[str(file) for file in files])


def log_artifact(
    trainer: pl.Trainer, name: str, kind: str, files: Sequence[Path], metadata: dict[str, Any]
) -> None:
    """Files as one versioned artifact, to W&B."""
    for logger in _writing_loggers(trainer):
        if isinstance(logger, WandbLogger) and files:
            import wandb

            artifact = wandb.Artifact(name=name, type=kind, metadata=metadata)
            for file in files:
                artifact.add_file(str(file))
            logger.experiment.log_artifact(artifact)


def _writing_loggers(trainer: pl.Trainer) -> list[Logger]:
    return list(trainer.loggers) if trainer.is_global_zero else []


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)

"""What a run must meet for our callbacks to work; refusals that several of them share."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

__all__ = ["refuse_nan_loss", "refuse_sharded_strategy"]


def refuse_sharded_strategy(trainer: pl.Trainer, callback: str) -> None:
    """Refuse strategies under which no process holds a whole parameter.

    Raises:
        MisconfigurationException: If the strategy is FSDP, DeepSpeed or model-parallel.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"{callback} needs whole parameters in every process, but "
            f"{type(trainer.strategy).__name__} shards them; use strategy='ddp' or a single device."
        )


def refuse_nan_loss(loss: Tensor, trainer: pl.Trainer, name: str = "loss") -> None:
    """Stop a run whose loss is NaN before it reaches weights or checkpoints.

    Raises:
        ValueError: If ``loss`` holds NaN.
    """
    if torch.isnan(loss).any():
        raise ValueError(
            f"the {name} is NaN at step {trainer.global_step}; training was stopped before the "
            "weights changed, and the last checkpoint is intact. Look for a learning rate that is "
            "too high or for NaN in the batch, then resume from that checkpoint."
        )

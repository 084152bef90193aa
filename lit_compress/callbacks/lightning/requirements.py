"""Checks that several callbacks share: strategy, launcher, compilation, NaN loss, checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor

from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper
from lit_compress.callbacks.lightning.network_calls import is_compiled

__all__ = [
    "check_nan_loss",
    "check_not_compiled",
    "check_strategy",
    "explain_unreadable_checkpoints",
]


def check_strategy(trainer: pl.Trainer, callback: str, changes_structure: bool) -> None:
    """Check that processes hold whole parameters and keep the structure that they train.

    Args:
        trainer: A Trainer in ``setup``.
        callback: The callback's name, for messages.
        changes_structure: Whether the module is built otherwise afterwards, which a main process
            that loads the weights of its workers does not know.

    Raises:
        MisconfigurationException: If the strategy is FSDP, DeepSpeed or model-parallel; or spawns
            or forks its processes where the structure changes.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise MisconfigurationException(
            f"{callback} needs whole parameters in every process, but "
            f"{type(trainer.strategy).__name__} shards them; use strategy='ddp' or a single device."
        )
    if changes_structure and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            f"{callback} changes the structure of the model, and with a strategy that spawns its "
            "processes the main one would load the weights into the model as it was; use "
            "strategy='ddp'."
        )


def check_not_compiled(pl_module: pl.LightningModule, callback: str) -> None:
    """Check that ``torch.compile`` has not fixed what a module computes.

    Raises:
        MisconfigurationException: If the module or a part of it is compiled.
    """
    if is_compiled(pl_module):
        raise MisconfigurationException(
            f"{callback} changes what {type(pl_module).__name__} computes, and torch.compile has "
            "fixed that. Train the module uncompiled; what it becomes can be exported or compiled "
            "afterwards."
        )


def check_nan_loss(loss: Tensor, trainer: pl.Trainer, name: str = "loss") -> None:
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


def explain_unreadable_checkpoints(trainer: pl.Trainer) -> MethodWrapper:
    """Have the Trainer say what is wrong with a checkpoint that it cannot resume from.

    Torch answers a truncated file with ``[Errno 22] Invalid argument`` or the like.

    Returns:
        The wrapper around ``trainer.strategy.load_checkpoint``; remove it when the fit begins.
        Once it is in place, ``load_checkpoint`` raises ``ValueError`` if the file cannot be read
        or holds no Lightning checkpoint; the file is only ever read.
    """
    return MethodWrapper(trainer.strategy, "load_checkpoint", _load_or_explain)


def _load_or_explain(load: Callable[..., Any], checkpoint_path: Any, *args: Any, **kw: Any) -> Any:
    try:
        checkpoint = load(checkpoint_path, *args, **kw)
    except FileNotFoundError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{checkpoint_path} cannot be read as a checkpoint ({error}). It is truncated, or no "
            "file that torch.save wrote; it was left as it is. Resume from another checkpoint of "
            "the run."
        ) from error
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, Mapping) else checkpoint
        raise ValueError(
            f"{checkpoint_path} is no Lightning checkpoint: expected a mapping with 'state_dict', "
            f"'epoch', 'global_step' and so on, found {str(found)[:200]}. To start from plain "
            "weights, load them into the module instead of giving ckpt_path."
        )
    return checkpoint

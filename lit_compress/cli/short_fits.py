"""Short fits of a trained model, for commands that try out changes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lit_compress.cli.inspection import fill
from lit_compress.cli.subject import Subject, find_subject, quiet

__all__ = ["filled_subject", "traceless_trainer", "tune"]


def filled_subject(
    options: Namespace, purpose: str, input_shape: tuple[int, ...] | None = None
) -> Subject:
    """The model of a command's ``checkpoint``, ``config`` and ``assets``, with its weights.

    Args:
        options: The command's options.
        purpose: What the command does with it, for the message.
        input_shape: Shape of one example, if the user gave it.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If nothing says what the model is, or its file is damaged or does not fit.
    """
    if options.assets is not None:
        os.environ["LIT_COMPRESS_ASSETS"] = options.assets
    subject = find_subject(options.checkpoint, options.config or (), input_shape)
    if subject is None:
        raise ValueError(
            f"nothing says which model to {purpose}; give the configuration of its run as "
            "--config FILE."
        )
    if options.checkpoint is not None:
        fill(subject.network, options.checkpoint)
    return subject


def traceless_trainer(accelerator: str, **arguments: Any) -> Trainer:
    """A Trainer that leaves no trace.

    Args:
        accelerator: As for the Trainer.
        **arguments: What else the Trainer takes.
    """
    silent: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with quiet():
        return Trainer(accelerator=accelerator, **{**silent, **arguments})


def tune(
    module: LightningModule,
    subject: Subject,
    accelerator: str,
    num_steps: int,
    callbacks: Sequence[Callback] = (),
) -> Trainer:
    """Train as the module says, with the same seed each time and no validation.

    Args:
        module: The module, which need not be the subject's.
        subject: Whose data are trained on.
        accelerator: As for the Trainer.
        num_steps: Optimizer steps.
        callbacks: What else happens.

    Returns:
        The Trainer when it is done.
    """
    trainer = traceless_trainer(
        accelerator,
        max_steps=num_steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
    )
    with isolate_rng(), quiet():
        torch.manual_seed(0)
        trainer.fit(module, subject.data)
    return trainer

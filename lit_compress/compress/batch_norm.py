"""Compute the running statistics of batch norms again, after weights were changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lit_compress.compress.calibration import Forward, evaluation_mode

__all__ = ["recalibrate_batch_norm"]


def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Any], forward: Forward) -> int:
    """Compute the running statistics of all batch norm layers again.

    Each becomes the plain average over the batches, so a few tens of batches are enough. Only the
    batch norm layers are in training mode meanwhile; parameters, modes and momentum stay as they
    were, and so does everything if a batch fails.

    Source: Li et al. 2020, "EagleEye", section 3.3 (adaptive batch normalisation).

    Args:
        model: The model; ``running_mean`` and ``running_var`` are changed in place.
        batches: Calibration batches from training data, at least one.
        forward: Runs the model on one batch.

    Returns:
        The number of layers whose statistics were computed; 0 if there is none to compute, and
        then no batch is run.

    Raises:
        ValueError: If ``batches`` is empty.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None
    ]
    if not layers:
        return 0
    before = [
        ({k: v.clone() for k, v in layer.named_buffers()}, layer.momentum) for layer in layers
    ]
    num_batches = 0
    finished = False
    try:
        with evaluation_mode(model), torch.no_grad():
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # the cumulative average
                layer.train()
            for batch in batches:
                forward(model, batch)
                num_batches += 1
        if num_batches == 0:
            raise ValueError(
                "batches is empty, so batch norm statistics cannot be computed; give at least one "
                "calibration batch."
            )
        finished = True
    finally:
        for layer, (buffers, momentum) in zip(layers, before, strict=True):
            layer.momentum = momentum
            if not finished:
                for name, buffer in layer.named_buffers():
                    buffer.copy_(buffers[name])
    return len(layers)

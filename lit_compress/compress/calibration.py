"""Evaluation mode for calibration, after which every module has its own mode again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

__all__ = ["Forward", "evaluation_mode"]

Forward: TypeAlias = Callable[[nn.Module, Any], Any]
"""Runs a model on one batch, as in ``lambda model, batch: model(batch[0])``."""


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Models are in evaluation mode inside; afterwards every module has the mode it had.

    Args:
        *models: The models; one may come twice.
    """
    training = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in training:
            module.training = mode

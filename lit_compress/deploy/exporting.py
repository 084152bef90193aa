"""torch.export as all routes use it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from lit_compress.deploy.route import Tensors

__all__ = ["exported_program", "takes_any_batch"]


def exported_program(
    module: nn.Module, inputs: Tensors, *, dynamic_batch: bool = False
) -> ExportedProgram:
    """The graph of a module that maps tensors to tensors.

    Args:
        module: Takes the inputs as separate arguments.
        inputs: One batch.
        dynamic_batch: Leave the first dimension free in every tensor where it is as long as that
            of the first tensor, as far as the module itself does not fix it.
    """
    shapes: Any = None
    if dynamic_batch:
        batch = inputs[0].shape[0] if inputs[0].dim() else None
        shapes = (
            tuple(
                {0: Dim.AUTO} if t.dim() and t.shape[0] == batch else None for t in inputs
            ),
        )  # fmt: skip
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)


def takes_any_batch(program: ExportedProgram) -> bool:
    """Whether the first dimension of the first input was left free."""
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            shape = node.meta["val"].shape
            return bool(len(shape)) and isinstance(shape[0], torch.SymInt)
    return False

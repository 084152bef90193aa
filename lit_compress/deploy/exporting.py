"""torch.export as all routes use it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from lit_compress.deploy.route import Tensors

__all__ = ["exported_program", "program_for_any_batch", "share_integers"]


def exported_program(module: nn.Module, inputs: Tensors) -> ExportedProgram:
    """The graph of a module, for inputs of these shapes.

    Args:
        module: Takes the inputs as separate arguments.
        inputs: One batch.
    """
    return _export(module, inputs, None)


def program_for_any_batch(module: nn.Module, inputs: Tensors) -> ExportedProgram:
    """The graph of a module for batches of any size, or of this one where the module fixes it.

    Args:
        module: Takes the inputs as separate arguments.
        inputs: One batch. The batch is the first dimension of the first tensor, and of all that
            are as long there.
    """
    if inputs[0].dim() == 0:
        return exported_program(module, inputs)
    batch = inputs[0].shape[0]
    in_batch = [tensor.dim() > 0 and tensor.shape[0] == batch for tensor in inputs]
    # torch.export takes a batch of one for a constant.
    several = inputs if batch > 1 else tuple(
        torch.cat([t, t]) if batched else t for t, batched in zip(inputs, in_batch, strict=True)
    )  # fmt: skip
    shapes = (tuple({0: Dim.AUTO} if batched else None for batched in in_batch),)
    try:
        program = _export(module, several, shapes)
    except Exception:  # whatever it is: it comes again where it is not the batch
        return exported_program(module, inputs)
    return program if _takes_any_batch(program) else exported_program(module, inputs)


def share_integers(program: ExportedProgram) -> None:
    """Let what quantizes real numbers that come from integers of its grid take these, in place."""
    graph = program.graph_module.graph
    ops = torch.ops.quantized_decomposed
    back = ops.dequantize_per_tensor.default
    for node in graph.find_nodes(op="call_function", target=ops.quantize_per_tensor.default):
        before = node.args[0]
        if before.target is back and before.args[1:] == node.args[1:] and not before.kwargs:
            node.replace_all_uses_with(before.args[0])
            graph.erase_node(node)
    program.graph_module.recompile()


def _export(module: nn.Module, inputs: Tensors, dynamic_shapes: Any) -> ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)


def _takes_any_batch(program: ExportedProgram) -> bool:
    """Whether the first dimension of the first input was left free."""
    first = program.graph_signature.user_inputs[0]
    node = next(n for n in program.graph.nodes if n.name == first)
    return not is_concrete_int(node.meta["val"].shape[0])

"""torch.export as all routes use it: batches of any size where the network allows that."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.overrides import TorchFunctionMode

from lit_compress.deploy.places import Place, place_of_error, place_of_frame
from lit_compress.deploy.route import Tensors

__all__ = [
    "exported_program",
    "program_for_any_batch",
    "quiet_exporter",
    "share_integers",
    "where_batch_is_fixed",
]


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
    if inputs[0].dim() == 0 or getattr(module, "fixed_batch", False):
        return exported_program(module, inputs)
    try:
        program = _export(module, *_with_free_batch(inputs))
    except Exception:  # whatever it is: it comes again where it is not the batch
        return exported_program(module, inputs)
    return program if _takes_any_batch(program) else exported_program(module, inputs)


def where_batch_is_fixed(module: nn.Module, inputs: Tensors, network: nn.Module) -> Place | None:
    """The line of a network at which torch.export can no longer leave the batch size free.

    Args:
        module: Takes the inputs as separate arguments.
        inputs: One batch.
        network: The part of ``module`` whose lines are meant.

    Returns:
        ``None`` where torch.export leaves it free or does not say where.
    """
    if inputs[0].dim() == 0:
        return None
    watch = _FirstFixed(network)
    try:
        with watch:
            _export(module, *_with_free_batch(inputs))
    except Exception as error:  # whatever it is: where it was raised is what matters
        return watch.place or place_of_error(error, network)
    return watch.place


class _FirstFixed(TorchFunctionMode):
    """Notes at which call a length that was free became a number."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._network = network
        self.place: Place | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.place is None:
            mode = detect_fake_mode()
            shapes = None if mode is None else mode.shape_env
            if shapes is not None and shapes.replacements:
                self.place = place_of_frame(sys._getframe(1), self._network)
        return result


def _with_free_batch(inputs: Tensors) -> tuple[Tensors, Any]:
    """Inputs, and which of their dimensions are free, as torch.export wants them."""
    batch = inputs[0].shape[0]
    in_batch = [tensor.dim() > 0 and tensor.shape[0] == batch for tensor in inputs]
    # torch.export takes a batch of one for a constant.
    several = inputs if batch > 1 else tuple(
        torch.cat([t, t]) if batched else t for t, batched in zip(inputs, in_batch, strict=True)
    )  # fmt: skip
    return several, (tuple({0: Dim.AUTO} if batched else None for batched in in_batch),)


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


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the converter's progress report from the terminal."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)

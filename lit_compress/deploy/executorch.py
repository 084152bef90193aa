"""ExecuTorch programs on XNNPACK; the only file that needs ``executorch``."""

from __future__ import annotations

import operator
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lit_compress.compress.quantization.integers import Spelling
from lit_compress.deploy.exporting import exported_program
from lit_compress.deploy.flat_call import FlatCall
from lit_compress.deploy.route import Route, Runner, Tensors, needs_extra

__all__ = ["ExecutorchRoute"]

_LINEAR = torch.ops.aten.linear.default


class ExecutorchRoute(Route):
    """Delegated to XNNPACK, whatever it takes; other operators run on portable kernels.

    The batch size is fixed: memory is planned when the file is written.
    """

    suffix = ".pte"
    extra = "executorch"
    spelling = Spelling(signed_activations=True)

    def export(self, call: FlatCall, inputs: Tensors, path: Path, *, integers: bool) -> None:
        """See `Route.export`."""
        with needs_extra(self.extra, "ExecuTorch programs"):
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )
            from executorch.exir import to_edge_transform_and_lower
        program = exported_program(call, inputs)
        if integers:
            quantize_free_products(program)
            separate_dequantization(program)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            path.write_bytes(lowered.to_executorch().buffer)

    def recognizes(self, head: bytes) -> bool:
        """See `Route.recognizes`; the format's name stands behind four bytes."""
        return head[4:6] == b"ET"

    def load(self, path: Path, num_threads: int) -> Runner:
        """See `Route.load`."""
        return _ExecutorchRunner(path, num_threads)


class _ExecutorchRunner(Runner):
    def __init__(self, path: Path, num_threads: int) -> None:
        with needs_extra("executorch", "ExecuTorch programs"):
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime, Verification
        # One pool for the whole process: the program loaded last decides.
        portable_lib._unsafe_reset_threadpool(num_threads)
        self._program: Any = Runtime.get().load_program(
            path.read_bytes(), verification=Verification.InternalConsistency
        )
        self._method: Any = self._program.load_method("forward")
        if self._method is None:
            raise ValueError("it has no method 'forward'")
        about = self._method.metadata
        self.input_shapes = tuple(
            tuple(about.input_tensor_meta(i).sizes()) for i in range(about.num_inputs())
        )

    def __call__(self, inputs: Tensors) -> Tensors:
        # Results lie in memory that the next call writes to.
        return tuple(output.clone() for output in self._method.execute(inputs))

    def close(self) -> None:
        self._method = self._program = None


def separate_dequantization(program: ExportedProgram) -> None:
    """Give every operator dequantization nodes of its own, in place.

    XNNPACK's partitioner takes dequantization, operator and quantization together; a node that two
    operators share ties their partitions into a cycle.
    """
    graph = program.graph_module.graph
    target = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    for node in list(graph.find_nodes(op="call_function", target=target)):
        for user in list(node.users)[1:]:
            with graph.inserting_before(user):
                user.replace_input_with(node, graph.node_copy(node))
    program.graph_module.recompile()


def quantize_free_products(program: ExportedProgram) -> None:
    """Let linear layers with float results find the range of their input anew, in place.

    With an input on a fixed grid XNNPACK wants the result on one as well. With a range a row it
    multiplies integers all the same and gives float results, such as logits.
    """
    graph = program.graph_module.graph
    ops = torch.ops.quantized_decomposed
    weights = ops.dequantize_per_channel.default
    for node in list(graph.find_nodes(op="call_function", target=_LINEAR)):
        x, weight = node.args[0], node.args[1]
        quantized = isinstance(weight, fx.Node) and weight.target is weights
        if not quantized or _is_requantized(node):
            continue
        with graph.inserting_before(node):
            found = _call(graph, ops.choose_qparams_per_token_asymmetric.default, x, torch.int8)
            scale = _call(graph, operator.getitem, found, 0)
            zero = _call(graph, operator.getitem, found, 1)
            grid = (scale, zero, -128, 127, torch.int8)
            integers = _call(graph, ops.quantize_per_token.default, x, *grid)
            again = _call(graph, ops.dequantize_per_token.default, integers, *grid, torch.float32)
        node.replace_input_with(x, again)
    program.graph_module.recompile()


def _is_requantized(node: fx.Node) -> bool:
    """Whether a result goes on a grid, at most through a ReLU."""
    users = list(node.users)
    clips = (torch.ops.aten.relu.default, torch.ops.aten.hardtanh.default)
    if len(users) == 1 and users[0].target in clips:
        users = list(users[0].users)
    target = torch.ops.quantized_decomposed.quantize_per_tensor.default
    return len(users) == 1 and users[0].target is target


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A new node that knows the shape of its result."""
    node = graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda arg: arg.meta["val"])
    mode = next(v.fake_mode for v in torch.utils._pytree.tree_leaves(values)
                if isinstance(v, torch._subclasses.FakeTensor))  # fmt: skip
    with mode:
        node.meta["val"] = target(*values)
    return node

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

_OPS = torch.ops.quantized_decomposed
_WEIGHTS = _OPS.dequantize_per_channel.default
_LINEAR = torch.ops.aten.linear.default
_CONV2D = torch.ops.aten.conv2d.default
_CLIPS = (torch.ops.aten.relu.default, torch.ops.aten.hardtanh.default)
_IN_2D = {
    torch.ops.aten.conv1d.default: _CONV2D,
    torch.ops.aten.conv1d.padding: torch.ops.aten.conv2d.padding,
    torch.ops.aten.conv_transpose1d.default: torch.ops.aten.conv_transpose2d.input,
}
_CONVOLUTIONS = (
    _CONV2D,
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv3d.default,
    torch.ops.aten.conv_transpose1d.default,
    torch.ops.aten.conv_transpose2d.input,
    torch.ops.aten.conv_transpose3d.input,
    torch.ops.aten.convolution.default,
    torch.ops.aten.conv2d.padding,
    torch.ops.aten.conv1d.padding,
    torch.ops.aten.conv3d.padding,
)


class ExecutorchRoute(Route):
    """Delegated to XNNPACK, whatever it takes; other operators run on portable kernels.

    The batch size is fixed: memory is planned when the file is written.
    """

    suffix = ".pte"
    extra = "executorch"
    spelling = Spelling(signed_activations=True, gates="sigmoids")

    def export(self, call: FlatCall, inputs: Tensors, path: Path, *, integers: bool) -> None:
        """See `Route.export`."""
        program = exported_program(call, inputs)
        lowered = self._lowered(program, integers)
        left = weights_left_over(lowered.exported_program()) if integers else set()
        if left:  # XNNPACK has no integer kernel for these layers, and takes them in floating point
            program = exported_program(call, inputs)
            store_as_floats(program, left)
            lowered = self._lowered(program, integers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path.write_bytes(lowered.to_executorch().buffer)

    def _lowered(self, program: ExportedProgram, integers: bool) -> Any:
        """ExecuTorch's edge program, in which XNNPACK has taken what it can."""
        with needs_extra("executorch", "ExecuTorch programs"):
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
                XnnpackPartitioner,
            )
            from executorch.exir import to_edge_transform_and_lower
        if integers:
            quantize_before_concatenation(program)
            put_sequences_in_2d(program)
            quantize_free_products(program)
            separate_dequantization(program)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])

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
    """Let layers with float results find the range of their input again, in place.

    With an input on a fixed grid XNNPACK wants the result on one as well. With a range of the
    moment it multiplies integers all the same and gives float results, such as logits. It does so
    in linear layers (a range a row) and in 2-d convolutions that are neither depthwise nor
    transposed (a range an image); the weights of other convolutions become floats.
    """
    graph, floats = program.graph_module.graph, set()
    for node in list(graph.nodes):
        if node.target not in (_LINEAR, *_CONVOLUTIONS):
            continue
        x, weight = node.args[0], node.args[1]
        quantized = isinstance(weight, fx.Node) and weight.target is _WEIGHTS
        if not quantized or _is_requantized(node):
            continue
        if node.target is _LINEAR:
            with graph.inserting_before(node):
                again = _with_range_of_rows(graph, x)
            node.replace_input_with(x, again)
        elif _is_plain_convolution(node):
            with graph.inserting_before(node):
                again = _with_range_of_all(graph, x)
            node.replace_input_with(x, again)
        else:
            floats.add(_stored_name(program, weight))
    program.graph_module.recompile()
    store_as_floats(program, floats)


def put_sequences_in_2d(program: ExportedProgram) -> None:
    """Write 1-d convolutions of integer weights as 2-d ones, in place.

    XNNPACK would do so itself, but fails with two in a row, and takes every input that was
    dequantized for one that it is to quantize.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target not in _IN_2D:
            continue
        x, weight = node.args[0], node.args[1]
        quantized = isinstance(weight, fx.Node) and weight.target is _WEIGHTS
        if not quantized:
            continue
        name, place = _stored_name(program, weight), weight.args[0]
        value = _stored(program, place).unsqueeze(-1)
        _store(program, name, value)
        for changed in (place, weight):
            changed.meta["val"] = changed.meta["val"].unsqueeze(-1)
        _, _, bias, stride, padding, *rest = _all_arguments(node)
        padding = padding if isinstance(padding, str) else [*padding, 0]
        if node.target is torch.ops.aten.conv_transpose1d.default:
            more, groups, dilation = rest
            arguments = [bias, [*stride, 1], padding, [*more, 0], groups, [*dilation, 1]]
        else:
            dilation, groups = rest
            arguments = [bias, [*stride, 1], padding, [*dilation, 1], groups]
        with graph.inserting_before(node):
            wide = _in_2d_already(x)
            if wide is None:
                wide = _call(graph, torch.ops.aten.unsqueeze.default, x, -1)
                if x.target is _OPS.dequantize_per_tensor.default:
                    wide = _rounded(graph, wide, x.args[1:])
            product = _call(graph, _IN_2D[node.target], wide, weight, *arguments)
        product.meta = {**node.meta, "val": product.meta["val"]}
        _squeeze(graph, node, product)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _in_2d_already(x: fx.Node) -> fx.Node | None:
    """Where ``x`` is the rounded result of a convolution that was put in 2-d: that one's."""
    chain: list[Any] = [x]
    for target in (_OPS.dequantize_per_tensor.default, _OPS.quantize_per_tensor.default,
                   torch.ops.aten.squeeze.dim):  # fmt: skip
        if chain[-1].target is not target:
            return None
        chain.append(chain[-1].args[0])
    wide: fx.Node = chain[-1]
    same = wide.target is x.target and wide.args[1:] == x.args[1:]
    return wide if same else None


def _squeeze(graph: fx.Graph, node: fx.Node, product: fx.Node) -> None:
    """Put a 2-d product in the place of a 1-d one; what rounds that one rounds this one as well."""
    if not _is_requantized(node):
        with graph.inserting_before(node):
            result = _call(graph, torch.ops.aten.squeeze.dim, product, -1)
        node.replace_all_uses_with(result)
        return
    (user,) = node.users
    end = node
    if user.target in _CLIPS:
        end, (user,) = user, user.users
        with graph.inserting_before(end):
            product = _call(graph, end.target, product, *end.args[1:])
    with graph.inserting_before(end):
        rounded = _rounded(graph, product, user.args[1:])
        result = _call(graph, torch.ops.aten.squeeze.dim, rounded, -1)
    end.replace_all_uses_with(result)


def _rounded(graph: fx.Graph, x: Any, grid: tuple[Any, ...]) -> fx.Node:
    integers = _call(graph, _OPS.quantize_per_tensor.default, x, *grid)
    return _call(graph, _OPS.dequantize_per_tensor.default, integers, *grid)


def quantize_before_concatenation(program: ExportedProgram) -> None:
    """Put what is concatenated on the grid of the result, in place; the result stays the same.

    XNNPACK moves integers only where both ends have one grid, and does not load a program in which
    they have not.
    """
    graph = program.graph_module.graph
    rounding = _OPS.quantize_per_tensor.default
    for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)):
        users = list(node.users)
        if len(users) != 1 or users[0].target is not rounding:
            continue
        grid = users[0].args[1:]
        with graph.inserting_before(node):
            parts = [_rounded(graph, part, grid) for part in node.args[0]]
        node.args = (parts, *node.args[1:])
    program.graph_module.recompile()


def weights_left_over(program: ExportedProgram) -> set[str]:
    """Names of integer weights whose dequantization was left to ExecuTorch, which has no kernel.

    Args:
        program: Lowered, in ExecuTorch's edge dialect.
    """
    names = ("quantized_decomposed::dequantize_per_channel",
             "quantized_decomposed.dequantize_per_channel.default")  # fmt: skip
    left = [
        node
        for node in program.graph_module.graph.nodes
        if node.op == "call_function"
        and (str(node.target) in names or getattr(node.target, "_name", "").startswith(names[0]))
    ]
    return {_stored_name(program, node) for node in left}


def store_as_floats(program: ExportedProgram, names: set[str]) -> None:
    """Replace integer weights by the real numbers for which they stand, in place.

    Args:
        program: A program in which these weights are dequantized.
        names: Buffers that hold integer weights; they are float32 afterwards.
    """
    graph = program.graph_module.graph
    for node in list(graph.find_nodes(op="call_function", target=_WEIGHTS)):
        name = _stored_name(program, node)
        if name not in names:
            continue
        place = node.args[0]
        integers, scale, zero = (_stored(program, arg) for arg in node.args[:3])
        value = _WEIGHTS(integers, scale, zero, *node.args[3:])
        _store(program, name, value)
        place.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(place)
        graph.erase_node(node)
    program.graph_module.recompile()


def _stored_name(program: ExportedProgram, dequantization: fx.Node) -> str:
    """The buffer whose integers are dequantized."""
    place = dequantization.args[0]
    assert isinstance(place, fx.Node)
    name: str = program.graph_signature.inputs_to_buffers[place.name]
    return name


def _stored(program: ExportedProgram, place: Any) -> torch.Tensor:
    name = program.graph_signature.inputs_to_buffers[place.name]
    value = program.state_dict[name] if name in program.state_dict else program.constants[name]
    assert isinstance(value, torch.Tensor)
    return value


def _store(program: ExportedProgram, name: str, value: torch.Tensor) -> None:
    (program.state_dict if name in program.state_dict else program.constants)[name] = value


def _all_arguments(node: fx.Node) -> list[Any]:
    """Positional arguments of a call, defaults included."""
    given = dict(enumerate(node.args))
    places = node.target._schema.arguments  # type: ignore[union-attr]
    return [
        given.get(i, node.kwargs.get(place.name, getattr(place, "default_value", None)))
        for i, place in enumerate(places)
    ]


def _is_plain_convolution(node: fx.Node) -> bool:
    """2-d, not transposed, not depthwise: what XNNPACK computes with a range of the moment."""
    if node.target not in (_CONV2D, torch.ops.aten.conv2d.padding):
        return False
    weight, groups = node.args[1], _all_arguments(node)[6]
    assert isinstance(weight, fx.Node)
    return not (groups != 1 and weight.meta["val"].shape[1] == 1)


def _with_range_of_rows(graph: fx.Graph, x: Any) -> fx.Node:
    found = _call(graph, _OPS.choose_qparams_per_token_asymmetric.default, x, torch.int8)
    scale = _call(graph, operator.getitem, found, 0)
    zero = _call(graph, operator.getitem, found, 1)
    grid = (scale, zero, -128, 127, torch.int8)
    integers = _call(graph, _OPS.quantize_per_token.default, x, *grid)
    return _call(graph, _OPS.dequantize_per_token.default, integers, *grid, torch.float32)


def _with_range_of_all(graph: fx.Graph, x: Any) -> fx.Node:
    ends, eps = (-128, 127), torch.finfo(torch.float32).eps
    found = _call(graph, _OPS.choose_qparams.tensor, x, *ends, eps, torch.int8)
    scale = _call(graph, operator.getitem, found, 0)
    zero = _call(graph, operator.getitem, found, 1)
    grid = (scale, zero, *ends, torch.int8)
    integers = _call(graph, _OPS.quantize_per_tensor.tensor, x, *grid)
    return _call(graph, _OPS.dequantize_per_tensor.tensor, integers, *grid)


def _is_requantized(node: fx.Node) -> bool:
    """Whether a result goes on a grid, at most through a ReLU."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _CLIPS:
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

"""OpenVINO IR on the CPU; the only file that needs ``openvino``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from lit_compress.compress.quantization.integers import Spelling
from lit_compress.deploy.exporting import program_for_any_batch, quiet_exporter
from lit_compress.deploy.flat_call import FlatCall
from lit_compress.deploy.route import Route, Runner, Tensors, needs_extra

__all__ = ["OpenvinoRoute", "run_kernels"]

_OPS = torch.ops.quantized_decomposed


class OpenvinoRoute(Route):
    """Converted from torch's own graph, without ONNX between; run by OpenVINO's CPU plugin.

    A file is two: the graph (``.xml``) and the weights beside it (``.bin``). Any batch size where
    the network allows it. Weights stand in the graph as numbers on their grid: OpenVINO turns the
    quantization around them into int8 constants when it writes the file, and fuses it into integer
    kernels when it loads it. From int8 weights with a dequantization, its converter makes
    convolutions that give int8, and fails.

    On x86 without VNNI, pairs of products are summed in 16 bits. OpenVINO has no other integer
    kernel there, so that layers whose weights could saturate compute in floating point.
    """

    suffix = ".xml"
    companions = (".bin",)
    any_batch = True
    extra = "openvino"
    spelling = Spelling(weights_in_graph=True, saturating_weights="float", gates="sigmoids")

    def export(self, call: FlatCall, inputs: Tensors, path: Path, *, integers: bool) -> None:
        """See `Route.export`."""
        with needs_extra(self.extra, "OpenVINO files"):
            import openvino
        program = program_for_any_batch(call, inputs)
        if integers:
            widen_weight_grids(program)
        with quiet_exporter(), torch.no_grad():
            model = openvino.convert_model(program)
        shapes = _input_shapes(program)
        for place, name in zip(model.inputs, call.input_names, strict=True):
            place.get_tensor().set_names({name})
        # The converter forgets the lengths of all dimensions where one is free.
        model.reshape(dict(zip(call.input_names, shapes, strict=True)))
        openvino.save_model(model, str(path), compress_to_fp16=False)

    def recognizes(self, head: bytes) -> bool:
        """See `Route.recognizes`; a model is an XML document whose root is a ``net``."""
        return head.lstrip().startswith(b"<?xml") and b"<net" in head

    def load(self, path: Path, num_threads: int) -> Runner:
        """See `Route.load`.

        Raises:
            ValueError: If the file of the weights is missing.
        """
        weights = path.with_suffix(".bin")
        if not weights.is_file():
            raise ValueError(f"its weights, {weights.name}, are not beside it")
        return _OpenvinoRunner(path, num_threads)


class _OpenvinoRunner(Runner):
    def __init__(self, path: Path, num_threads: int) -> None:
        with needs_extra("openvino", "OpenVINO files"):
            import openvino
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": num_threads,
            # Otherwise the processor decides: bfloat16 where it has it, and activations of linear
            # layers with int8 weights rounded to int8.
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        self._compiled: Any = openvino.Core().compile_model(str(path), "CPU", settings)
        self._request: Any = self._compiled.create_infer_request()
        self._num_outputs = len(self._compiled.outputs)
        self.input_shapes = tuple(
            tuple(None if length.is_dynamic else length.get_length() for length in shape)
            for shape in (place.get_partial_shape() for place in self._compiled.inputs)
        )

    def __call__(self, inputs: Tensors) -> Tensors:
        results = self._request.infer([x.numpy() for x in inputs], share_inputs=True)
        return tuple(torch.from_numpy(results[i]) for i in range(self._num_outputs))

    def close(self) -> None:
        self._request = self._compiled = None


def widen_weight_grids(program: ExportedProgram) -> None:
    """Write weights of fewer than 8 bits as 8-bit integers, in place; their values stay.

    With fewer levels OpenVINO stores fewer bits, and then computes in floating point.
    """
    graph = program.graph_module.graph
    ends = (torch.iinfo(torch.int8).min + 1, torch.iinfo(torch.int8).max)
    for target in (_OPS.quantize_per_channel.default, _OPS.dequantize_per_channel.default):
        for node in graph.find_nodes(op="call_function", target=target):
            *given, _, _, dtype = node.args
            node.args = (*given, *ends, dtype)
    program.graph_module.recompile()


def _input_shapes(program: ExportedProgram) -> list[list[int]]:
    """Of each input; -1 for a dimension that may have any length."""
    nodes = {node.name: node for node in program.graph.nodes}
    values = [nodes[name].meta["val"] for name in program.graph_signature.user_inputs]
    return [[int(n) if is_concrete_int(n) else -1 for n in value.shape] for value in values]


def run_kernels(path: Path | str) -> list[tuple[str, str]]:
    """What OpenVINO makes of a file on this processor: kind and number format of each operator.

    Args:
        path: The ``.xml`` file.

    Returns:
        Pairs such as ``("Convolution", "u8")``: a kernel that takes integers.

    Raises:
        MissingExtra: If ``openvino`` is not installed.
    """
    runner = _OpenvinoRunner(Path(path), 1)
    found = []
    for operator in runner._compiled.get_runtime_model().get_ops():
        info = operator.get_rt_info()
        kind, precision = (
            str(getattr(info[key], "value", info[key])) for key in ("layerType", "runtimePrecision")
        )
        found.append((kind, precision))
    runner.close()
    return sorted(found)

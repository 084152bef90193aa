"""ONNX files and ONNX Runtime; the only file that needs ``onnx`` and ``onnxruntime``."""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from lit_compress.compress.quantization.integers import Spelling
from lit_compress.deploy.exporting import program_for_any_batch, share_integers
from lit_compress.deploy.flat_call import FlatCall
from lit_compress.deploy.onnx_pools import pool_with_integers
from lit_compress.deploy.onnx_stem import put_stem_on_blocks
from lit_compress.deploy.route import Route, Runner, Tensors, needs_extra

__all__ = ["OnnxRoute", "fused_operators"]


class OnnxRoute(Route):
    """Float networks as they are, quantized ones with quantize and dequantize operators.

    ONNX Runtime fuses those around a layer into one integer kernel where activations are uint8
    and biases int32; with int8 activations it is up to four times slower on x86.
    """

    suffix = ".onnx"
    any_batch = True
    extra = "onnx"
    spelling = Spelling(integer_bias=True, saturating_weights="uint8", gates="sums")

    def export(self, call: FlatCall, inputs: Tensors, path: Path, *, integers: bool) -> None:
        """See `Route.export`."""
        with needs_extra(self.extra, "ONNX files"):
            import onnx
            import onnxscript  # noqa: F401
        program = program_for_any_batch(call, inputs)
        if integers:
            share_integers(program)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program,
                inputs,
                dynamo=True,
                input_names=list(call.input_names),
                external_data=False,
                verbose=False,
            )
        assert exported is not None
        model = exported.model_proto
        if integers:
            pool_with_integers(model.graph)
        _drop_provenance(model.graph)
        if integers:
            put_stem_on_blocks(model.graph)
        onnx.save(model, str(path))

    def recognizes(self, head: bytes) -> bool:
        """See `Route.recognizes`; a model begins with the tag of its ``ir_version``."""
        return head[:1] == b"\x08"

    def load(self, path: Path, num_threads: int) -> Runner:
        """See `Route.load`."""
        return _OrtRunner(path, num_threads)


class _OrtRunner(Runner):
    def __init__(self, path: Path, num_threads: int, optimized: Path | None = None) -> None:
        with needs_extra("onnx", "ONNX files"):
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        self._loaded: Any = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        given = self._loaded.get_inputs()
        self._names = [place.name for place in given]
        self.input_shapes = tuple(
            tuple(length if isinstance(length, int) else None for length in place.shape)
            for place in given
        )

    def __call__(self, inputs: Tensors) -> Tensors:
        given = {name: x.numpy() for name, x in zip(self._names, inputs, strict=True)}
        return tuple(torch.from_numpy(value) for value in self._loaded.run(None, given))

    def close(self) -> None:
        self._loaded = None


def _drop_provenance(graph: Any) -> None:
    """Where each operator came from in Python: of a small network more than half of the file."""
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def fused_operators(path: Path | str) -> dict[str, int]:
    """What ONNX Runtime makes of a file: the number of operators of each kind that it runs.

    Integer kernels are called ``QLinearConv``, ``QGemm``, ``QLinearAdd`` and so on; a ``Conv``
    between ``DequantizeLinear`` and ``QuantizeLinear`` is one that was not fused.

    Args:
        path: An ONNX file.

    Raises:
        MissingExtra: If ``onnx`` or ``onnxruntime`` is not installed.
    """
    with needs_extra("onnx", "ONNX files"):
        import onnx
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        _OrtRunner(Path(path), 1, optimized).close()
        graph = onnx.load(str(optimized)).graph
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))

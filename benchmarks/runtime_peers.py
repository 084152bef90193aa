"""The peers of the runtime benchmark: the same float file quantized by others, and run.

Both start from the float ONNX file that this library writes, see the same calibration images, and
are used as their manuals say: ONNX Runtime's static quantization after its own pre-processing, with
the types that are fastest on x86 with VNNI; NNCF's post-training quantization with its defaults,
compiled by OpenVINO for latency.

Without VNNI, kernels add two products of uint8 and int8 in 16 bits, which saturates, and the files
are wrong. Both have a variant for such processors, with weights of 7 bits: ``reduce_range`` and
``overflow_fix``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_compress.deploy import load_file

Run = Callable[[Tensor], Tensor]


def run_file(path: Path) -> Run:
    """A file of this library's routes, or ONNX Runtime's own, in its runtime on one thread."""
    loaded = load_file(path, num_threads=1)
    return lambda batch: loaded((batch,))[0]


def quantize_by_onnxruntime(
    float_file: Path, seen: Sequence[Tensor], path: Path, *, safe: bool = False
) -> None:
    """``onnxruntime.quantization.quantize_static``: QDQ, uint8 and int8, a scale a channel."""
    ort: Any = import_module("onnxruntime.quantization")
    prepare: Any = import_module("onnxruntime.quantization.shape_inference").quant_pre_process
    onnx: Any = import_module("onnx")
    name = onnx.load(str(float_file)).graph.input[0].name

    class Images(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[Tensor] = iter(seen)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._left, None)
            return None if batch is None else {name: batch.numpy()}

    prepared = path.with_suffix(".prepared.onnx")
    logging.disable(logging.WARNING)
    try:
        prepare(str(float_file), str(prepared))
        ort.quantize_static(
            str(prepared),
            str(path),
            Images(),
            quant_format=ort.QuantFormat.QDQ,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            per_channel=True,
            reduce_range=safe,
        )
    finally:
        logging.disable(logging.NOTSET)
    prepared.unlink()


def quantize_by_nncf(
    float_file: Path, seen: Sequence[Tensor], path: Path, *, safe: bool = False
) -> None:
    """``nncf.quantize`` on the model as OpenVINO reads it, for images one at a time."""
    os.environ.setdefault("NNCF_CI", "1")  # it reports what it is used for otherwise
    openvino: Any = import_module("openvino")
    nncf: Any = import_module("nncf")
    nncf.set_log_level(logging.ERROR)
    singles = [image[None].numpy() for batch in seen for image in batch]
    model = openvino.Core().read_model(str(float_file))
    model.reshape(list(singles[0].shape))
    fix = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(singles),
        subset_size=len(singles),
        advanced_parameters=fix if safe else None,
    )
    openvino.save_model(quantized, str(path), compress_to_fp16=False)


def run_openvino(path: Path) -> Run:
    """A file of OpenVINO on one thread, compiled for latency; inputs are not copied."""
    openvino: Any = import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()

    def run(batch: Tensor) -> Tensor:
        outputs = [
            torch.from_numpy(request.infer({0: one.numpy()}, share_inputs=True)[0].copy())
            for one in torch.split(batch, 1)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return run


@dataclass(frozen=True)
class Peer:
    """One way in which others make an int8 file.

    Attributes:
        label: As in the table.
        suffix: Of the file.
        quantize: From the float file and calibration images to the file.
        run: Loads the file.
    """

    label: str
    suffix: str
    quantize: Callable[[Path, Sequence[Tensor], Path], None]
    run: Callable[[Path], Run]


_SAFE_ORT = partial(quantize_by_onnxruntime, safe=True)
_SAFE_NNCF = partial(quantize_by_nncf, safe=True)
PEERS = {
    "ort": Peer("ONNX Runtime `quantize_static`", ".onnx", quantize_by_onnxruntime, run_file),
    "ort-safe": Peer("the same, `reduce_range=True`", ".onnx", _SAFE_ORT, run_file),
    "nncf": Peer("NNCF + OpenVINO", ".xml", quantize_by_nncf, run_openvino),
    "nncf-safe": Peer("the same, `overflow_fix=ENABLE`", ".xml", _SAFE_NNCF, run_openvino),
}

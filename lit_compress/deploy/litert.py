"""LiteRT flatbuffers; the only file that needs ``litert_torch`` and ``ai_edge_litert``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_compress.compress.quantization.integers import IntegerNetwork, Spelling
from lit_compress.deploy.exporting import quiet_exporter
from lit_compress.deploy.flat_call import FlatCall
from lit_compress.deploy.litert_weights import store_as_integers
from lit_compress.deploy.route import Route, Runner, Tensors, needs_extra

__all__ = ["LitertRoute"]


class LitertRoute(Route):
    """Converted by ``litert_torch``, run by the interpreter with XNNPACK.

    The batch size is fixed. In files of quantized networks inputs and outputs that lie on a grid
    are integers (int8); the scales are in the file. Results that are on no grid in torch, such as
    logits, are floats: on a grid they would end at the largest value that calibration saw.
    """

    suffix = ".tflite"
    extra = "litert"
    spelling = Spelling(signed_activations=True, weights_in_graph=True, gates="steps")

    def export(self, call: FlatCall, inputs: Tensors, path: Path, *, integers: bool) -> None:
        """See `Route.export`."""
        with needs_extra(self.extra, "LiteRT files"), quiet_exporter():
            import litert_torch
            from litert_torch.quantize import pt2e_quantizer, quant_config
        config = None
        if integers:
            # Nothing is quantized by it: it tells the converter that ranges are in the graph.
            quantizer = pt2e_quantizer.PT2EQuantizer()
            scheme = pt2e_quantizer.get_symmetric_quantization_config(is_per_channel=True)
            config = quant_config.QuantConfig(pt2e_quantizer=quantizer.set_global(scheme))
        with quiet_exporter(), torch.no_grad():
            model = litert_torch.convert(call, inputs, quant_config=config)
            model.export(str(path))
            if integers:
                assert isinstance(call.network, IntegerNetwork)
                store_as_integers(path, call.network.linear_weights())

    def recognizes(self, head: bytes) -> bool:
        """See `Route.recognizes`; the format's name stands behind four bytes."""
        return head[4:8] == b"TFL3"

    def load(self, path: Path, num_threads: int) -> Runner:
        """See `Route.load`."""
        return _LitertRunner(path, num_threads)


class _LitertRunner(Runner):
    def __init__(self, path: Path, num_threads: int) -> None:
        with needs_extra("litert", "LiteRT files"), quiet_exporter():
            from ai_edge_litert.interpreter import Interpreter
        self._loaded: Any = Interpreter(str(path), num_threads=num_threads)
        self._loaded.allocate_tensors()
        # Inputs are numbered in the file's order of names, args_0, args_1, ...
        self._inputs = sorted(self._loaded.get_input_details(), key=_position)
        self._outputs = sorted(self._loaded.get_output_details(), key=_position)
        self.input_shapes = tuple(tuple(map(int, place["shape"])) for place in self._inputs)

    def __call__(self, inputs: Tensors) -> Tensors:
        for x, place in zip(inputs, self._inputs, strict=True):
            self._loaded.set_tensor(place["index"], _on_grid(x, place).numpy())
        self._loaded.invoke()
        return tuple(
            _off_grid(torch.from_numpy(self._loaded.get_tensor(place["index"])), place)
            for place in self._outputs
        )

    def close(self) -> None:
        self._loaded = None


def _on_grid(x: Tensor, place: dict[str, Any]) -> Tensor:
    scale, zero = place["quantization"]
    if scale == 0 or not x.is_floating_point():
        return x
    low, high = torch.iinfo(torch.int8).min, torch.iinfo(torch.int8).max
    return x.div(float(scale)).round_().add_(int(zero)).clamp_(low, high).to(torch.int8)


def _off_grid(x: Tensor, place: dict[str, Any]) -> Tensor:
    scale, zero = place["quantization"]
    return x if scale == 0 else x.to(torch.float32).sub_(int(zero)).mul_(float(scale))


def _position(place: dict[str, Any]) -> int:
    digits = "".join(c for c in str(place["name"]).rpartition("_")[2].partition(":")[0]
                     if c.isdigit())  # fmt: skip
    return int(digits or 0)

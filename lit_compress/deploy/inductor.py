"""AOTInductor packages: machine code for this processor, run by torch itself."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch

from lit_compress.compress.quantization.integers import Spelling
from lit_compress.deploy.exporting import exported_program
from lit_compress.deploy.flat_call import FlatCall
from lit_compress.deploy.route import Route, Runner, Tensors

__all__ = ["InductorRoute"]

_SHAPES = "lit_compress_input_shapes"


class InductorRoute(Route):
    """Compiled ahead of time with frozen weights; building takes a C++ compiler."""

    suffix = ".pt2"
    extra = None
    spelling = Spelling(saturating_weights="float", gates="sigmoids")

    def export(self, call: FlatCall, inputs: Tensors, path: Path, *, integers: bool) -> None:
        """See `Route.export`."""
        from torch import _inductor

        program = exported_program(call, inputs)
        with torch.no_grad():
            _inductor.aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={
                    "freezing": True,
                    "aot_inductor.metadata": {_SHAPES: json.dumps([list(x.shape) for x in inputs])},
                },
            )

    def recognizes(self, head: bytes) -> bool:
        """See `Route.recognizes`; a package is a zip archive."""
        return head[:4] == b"PK\x03\x04"

    def load(self, path: Path, num_threads: int) -> Runner:
        """See `Route.load`.

        Raises:
            ValueError: If the archive is damaged or holds no compiled network.
        """
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = archive.namelist()
        if damaged is not None:
            raise ValueError(f"its part {damaged} is damaged")
        if not any(name.endswith(".so") for name in names):
            raise ValueError("it holds no compiled network")
        return _AotRunner(path, num_threads)


class _AotRunner(Runner):
    def __init__(self, path: Path, num_threads: int) -> None:
        from torch import _inductor

        self._num_threads = num_threads
        self._loaded: Any = _inductor.aoti_load_package(str(path))
        shapes = self._loaded.get_metadata().get(_SHAPES)
        if shapes is None:
            raise ValueError("it does not say which shapes it takes")
        self.input_shapes = tuple(map(tuple, json.loads(shapes)))

    def __call__(self, inputs: Tensors) -> Tensors:
        if torch.get_num_threads() != self._num_threads:
            torch.set_num_threads(self._num_threads)
        with torch.no_grad():
            outputs = self._loaded(*inputs)
        return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)

    def close(self) -> None:
        self._loaded = None

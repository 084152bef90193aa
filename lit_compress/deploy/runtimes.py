"""The routes of all targets; recognize an exported file and load it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lit_compress.deploy.executorch import ExecutorchRoute
from lit_compress.deploy.inductor import InductorRoute
from lit_compress.deploy.litert import LitertRoute
from lit_compress.deploy.onnx import OnnxRoute
from lit_compress.deploy.openvino import OpenvinoRoute
from lit_compress.deploy.route import MissingExtra, Route, Runner, Shape, Target, Tensors

__all__ = ["ROUTES", "LoadedFile", "content_of", "load_file", "recognize", "route_to"]

_ONNX = OnnxRoute()

ROUTES: Mapping[Target, Route] = {
    "onnx": _ONNX,
    "ort-int8": _ONNX,
    "openvino": OpenvinoRoute(),
    "executorch": ExecutorchRoute(),
    "litert": LitertRoute(),
    "inductor": InductorRoute(),
}
"""One way for each target."""


def route_to(target: Target) -> Route:
    """The way to a target.

    Raises:
        ValueError: If there is no such target.
    """
    if target not in ROUTES:
        raise ValueError(f"target={target!r}; choose one of {', '.join(ROUTES)}.")
    return ROUTES[target]


def recognize(path: str | os.PathLike[str]) -> Target:
    """Which runtime a file is for, by its suffix and its first bytes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the suffix is none of a runtime's, or the file does not begin like one.
    """
    path = Path(path)
    suffixes: dict[str, Target] = {}
    for name, route in ROUTES.items():
        suffixes.setdefault(route.suffix, name)
    target = suffixes.get(path.suffix)
    if target is None:
        raise ValueError(
            f"{path} is no file of a runtime; their names end in {', '.join(suffixes)}. Write one "
            "with lit-compress export."
        )
    with path.open("rb") as file:
        head = file.read(64)
    if not ROUTES[target].recognizes(head):
        what = "is empty" if not head else f"begins with {head[:8]!r}"
        raise ValueError(
            f"{path} {what}, not like a {path.suffix} file: it is damaged or of another kind. "
            "Export it again."
        )
    return target


def content_of(path: str | os.PathLike[str]) -> bytes:
    """All bytes of an exported file and of those that belong to it, one file after the other.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: As `recognize`.
    """
    parts = ROUTES[recognize(path)].files_of(Path(path))
    return b"".join(part.read_bytes() for part in parts)


class LoadedFile:
    """A file in its runtime, which maps tensors to tensors; leave its ``with`` block to close it.

    Args:
        path: The file.
        target: Its runtime.
        runner: What the runtime made of it.

    Attributes:
        path: The file.
        target: Its runtime.
    """

    def __init__(self, path: Path, target: Target, runner: Runner) -> None:
        self.path, self.target = path, target
        self._runner = runner

    @property
    def input_shapes(self) -> tuple[Shape, ...]:
        """Shapes of its inputs; ``None`` for a dimension that may have any length."""
        return self._runner.input_shapes

    @property
    def batch_size(self) -> int | None:
        """Examples that it takes at a time; ``None`` for any number."""
        first = self.input_shapes[0] if self.input_shapes else ()
        return first[0] if first else None

    def __call__(self, inputs: Tensors) -> Tensors:
        """Run it on tensors on the CPU, in the order in which the network takes them.

        Raises:
            ValueError: If their number or a shape is not that of the file.
        """
        shapes = self.input_shapes
        if len(inputs) != len(shapes) or not all(map(_fits, inputs, shapes)):
            given = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise ValueError(
                f"{self.path} takes {', '.join(map(_shown, shapes))}; came {given}. Give inputs of "
                "these shapes, or export the network again with others."
            )
        return self._runner(inputs)

    def close(self) -> None:
        """Release what the runtime holds."""
        self._runner.close()

    def __enter__(self) -> LoadedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _fits(x: Tensor, shape: Shape) -> bool:
    return x.dim() == len(shape) and all(
        length in (None, present) for length, present in zip(shape, x.shape, strict=True)
    )


def _shown(shape: Shape) -> str:
    return f"({', '.join('any' if length is None else str(length) for length in shape)})"


def load_file(path: str | os.PathLike[str], num_threads: int = 1) -> LoadedFile:
    """Load an exported file in its runtime.

    Args:
        path: An exported file.
        num_threads: Threads within an operator, at least 1. ExecuTorch and inductor have one
            setting a process: there the runner used last decides.

    Raises:
        FileNotFoundError: If there is no such file.
        MissingExtra: If the runtime is not installed.
        ValueError: If the file is damaged or no file of a runtime, or the number is out of range.
    """
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
        raise ValueError(f"num_threads={num_threads!r}; expected a whole number, at least 1.")
    target = recognize(path)
    try:
        return LoadedFile(Path(path), target, ROUTES[target].load(Path(path), num_threads))
    except MissingExtra:
        raise
    except Exception as error:  # each runtime has errors of its own
        raise ValueError(
            f"{path} cannot be loaded by the runtime for {target}: {_first_line(error)}. The file "
            "is damaged, or was written by another version; export it again."
        ) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

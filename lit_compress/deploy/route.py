"""Route: how a network is exported to one runtime, loaded and run there; export errors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

from torch import Tensor

from lit_compress.compress.quantization.integers import Spelling
from lit_compress.deploy.flat_call import FlatCall

__all__ = [
    "ExportError",
    "MissingExtra",
    "Route",
    "Runner",
    "Shape",
    "Target",
    "Tensors",
    "needs_extra",
]

Target: TypeAlias = Literal["onnx", "ort-int8", "openvino", "executorch", "litert", "inductor"]
"""Where a file is to run: ONNX Runtime, with integers in ONNX Runtime, and so on."""
Tensors: TypeAlias = tuple[Tensor, ...]
Shape: TypeAlias = tuple[int | None, ...]


class MissingExtra(ImportError):
    """A runtime's packages are not installed; the message says how to install them."""


class ExportError(RuntimeError):
    """A runtime cannot take a network; the message gives the runtime's own words."""


class Runner(ABC):
    """A file loaded in its runtime.

    Attributes:
        input_shapes: Shapes of its inputs; ``None`` for a dimension that may have any length.
    """

    input_shapes: tuple[Shape, ...]

    @abstractmethod
    def __call__(self, inputs: Tensors) -> Tensors:
        """Run the file on tensors on the CPU, in the order of `FlatCall`."""

    @abstractmethod
    def close(self) -> None:
        """Release what the runtime holds."""


class Route(ABC):
    """The way of a network into a file of one runtime, and the file's way back into memory.

    Attributes:
        suffix: How names of its files end, as in ``".onnx"``.
        companions: Suffixes of files that belong to one of that name and stand beside it, as
            ``(".bin",)`` for weights.
        any_batch: Whether files take any batch size, where the network does.
        extra: The extra that installs the runtime; ``None`` where torch is all it needs.
        spelling: How a quantized network is written for it.
    """

    suffix: str
    companions: tuple[str, ...] = ()
    any_batch: bool = False
    extra: str | None
    spelling: Spelling

    @abstractmethod
    def export(self, call: FlatCall, inputs: Tensors, path: Path, *, integers: bool) -> None:
        """Write a file.

        Args:
            call: The network in evaluation mode, on the CPU.
            inputs: One batch.
            path: The file, whose name ends in ``suffix``; companions are written beside it.
            integers: Whether the network is one of integers, in this route's spelling.

        Raises:
            MissingExtra: If the runtime's packages are not installed.
        """

    def files_of(self, path: Path) -> tuple[Path, ...]:
        """The file and its companions."""
        return (path, *(path.with_suffix(suffix) for suffix in self.companions))

    @abstractmethod
    def recognizes(self, head: bytes) -> bool:
        """Whether a file of this suffix that begins like this may be one of this runtime.

        Args:
            head: The first 64 bytes.
        """

    @abstractmethod
    def load(self, path: Path, num_threads: int) -> Runner:
        """Load a file in its runtime.

        Raises:
            MissingExtra: If the runtime's packages are not installed.
        """


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Turn a failing import inside into an error that says what to install.

    Args:
        extra: The extra of this package.
        what: What needs it, as in ``"ONNX files"``.

    Raises:
        MissingExtra: If a module is not found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"{what} need the package {error.name}, which is not installed. Install it with "
            f'pip install "lit-compress[{extra}]".'
        ) from error

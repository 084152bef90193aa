"""Bytes of a model on disk: as ``torch.save`` writes it, and compressed."""

from __future__ import annotations

import io
import zlib
from importlib.util import find_spec
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

Codec: TypeAlias = Literal["deflate", "zstd"]

_LEVELS = {"deflate": (0, 9, 6), "zstd": (1, 22, 3)}  # lowest, highest, the codec's own default


def size_bytes(model: nn.Module) -> int:
    """Bytes of the file that ``torch.save(model.state_dict(), path)`` writes.

    The state is really saved, in memory: parameters and buffers in their dtypes, names and the
    zip container. Zeros take as many bytes as other numbers, and a tensor that is a view of a
    larger one takes the bytes of the larger one.

    Returns:
        Size in bytes.

    Example:
        >>> size_bytes(nn.Linear(256, 256)) > 256 * 256 * 4
        True
    """
    return len(_saved(model))


def compressed_size_bytes(
    model: nn.Module, codec: Codec = "deflate", level: int | None = None
) -> int:
    """Bytes of the saved state after general-purpose compression.

    This is where zeros and repeated values pay: what a download or an update costs.

    Args:
        model: The model whose ``state_dict`` is saved as by `size_bytes` and compressed.
        codec: ``"deflate"`` (zip, gzip; RFC 1951 in a zlib container) or ``"zstd"`` (RFC 8878).
        level: Effort, 0 to 9 for deflate and 1 to 22 for zstd; by default 6 and 3.

    Returns:
        Size in bytes.

    Raises:
        ValueError: If the codec is unknown or the level is outside its range.
        ModuleNotFoundError: If zstd is asked for and ``zstandard`` is not installed.
    """
    return compressed_length(_saved(model), codec, level)


def compressed_length(data: bytes, codec: Codec = "deflate", level: int | None = None) -> int:
    """Bytes that ``data`` takes after compression; arguments as `compressed_size_bytes`."""
    if codec not in get_args(Codec):
        raise ValueError(f"codec={codec!r}; expected one of {', '.join(get_args(Codec))}.")
    lowest, highest, default = _LEVELS[codec]
    if level is None:
        level = default
    if not lowest <= level <= highest:
        raise ValueError(f"level={level} for {codec}; expected {lowest} to {highest}.")
    if codec == "deflate":
        return len(zlib.compress(data, level))
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "codec='zstd' needs the package zstandard, which is not installed. Install it with "
            "pip install 'lit-compress[report]', or use codec='deflate'."
        ) from error
    return len(zstandard.ZstdCompressor(level=level).compress(data))


def saved_sizes(model: nn.Module) -> tuple[int, dict[str, int]]:
    """The size and the compressed sizes by codec, saving once; zstd only where installed."""
    data = _saved(model)
    compressed = {"deflate": compressed_length(data, "deflate")}
    if find_spec("zstandard") is not None:
        compressed["zstd"] = compressed_length(data, "zstd")
    return len(data), compressed


def _saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()

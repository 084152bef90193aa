"""Packed files: write a state dict in as few bytes as its values need, and read it back.

The size of a clustered, sparse or quantized model is the size of such a file. ``torch.save`` writes
it: a line that says what it is, and one tensor of bytes in the xz format, which Python reads by
itself. Once decompressed, the bytes are:

1. the length of the table of contents (8 bytes), and the table, in JSON;
2. the cluster indices, integers and masks of all tensors, in 1, 2, 4 or 8 bits each;
3. all other numbers, of which centroids and what is not zero in sparse tensors: by dtype, the
   lowest byte of each number, then the next byte of each, and so on; exponents lie side by side
   and compress.

LZMA does the entropy coding. Indices do not cross bytes, since what does compresses worse: on
ResNet-20, 3-bit indices end up 5 % smaller if each takes 4 bits before the compression.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_compress.compress.packing.tensors import (
    Clustered,
    Integers,
    PackedTensor,
    Raw,
    Sparse,
    num_index_bits,
    pack_bits,
    packed_form,
    unpack_bits,
)
from lit_compress.files import replacing

__all__ = ["PackedContent", "pack", "packed_content", "read_packed", "unpack", "write_packed"]

_FORMAT = "lit-compress packed tensors, version 1"
# LZMA codes a literal in the context of so many bits of the byte before. None is best for sparse
# tensors, 3 for dense ones (up to 5 % each way); the first bytes decide.
_CONTEXT_BITS = (0, 3)
_NUM_TRIED_BYTES = 2**20

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.complex64, torch.complex128),
    )
}


@dataclass(frozen=True)
class PackedContent:
    """What a packed file holds.

    Attributes:
        entries: By name, in the order in which they were written.
        record: Plain data that was stored beside them.
    """

    entries: dict[str, PackedTensor]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, equal bit by bit to those that were written, without the integers."""
        return {n: e.values for n, e in self.entries.items() if not isinstance(e, Integers)}

    @property
    def integers(self) -> dict[str, Integers]:
        """The integers."""
        return {n: e for n, e in self.entries.items() if isinstance(e, Integers)}


def write_packed(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    integers: Mapping[str, Integers] | None = None,
    record: Mapping[str, Any] | None = None,
) -> int:
    """Write a packed file, whole or not at all.

    Tensors of few distinct values and those with many zeros, such as the weights of a clustered or
    sparse model, are recognised and stored as such.

    Args:
        path: The file; an older one is replaced.
        state_dict: Tensors by name, on any device.
        integers: Further tensors by name, of small integers.
        record: Plain data to store beside them: what JSON has.

    Returns:
        Bytes of the file.

    Raises:
        ValueError: If a name is given twice, a tensor is not a dense one of a usual dtype (it is
            named), or ``record`` is no plain data. An older file stays as it was.
    """
    integers = integers or {}
    twice = sorted(state_dict.keys() & integers.keys())
    if twice:
        raise ValueError(
            f"{twice[0]!r} is in state_dict and in integers; leave it out of one of them."
        )
    for name, values in state_dict.items():
        _check_tensor(name, values)
    entries: dict[str, PackedTensor] = {n: packed_form(v) for n, v in state_dict.items()}
    content = torch.frombuffer(bytearray(pack(entries | dict(integers), record)), dtype=torch.uint8)
    target = Path(path)
    with replacing(target) as part, part.open("wb") as file:  # by a path, its name would be inside
        torch.save({"format": _FORMAT, "content": content}, file)
    return target.stat().st_size


def read_packed(path: str | os.PathLike[str]) -> PackedContent:
    """Read a packed file onto the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, damaged, or not from :func:`write_packed`; it is only
            ever read.
    """
    name = os.fspath(path)
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch answers broken files with errors of many types
        raise _unreadable(name, error) from error
    content = packed_content(stored, name)
    if content is None:
        raise ValueError(
            f"{name!r} is no packed file: expected {_FORMAT!r} in it. The file was left as it was; "
            "if it is a checkpoint or a state dict, read it with torch.load."
        )
    return content


def packed_content(stored: Any, name: str) -> PackedContent | None:
    """The content of a packed file that ``torch.load`` has opened; ``None`` if it is another one.

    Args:
        stored: What ``torch.load`` gave.
        name: The file's, for the message.

    Raises:
        ValueError: If the content is damaged.
    """
    if not isinstance(stored, Mapping) or stored.get("format") != _FORMAT:
        return None
    try:
        return unpack(stored["content"].numpy().tobytes())
    except Exception as error:  # the bytes may say anything
        raise _unreadable(name, error) from error


def pack(entries: Mapping[str, PackedTensor], record: Mapping[str, Any] | None = None) -> bytes:
    """Tensors as compressed bytes, in the xz format with its checksum.

    Args:
        entries: Tensors by name, on any device.
        record: Plain data to store beside them: what JSON has.

    Raises:
        ValueError: If a tensor is not a dense one of a usual dtype, or ``record`` no plain data.
    """
    rows: list[_Row] = []
    symbols: list[Tensor] = []
    numbers: dict[str, list[Tensor]] = {}
    for name, entry in entries.items():
        row = _Row.of(name, entry)
        rows.append(row)
        of_symbols, of_numbers = _parts(entry)
        if of_symbols is not None:
            symbols.append(pack_bits(of_symbols, row.width))
        if of_numbers is not None:
            numbers.setdefault(row.dtype, []).append(of_numbers.detach().cpu().flatten())
    planes = (_byte_planes(torch.cat(numbers[dtype])) for dtype in sorted(numbers))
    try:
        table = json.dumps({"tensors": rows, "record": dict(record or {})}).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the record cannot be stored ({error}); give numbers, strings, lists and mappings."
        ) from error
    data = (part.numpy().tobytes() for part in chain(symbols, planes))
    return _compressed(b"".join([len(table).to_bytes(8, "little"), table, *data]))


def unpack(data: bytes) -> PackedContent:
    """The way back from :func:`pack`.

    Raises:
        ValueError: If the bytes are damaged, or not from :func:`pack`.
    """
    try:
        plain = bytearray(lzma.decompress(data, lzma.FORMAT_XZ))
    except lzma.LZMAError as error:
        raise ValueError(f"the bytes cannot be decompressed: {error}") from error
    begin = 8 + int.from_bytes(plain[:8], "little")
    table = json.loads(plain[8:begin])
    rows = [_Row(*row) for row in table["tensors"]]
    rest = torch.frombuffer(plain, dtype=torch.uint8)[begin:]

    in_symbols = [row for row in rows if row.kind != "raw"]
    sizes = [row.num_bytes for row in in_symbols]
    *parts, rest = torch.split(rest, [*sizes, len(rest) - sum(sizes)])
    symbols = {
        row.name: unpack_bits(part, row.width, row.numel).view(row.shape)
        for row, part in zip(in_symbols, parts, strict=True)
    }
    numbers = _read_numbers(rest, [row for row in rows if row.kind != "integers"])
    entries: dict[str, PackedTensor] = {}
    for row in rows:
        if row.kind == "raw":
            entries[row.name] = Raw(numbers[row.name].view(row.shape))
        elif row.kind == "clustered":
            entries[row.name] = Clustered(numbers[row.name], symbols[row.name])
        elif row.kind == "sparse":
            entries[row.name] = Sparse(symbols[row.name].bool(), numbers[row.name])
        else:
            signed = symbols[row.name].to(torch.int16) - 2 ** (row.size - 1)
            entries[row.name] = Integers(signed.to(torch.int8), row.size)
    return PackedContent(entries, table["record"])


class _Row(NamedTuple):
    """A tensor's line in the table of contents."""

    name: str
    kind: Literal["raw", "clustered", "sparse", "integers"]
    size: int  # clustered: number of centroids; sparse: of nonzeros; integers: their bits; raw: 0
    dtype: str
    shape: list[int]

    @classmethod
    def of(cls, name: str, entry: PackedTensor) -> _Row:
        symbols, numbers = _parts(entry)
        plain = entry.values if isinstance(entry, Integers) else numbers
        shape = entry.values.shape if symbols is None else symbols.shape
        _check_tensor(name, plain)
        assert plain is not None
        dtype = str(plain.dtype).removeprefix("torch.")
        if isinstance(entry, Integers):
            return cls(name, "integers", entry.bits, dtype, list(shape))
        if isinstance(entry, Raw):
            return cls(name, "raw", 0, dtype, list(shape))
        kind: Literal["clustered", "sparse"]
        kind = "clustered" if isinstance(entry, Clustered) else "sparse"
        return cls(name, kind, len(plain), dtype, list(shape))

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def width(self) -> int:
        """Bits of an index, an integer or an element of a mask before the compression."""
        if self.kind == "sparse":
            return 1
        bits = num_index_bits(self.size) if self.kind == "clustered" else self.size
        return next(width for width in (0, 1, 2, 4, 8) if width >= bits)

    @property
    def num_bytes(self) -> int:
        return (self.numel * self.width + 7) // 8

    @property
    def num_numbers(self) -> int:
        return self.numel if self.kind == "raw" else self.size


def _parts(entry: PackedTensor) -> tuple[Tensor | None, Tensor | None]:
    """What is stored in few bits (uint8), and what is stored as it is."""
    if isinstance(entry, Clustered):
        return entry.indices, entry.centroids
    if isinstance(entry, Sparse):
        return entry.mask.to(torch.uint8), entry.nonzeros
    if isinstance(entry, Integers):
        return (entry.values.to(torch.int16) + entry.half).to(torch.uint8), None
    return None, entry.values


def _read_numbers(data: Tensor, rows: list[_Row]) -> dict[str, Tensor]:
    """By name, what is stored as it is: a whole tensor, centroids or nonzeros; shape ``[n]``."""
    numbers: dict[str, Tensor] = {}
    for name in sorted({row.dtype for row in rows}):
        of_dtype = [row for row in rows if row.dtype == name]
        sizes = [row.num_numbers for row in of_dtype]
        item = _DTYPES[name].itemsize
        size = sum(sizes) * item
        planes, data = torch.split(data, [size, len(data) - size])
        # A copy, even where the transpose changes nothing, begins where numbers may begin.
        flat = planes.view(item, sum(sizes)).t().clone(memory_format=torch.contiguous_format)
        flat = flat.view(-1).view(_DTYPES[name])
        parts = torch.split(flat, sizes)
        numbers |= {row.name: part.clone() for row, part in zip(of_dtype, parts, strict=True)}
    if len(data):
        raise ValueError(f"{len(data)} bytes are left over.")
    return numbers


def _byte_planes(values: Tensor) -> Tensor:
    """The lowest byte of each number, then the next byte of each, and so on."""
    size = values.element_size()
    return values.view(torch.uint8).view(len(values), size).t().contiguous()


def _compressed(data: bytes) -> bytes:
    def compress(part: bytes, context_bits: int) -> bytes:
        options = {"preset": 9 | lzma.PRESET_EXTREME, "lc": context_bits, "lp": 0, "pb": 0}
        options["dict_size"] = min(max(len(part), 2**12), 2**26)  # no more memory than it needs
        return lzma.compress(part, lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, **options}])

    tried = data[:_NUM_TRIED_BYTES]
    tries = {bits: compress(tried, bits) for bits in _CONTEXT_BITS}
    best = min(tries, key=lambda bits: len(tries[bits]))
    return tries[best] if len(tried) == len(data) else compress(data, best)


def _check_tensor(name: str, values: Any) -> None:
    if not isinstance(values, Tensor):
        raise ValueError(
            f"{name!r} is a {type(values).__name__}, expected a tensor; leave it out, or give it "
            "in record if it is plain data."
        )
    dtype = str(values.dtype).removeprefix("torch.")
    if values.layout != torch.strided or values.is_quantized or dtype not in _DTYPES:
        raise ValueError(
            f"{name!r} is {values.dtype} in {values.layout}, expected a dense tensor of "
            f"{', '.join(_DTYPES)}."
        )


def _unreadable(name: str, error: Exception) -> ValueError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return ValueError(
        f"{name!r} cannot be read as a packed file ({reason}): it is truncated or damaged. The "
        "file was left as it was; write it again from the model, or take another copy."
    )

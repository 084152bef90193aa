"""Sizes and latency of exported files: the result of a benchmark, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lit_compress.measure.table import TIMES, UNKNOWN, aligned, megabytes, shown
from lit_compress.plain import SavedAsJSON

__all__ = ["BenchmarkResult", "FileLatency", "MeasuredFile"]


@dataclass(frozen=True)
class MeasuredFile:
    """One exported file.

    Attributes:
        name: Its name without the folder; with it where two are called the same.
        target: The runtime that it is for.
        batch_size: Examples that it takes at a time; ``None`` for any number.
        size_bytes: Its size.
        compressed_size_bytes: Its size after deflate.
    """

    name: str
    target: str
    batch_size: int | None
    size_bytes: int
    compressed_size_bytes: int


@dataclass(frozen=True)
class FileLatency:
    """Times of one file with one number of threads and one batch size.

    Attributes:
        file: Name of the file.
        num_threads: Threads within an operator.
        batch_size: Examples a call.
        median_ms: Half of the calls were faster.
        p25_ms: One call in four was faster.
        p75_ms: One call in four was slower.
        throughput: Examples per second at the median.
        ratio: Median over the first file's; below 1 it is faster than that one.
        ratio_p10: In one round of ten the ratio was smaller ...
        ratio_p90: ... and in one of ten larger: where 1 lies between, no difference was shown.
        peak_memory_bytes: How far the memory of the process rose when it loaded the file and ran it
            with batches up to this size, on one thread; ``None`` where it was not measured.
    """

    file: str
    num_threads: int
    batch_size: int
    median_ms: float
    p25_ms: float
    p75_ms: float
    throughput: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class BenchmarkResult(SavedAsJSON):
    """Files timed in turns in one process. ``print(result)`` shows two tables.

    Attributes:
        files: The files; ratios are against the first.
        rows: Their times, by threads, batch size and file. A file of a fixed batch size has none
            for the others.
        setting: Versions and the machine, in words.
    """

    files: tuple[MeasuredFile, ...]
    rows: tuple[FileLatency, ...]
    setting: Mapping[str, str]

    json_format: ClassVar[str] = "lit-compress benchmark 1"
    json_name: ClassVar[str] = "a benchmark of exported files"

    def __str__(self) -> str:
        return "\n".join([*self._files_table(), "", *self._latency_table()])

    def _files_table(self) -> list[str]:
        first = self.files[0].size_bytes
        return aligned(
            ("file", "target", "batch", "size", "deflate", f"{TIMES} first"),
            [
                (
                    file.name,
                    file.target,
                    "any" if file.batch_size is None else str(file.batch_size),
                    megabytes(file.size_bytes),
                    megabytes(file.compressed_size_bytes),
                    f"{file.size_bytes / first:.3g}",
                )
                for file in self.files
            ],
        )

    def _latency_table(self) -> list[str]:
        return aligned(
            ("file", "threads", "batch", "median", "quartiles", "per second", f"{TIMES} first",
             "10-90 %", "peak memory"),
            [
                (
                    row.file,
                    str(row.num_threads),
                    str(row.batch_size),
                    f"{row.median_ms:.3f} ms",
                    f"{row.p25_ms:.3f}-{row.p75_ms:.3f}",
                    f"{row.throughput:,.0f}",
                    f"{row.ratio:.3f}" if row.ratio == row.ratio else UNKNOWN,
                    f"{row.ratio_p10:.3f}-{row.ratio_p90:.3f}" if row.ratio == row.ratio
                    else UNKNOWN,
                    shown(row.peak_memory_bytes, megabytes),
                )
                for row in self.rows
            ],
        )  # fmt: skip

    def row(self, file: str, num_threads: int, batch_size: int) -> FileLatency:
        """The times of one file.

        Raises:
            ValueError: If there are none.
        """
        for row in self.rows:
            if (row.file, row.num_threads, row.batch_size) == (file, num_threads, batch_size):
                return row
        raise ValueError(
            f"{file!r} was not timed with {num_threads} threads and batch size {batch_size}; the "
            f"files are {', '.join(repr(f.name) for f in self.files)}."
        )

"""Time exported files on their runtimes, in turns in one process."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from lit_compress.deploy.benchmark_result import BenchmarkResult, FileLatency, MeasuredFile
from lit_compress.deploy.file_memory import peak_memory_by_batch
from lit_compress.deploy.flat_call import flat_inputs
from lit_compress.deploy.route import Tensors
from lit_compress.deploy.runtimes import LoadedFile, content_of, load_file, recognize
from lit_compress.measure.inputs import ExampleInputs, with_batch_size
from lit_compress.measure.size import compressed_length

__all__ = ["benchmark_files"]

_PACKAGES = ("torch", "onnxruntime", "openvino", "executorch", "ai-edge-litert")


def benchmark_files(
    files: Sequence[str | os.PathLike[str]],
    example_inputs: ExampleInputs,
    *,
    threads: Sequence[int] = (1, 2),
    batch_sizes: Sequence[int] = (1, 8, 32),
    rounds: int = 30,
    warmup: int = 3,
    memory: bool = True,
) -> BenchmarkResult:
    """Time exported files side by side.

    In each round every file runs once, beginning with another one each time, so that a slow moment
    of the machine hits all. Files of a fixed batch size (all but those for
    ONNX Runtime and OpenVINO) are timed at that size only.

    Args:
        files: Exported files; ratios are against the first, such as the one of the float network.
        example_inputs: One batch as the networks take it; repeated or cut to each batch size.
        threads: Numbers of threads, each at least 1.
        batch_sizes: Batch sizes, each at least 1.
        rounds: Calls timed of each file, at least 2.
        warmup: Calls before, at least 1.
        memory: Whether to measure peak memory too (on Linux; elsewhere it stays unknown).

    Returns:
        All times.

    Raises:
        FileNotFoundError: If a file does not exist.
        MissingExtra: If a runtime is not installed.
        ValueError: If a file is damaged, takes inputs of other shapes or none of the batch sizes,
            or a number is out of range.
    """
    if isinstance(files, str | bytes | os.PathLike) or not files:
        raise ValueError(f"files is {files!r}; give a list of at least one file.")
    threads, batch_sizes = _counts("threads", threads), _counts("batch_sizes", batch_sizes)
    for name, value, least in (("rounds", rounds, 2), ("warmup", warmup, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}; expected a whole number, at least {least}.")
    paths = _named([Path(file) for file in files])
    measured = {name: _measured(name, path, batch_sizes) for name, path in paths.items()}
    inputs = {size: flat_inputs(with_batch_size(example_inputs, size)) for size in batch_sizes}
    threads_before = torch.get_num_threads()
    rows: list[FileLatency] = []
    try:
        for count in threads:
            rows += _timed(paths, measured, inputs, count, rounds, warmup)
    finally:
        torch.set_num_threads(threads_before)
    if memory:
        rows = _with_memory(rows, paths, inputs)
    return BenchmarkResult(tuple(measured.values()), tuple(rows), _setting())


def _counts(name: str, values: Sequence[int]) -> tuple[int, ...]:
    numbers = (values,) if isinstance(values, int) else tuple(values)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
    if not numbers or not whole:
        raise ValueError(f"{name}={values!r}; expected whole numbers, each at least 1.")
    return tuple(dict.fromkeys(numbers))


def _named(paths: Sequence[Path]) -> dict[str, Path]:
    """File names; paths where two are called the same."""
    names = [path.name for path in paths]
    return {
        path.name if names.count(path.name) == 1 else str(path): path for path in paths
    }  # fmt: skip


def _measured(name: str, path: Path, batch_sizes: Sequence[int]) -> MeasuredFile:
    with load_file(path) as loaded:
        fixed = loaded.batch_size
    if fixed is not None and fixed not in batch_sizes:
        raise ValueError(
            f"{path} takes batches of {fixed}, and batch_sizes is {tuple(batch_sizes)}; add "
            f"{fixed}, or export the network again with another batch size."
        )
    data = content_of(path)
    return MeasuredFile(name, recognize(path), fixed, len(data), compressed_length(data))


def _timed(
    paths: Mapping[str, Path],
    measured: Mapping[str, MeasuredFile],
    inputs: Mapping[int, Tensors],
    num_threads: int,
    rounds: int,
    warmup: int,
) -> list[FileLatency]:
    rows = []
    torch.set_num_threads(num_threads)
    with ExitStack() as stack:
        loaded = {
            name: stack.enter_context(load_file(path, num_threads)) for name, path in paths.items()
        }
        for size, batch in inputs.items():
            able = {n: f for n, f in loaded.items() if measured[n].batch_size in (None, size)}
            times = _in_turns(able, batch, rounds, warmup)
            first = times.get(next(iter(paths)))
            rows += [_row(n, num_threads, size, own, first) for n, own in times.items()]
    return rows


def _in_turns(
    loaded: Mapping[str, LoadedFile], batch: Tensors, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Milliseconds of each call, by file; in every round another file comes first."""
    times: dict[str, list[float]] = {name: [] for name in loaded}
    order = list(loaded)
    for turn in range(warmup + rounds):
        for name in order:
            start = time.perf_counter()
            loaded[name](batch)
            elapsed = (time.perf_counter() - start) * 1e3
            if turn >= warmup:
                times[name].append(elapsed)
        order = order[1:] + order[:1]
    return times


def _row(
    name: str, num_threads: int, batch_size: int, own: list[float], first: list[float] | None
) -> FileLatency:
    median = statistics.median(own)
    p25, _, p75 = statistics.quantiles(own, n=4, method="inclusive")
    ratio = low = high = float("nan")
    if first is not None:
        ratio = median / statistics.median(first)
        each = [mine / theirs for mine, theirs in zip(own, first, strict=True)]
        low, *_, high = statistics.quantiles(each, n=10, method="inclusive")
    return FileLatency(
        file=name,
        num_threads=num_threads,
        batch_size=batch_size,
        median_ms=median,
        p25_ms=p25,
        p75_ms=p75,
        throughput=batch_size / median * 1e3,
        ratio=ratio,
        ratio_p10=low,
        ratio_p90=high,
    )


def _with_memory(
    rows: Sequence[FileLatency], paths: Mapping[str, Path], inputs: Mapping[int, Tensors]
) -> list[FileLatency]:
    peaks = {}
    for name, path in paths.items():
        sizes = sorted({row.batch_size for row in rows if row.file == name})
        peaks[name] = peak_memory_by_batch(path, {size: inputs[size] for size in sizes})
    return [replace(row, peak_memory_bytes=peaks[row.file].get(row.batch_size)) for row in rows]


def _setting() -> dict[str, str]:
    versions = {package: _version(package) for package in _PACKAGES}
    installed = {package: number for package, number in versions.items() if number is not None}
    return {"machine": platform.machine(), "python": platform.python_version(), **installed}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

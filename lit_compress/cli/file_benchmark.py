"""``lit-compress benchmark FILE...``: time exported files on their runtimes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger

from lit_compress.callbacks.lightning import tracking
from lit_compress.cli.subject import Subject, quiet
from lit_compress.deploy import BenchmarkResult, benchmark_files
from lit_compress.deploy.runtimes import ROUTES, load_file
from lit_compress.measure import ExampleInputs
from lit_compress.plotting import plot_benchmark

__all__ = ["are_exported", "benchmark_exported"]


def are_exported(files: Sequence[str]) -> bool:
    """Whether these are files of runtimes, by their names, and not a checkpoint.

    Raises:
        ValueError: If there are several and some are not.
    """
    suffixes = {route.suffix for route in ROUTES.values()}
    exported = [Path(file).suffix in suffixes for file in files]
    if len(files) > 1 and not all(exported):
        other = files[exported.index(False)]
        raise ValueError(
            f"{other!r} is no exported file (their names end in {', '.join(sorted(suffixes))}), "
            "and a checkpoint is timed alone, or against --baseline CHECKPOINT. To time it beside "
            "exported files, export it first."
        )
    return all(exported)


def benchmark_exported(
    options: Namespace,
    threads: Sequence[int],
    batch_sizes: Sequence[int],
    subject: Subject | None,
) -> BenchmarkResult:
    """Time exported files in turns; print, and write and draw what the options say.

    Args:
        options: Of the command.
        threads: Numbers of threads.
        batch_sizes: Batch sizes.
        subject: Says what the input is, where a configuration or a shape was given.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or takes another input, or the input is not known.
    """
    inputs = None if subject is None else subject.example_inputs()
    result = benchmark_files(
        options.checkpoint,
        _input_of(options.checkpoint[0]) if inputs is None else inputs,
        threads=threads,
        batch_sizes=batch_sizes,
        rounds=options.repeats,
    )
    print(result)
    if options.json:
        result.save(options.json)
    picture = plot_benchmark(result, options.plot) if options.plot else None
    if options.wandb:
        _log(result, options.wandb, [p for p in (picture,) if p is not None])
    return result


def _input_of(path: str) -> ExampleInputs:
    """Random numbers of the shapes that a file takes."""
    generator = torch.Generator().manual_seed(0)
    with load_file(path) as file:
        shapes = file.input_shapes
    if any(length is None for shape in shapes for length in shape[1:]):
        raise ValueError(
            f"{path} takes inputs of any length, so that nothing says which to time; give the "
            "shape of one example, as in --input-shape 3,32,32."
        )
    return tuple(
        torch.randn([length or 1 for length in shape], generator=generator) for shape in shapes
    )


def _log(result: BenchmarkResult, project: str, pictures: Sequence[Path]) -> None:
    with quiet():
        logger = WandbLogger(project=project, job_type="benchmark")
        trainer = Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False)
    columns = ("file", "threads", "batch", "median_ms", "per_second", "ratio", "peak_memory_bytes")
    rows = [
        (r.file, r.num_threads, r.batch_size, r.median_ms, r.throughput, r.ratio,
         r.peak_memory_bytes)
        for r in result.rows
    ]  # fmt: skip
    tracking.log_table(trainer, "benchmark/latency", columns, rows)
    files = [(f.name, f.target, f.size_bytes, f.compressed_size_bytes) for f in result.files]
    header = ("file", "target", "size_bytes", "compressed_size_bytes")
    tracking.log_table(trainer, "benchmark/files", header, files)
    tracking.log_images(trainer, "benchmark/plot", list(pictures))
    logger.experiment.finish()

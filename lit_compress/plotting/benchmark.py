"""Latency of exported files as bars: the figure of a `BenchmarkResult`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lit_compress.deploy.benchmark_result import BenchmarkResult
from lit_compress.plotting.figure import new_figure, save_figure

__all__ = ["plot_benchmark"]

_COLORS = ("#1f6feb", "#9aa5b1", "#2da44e", "#bf8700")


def plot_benchmark(result: BenchmarkResult, path: str | os.PathLike[str]) -> Path:
    """Draw the latency of exported files: medians as bars with quartiles, a panel a batch size.

    Args:
        result: The times.
        path: The PNG file to write; its folder is made if needed.

    Returns:
        The file written.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    sizes = sorted({row.batch_size for row in result.rows})
    height = 1.2 + 0.45 * len(result.files) * len({row.num_threads for row in result.rows})
    figure = new_figure(1.5 + 4.5 * len(sizes), height)
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        _draw(result, size, axes)
    return save_figure(figure, path)


def _draw(result: BenchmarkResult, batch_size: int, axes: Any) -> None:
    rows = [row for row in result.rows if row.batch_size == batch_size]
    threads = sorted({row.num_threads for row in rows})
    names = [file.name for file in result.files if any(row.file == file.name for row in rows)]
    width = 0.8 / len(threads)
    for place, count in enumerate(threads):
        chosen = {row.file: row for row in rows if row.num_threads == count}
        shown = [(i, chosen[name]) for i, name in enumerate(names) if name in chosen]
        bars = axes.barh(
            [i + (place - (len(threads) - 1) / 2) * width for i, _ in shown],
            [row.median_ms for _, row in shown],
            width * 0.9,
            xerr=[
                [row.median_ms - row.p25_ms for _, row in shown],
                [row.p75_ms - row.median_ms for _, row in shown],
            ],
            color=_COLORS[place % len(_COLORS)],
            label=f"{count} thread{'s' if count > 1 else ''}",
        )
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(result.files) - 0.5, -0.5)
    axes.margins(x=0.15)
    axes.set_xlabel("ms a call; bars: medians, lines: quartiles")
    axes.set_title(f"batch {batch_size}", fontsize=10)
    axes.legend(fontsize=8, frameon=False)

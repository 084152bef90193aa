"""What is left of a model, and zeros layer by layer: the figures of a `CompressionReport`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lit_compress.measure.report import CompressionReport
from lit_compress.plotting.figure import new_figure, save_figure

__all__ = ["plot_report"]

_DENSE, _COMPRESSED = "#9aa5b1", "#1f6feb"
_MOST_LAYERS = 60


def plot_report(report: CompressionReport, path: str | os.PathLike[str]) -> list[Path]:
    """Draw a report in two figures: what is left of the model, and zeros layer by layer.

    Args:
        report: The report.
        path: A folder, made if needed, for ``summary.png`` and ``layers.png``; or a file name
            ``x.png``, which gives ``x-summary.png`` and ``x-layers.png``.

    Returns:
        The two files written.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    path = Path(path)
    folder, prefix = (path.parent, f"{path.stem}-") if path.suffix == ".png" else (path, "")
    return [
        save_figure(_summary(report), folder / f"{prefix}summary.png"),
        save_figure(_layers(report), folder / f"{prefix}layers.png"),
    ]


def _summary(report: CompressionReport) -> Any:
    """Left: compressed ÷ dense in per cent. Right: the metrics of both."""
    dense, compressed = report.dense, report.compressed
    metrics = [key for key in dense.metrics if key in compressed.metrics]
    figure = new_figure(10 if metrics else 6.5, 4)
    panels = figure.subplots(
        1, 2 if metrics else 1, squeeze=False, width_ratios=(3, 2)[: 1 + bool(metrics)]
    )
    _draw_what_is_left(report, panels[0][0])
    if metrics:
        _draw_metrics(report, metrics, panels[0][1])
    figure.suptitle(f"{dense.name} → {compressed.name}")
    return figure


def _draw_what_is_left(report: CompressionReport, axes: Any) -> None:
    kept = report.kept()
    bars = axes.barh(list(kept), [100 * share for share in kept.values()], color=_COMPRESSED)
    axes.bar_label(bars, fmt="%.3g %%", padding=3)
    axes.axvline(100, color=_DENSE, linewidth=2)
    axes.set_xlim(0, 118 * max(1.0, *kept.values()))
    axes.set_xlabel("compressed ÷ dense, % (line: dense)")
    axes.invert_yaxis()


def _draw_metrics(report: CompressionReport, metrics: list[str], axes: Any) -> None:
    positions = range(len(metrics))
    for offset, measures, color in (
        (-0.2, report.dense, _DENSE),
        (0.2, report.compressed, _COMPRESSED),
    ):
        heights = [measures.metrics[metric] for metric in metrics]
        bars = axes.bar([p + offset for p in positions], heights, 0.38, color=color)
        axes.bar_label(bars, fmt="%.4g", padding=2)
        bars.set_label(measures.name)
    axes.set_xticks(list(positions), metrics)
    axes.margins(y=0.25)
    axes.legend(loc="upper right", frameon=False, ncols=2)


def _layers(report: CompressionReport) -> Any:
    """Zeros in each layer's weights; of very many layers, those with the most weights."""
    layers = [layer for layer in report.compressed.layers if layer.sparsity is not None]
    largest = set(sorted(layers, key=lambda layer: -layer.num_weights)[:_MOST_LAYERS])
    shown = [layer for layer in layers if layer in largest]
    figure = new_figure(8, max(2.5, 1.2 + 0.2 * len(shown)))
    axes = figure.subplots()
    names = [f"{layer.name or '(itself)'}  [{layer.num_weights:,}]" for layer in shown]
    bars = axes.barh(names, [100 * (layer.sparsity or 0) for layer in shown], color=_COMPRESSED)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.set_xlim(0, 110)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("zeros in weights, %")
    axes.invert_yaxis()
    of = f" (the largest {len(shown)} of {len(layers)})" if len(shown) < len(layers) else ""
    total = report.compressed.sparsity
    overall = "" if total is None else f"; all together {100 * total:.2f} %"
    axes.set_title(f"{report.compressed.name}, layer by layer [weights]{of}{overall}", fontsize=10)
    return figure

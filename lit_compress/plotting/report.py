"""Pictures of a report; the only file that needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_compress.measure.report import CompressionReport

_DENSE, _COMPRESSED = "#9aa5b1", "#1f6feb"
_MOST_LAYERS = 60


def plot_report(report: CompressionReport, path: Path) -> list[Path]:
    """Write the pictures that `CompressionReport.plot` promises."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need the package matplotlib, which is not installed. Install it with "
            "pip install 'lit-compress[report]'."
        ) from error
    if path.suffix == ".png":
        folder, prefix = path.parent, f"{path.stem}-"
    else:
        folder, prefix = path, ""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in (("summary", _draw_summary), ("layers", _draw_layers)):
        figure = Figure(layout="constrained", dpi=120)
        FigureCanvasAgg(figure)  # draws without a display and without pyplot's global state
        draw(report, figure)
        written.append(folder / f"{prefix}{name}.png")
        figure.savefig(written[-1])
    return written


def _draw_summary(report: CompressionReport, figure: Any) -> None:
    """Left: compressed ÷ dense in per cent. Right: the metrics of both."""
    dense, compressed = report.dense, report.compressed
    metrics = [key for key in dense.metrics if key in compressed.metrics]
    figure.set_size_inches(10 if metrics else 6.5, 4)
    panels = figure.subplots(
        1, 2 if metrics else 1, squeeze=False, width_ratios=(3, 2)[: 1 + bool(metrics)]
    )
    _draw_what_is_left(report, panels[0][0])
    if metrics:
        _draw_metrics(report, metrics, panels[0][1])
    figure.suptitle(f"{dense.name} → {compressed.name}")


def _draw_what_is_left(report: CompressionReport, axes: Any) -> None:
    kept = report.kept()
    bars = axes.barh(list(kept), [100 * share for share in kept.values()], color=_COMPRESSED)
    axes.bar_label(bars, fmt="%.3g %%", padding=3)
    axes.axvline(100, color=_DENSE, linewidth=2)
    axes.set_xlim(0, 118 * max(1.0, *kept.values()))
    axes.set_xlabel("compressed ÷ dense, % (line: dense)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


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
    axes.spines[["top", "right"]].set_visible(False)


def _draw_layers(report: CompressionReport, figure: Any) -> None:
    """Zeros in each layer's weights; of very many layers, those with the most weights."""
    layers = [layer for layer in report.compressed.layers if layer.sparsity is not None]
    largest = set(sorted(layers, key=lambda layer: -layer.num_weights)[:_MOST_LAYERS])
    shown = [layer for layer in layers if layer in largest]
    figure.set_size_inches(8, max(2.5, 1.2 + 0.2 * len(shown)))
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
    axes.spines[["top", "right"]].set_visible(False)
    of = f" (the largest {len(shown)} of {len(layers)})" if len(shown) < len(layers) else ""
    total = report.compressed.sparsity
    overall = "" if total is None else f"; all together {100 * total:.2f} %"
    axes.set_title(f"{report.compressed.name}, layer by layer [weights]{of}{overall}", fontsize=10)

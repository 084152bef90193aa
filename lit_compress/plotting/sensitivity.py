"""Metrics against channels removed, a curve a group: the figure of a `SensitivityResult`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_compress.plotting.figure import new_figure, save_figure
from lit_compress.search.sensitivity_result import SensitivityResult

__all__ = ["plot_sensitivity"]

_MOST_NAMES = 24
_BASELINE = "#9aa5b1"


def plot_sensitivity(
    result: SensitivityResult,
    path: str | os.PathLike[str],
    metrics: Sequence[str] | None = None,
) -> Path:
    """Draw the curves of a sensitivity analysis: a panel a metric, without and with tuning.

    Args:
        result: The analysis, complete or as far as a run has come.
        path: The PNG file to write; its folder is made if needed.
        metrics: Names of the metrics to draw; by default all.

    Returns:
        The file written.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If a metric was not logged.
    """
    metrics = metrics or result.metrics
    for metric in metrics:
        result.check_metric(metric)
    ways = (False, True) if result.is_tuned else (False,)
    figure = new_figure(1.5 + 5 * len(metrics), 0.8 + 4 * len(ways))
    panels = figure.subplots(len(ways), len(metrics), squeeze=False, sharex=True, sharey="col")
    for row, tuned in zip(panels, ways, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            _draw(result, metric, tuned, axes)
    for axes in panels[-1]:
        axes.set_xlabel("channels removed from one group, %")
    _name_curves(result, figure, panels)
    return save_figure(figure, path)


def _draw(result: SensitivityResult, metric: str, tuned: bool, axes: Any) -> None:
    for group, color in zip(result.groups, _colors(len(result.groups)), strict=True):
        curve = result.curve(group.name, metric, tuned)
        label = f"{group.name} [{group.num_channels}]"
        percents = [100 * ratio for ratio in curve]
        axes.plot(percents, list(curve.values()), ".-", color=color, label=label, linewidth=1)
    axes.axhline(result.baseline.value(metric, tuned), color=_BASELINE, linewidth=1, zorder=0)
    axes.set_title(f"{metric}{' after tuning' if tuned else ''}", fontsize=10)
    axes.set_xlim(0, 100)


def _name_curves(result: SensitivityResult, figure: Any, panels: Any) -> None:
    """Names where they can be told apart, else the colours' order."""
    if len(result.groups) <= _MOST_NAMES:
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=7, frameon=False)
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    mappable = ScalarMappable(Normalize(1, len(result.groups)), "viridis")
    figure.colorbar(mappable, ax=panels, label="group, in forward order")


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](index / max(1, count - 1)) for index in range(count)]

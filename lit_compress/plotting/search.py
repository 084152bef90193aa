"""What a search kept, its rewards and its costs in three panels: the figure of a `SearchResult`."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_compress.plotting.figure import new_figure, save_figure
from lit_compress.search.search_result import Episode, SearchResult

__all__ = ["plot_search"]

_MOST_NAMES = 60
_DENSE = "#9aa5b1"
_COLORS = {
    "ddpg": "#1f6feb",
    "uniform": "#d1242f",
    "deep": "#1a7f37",
    "shallow": "#bf8700",
    "global": "#0e7c86",
    "random": "#8250df",
    "sensitivity": "#bc4c00",
}
_OTHERS = ("#57606a", "#a0337f", "#6e4b1f")
_BASELINES = ("uniform", "deep", "shallow", "global")
_LEGEND: dict[str, Any] = {"fontsize": 7, "framealpha": 0.8, "edgecolor": "none"}
_KEPT = {"channels": "channels kept, %", "sparsity": "weights kept, %", "bits": "bits"}


def plot_search(result: SearchResult, path: str | os.PathLike[str]) -> Path:
    """Draw a ratio search, after He et al. 2018 ("AMC", figures 2 and 3).

    Three panels: how much the winner and the baselines keep of each layer; the reward by episode;
    the metric against the budget's cost, or against the first cost where there is no budget.

    Args:
        result: The search; where no episode finished, the first panel says so.
        path: The PNG file to write; its folder is made if needed.

    Returns:
        The file written.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    width = min(max(11.0, 0.3 * len(result.decisions)), 22.0)
    figure = new_figure(width, 8)
    panels = figure.subplot_mosaic([["layers", "layers"], ["rewards", "scores"]])
    _draw_layers(result, panels["layers"])
    _draw_rewards(result, panels["rewards"])
    _draw_scores(result, panels["scores"])
    return save_figure(figure, path)


def _draw_layers(result: SearchResult, axes: Any) -> None:
    """The winner as bars, the best of each baseline as a line of steps."""
    positions = range(len(result.decisions))
    best = result.best_by_source()
    if result.best is not None:
        winner = result.best_episode
        label, color = f"the winner ({winner.source})", _colors(result)[winner.source]
        axes.bar(positions, _kept(result, winner), 0.7, color=color, alpha=0.75, label=label)
        for source in (s for s in _BASELINES if s in best and s != winner.source):
            heights = _kept(result, best[source])
            axes.step(positions, heights, ".-", where="mid", color=_COLORS[source], label=source)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    else:
        axes.text(0.5, 0.5, "no episode finished", ha="center", transform=axes.transAxes)
    if result.space == "bits":
        axes.set_ylim(0, 1.05 * max(decision.full for decision in result.decisions))
    else:
        axes.set_ylim(0, 105)
    axes.set_xlim(-0.6, len(result.decisions) - 0.4)
    axes.set_ylabel(_KEPT[result.space])
    if len(result.decisions) <= _MOST_NAMES:
        names = [decision.name for decision in result.decisions]
        axes.set_xticks(list(positions), names, rotation=90, fontsize=7)
    else:
        axes.set_xlabel("layer, in forward order")


def _draw_rewards(result: SearchResult, axes: Any) -> None:
    """The reward of each episode, those given up faint, and the best so far."""
    for source, color in _colors(result).items():
        episodes = [episode for episode in result.episodes if episode.source == source]
        xs = [episode.number for episode in episodes]
        _dots(axes, episodes, xs, [episode.reward for episode in episodes], source, color)
    numbers = [episode.number for episode in result.episodes]
    line = {"drawstyle": "steps-post", "color": "black", "linewidth": 1, "label": "best so far"}
    axes.plot(numbers, result.running_best(), **line)
    failed = [episode.number for episode in result.episodes if episode.failure is not None]
    if failed:
        marks = [0.01] * len(failed)  # at the lower edge: they have no reward
        bottom = axes.get_xaxis_transform()
        axes.plot(failed, marks, "x", color="black", transform=bottom, label="failed")
    axes.set_xlabel("episode (faint: given up early)")
    axes.set_ylabel(f"reward: {result.reward}")
    axes.legend(**_LEGEND)


def _draw_scores(result: SearchResult, axes: Any) -> None:
    """The metric against a cost; winner and best of each source marked, dense a line."""
    axes.axhline(result.dense_score, color=_DENSE, linewidth=1, label="dense", zorder=0)
    axes.set_ylabel(result.metric)
    cost = result.budget[0] if result.budget else next(iter(result.dense_costs), None)
    if cost is None:
        axes.set_xlabel("no cost was recorded")
        return
    best = result.best_by_source()
    for source, color in _colors(result).items():
        episodes = [episode for episode in result.episodes if episode.source == source]
        shares = [100 * result.cost_ratio(episode, cost) for episode in episodes]
        _dots(axes, episodes, shares, [episode.score for episode in episodes], None, color)
        if source in best and best[source].number != result.best:
            _mark(axes, 100 * result.cost_ratio(best[source], cost), best[source], source, color)
    if result.best is not None:
        winner = result.best_episode
        label, color = f"{winner.source}, the winner", _colors(result)[winner.source]
        _mark(axes, 100 * result.cost_ratio(winner, cost), winner, label, color, star=True)
    if result.budget is not None and result.dense_costs[cost]:
        limit = 100 * result.budget[1] / result.dense_costs[cost]
        axes.axvline(limit, color=_DENSE, linestyle=":", linewidth=1, label="budget", zorder=0)
    axes.set_xlabel(f"{cost}, % of the dense model")
    axes.legend(**_LEGEND)


def _dots(
    axes: Any,
    episodes: Sequence[Episode],
    xs: Sequence[float],
    ys: Sequence[float],
    label: str | None,
    color: str,
) -> None:
    """Points of one source: those that finished in full colour, those given up faint."""
    for finished in (True, False):
        drawn = [
            (x, y)
            for episode, x, y in zip(episodes, xs, ys, strict=True)
            if episode.finished == finished and math.isfinite(x) and math.isfinite(y)
        ]
        if drawn:
            alpha = 0.8 if finished else 0.2
            points = axes.scatter(*zip(*drawn, strict=True), s=9, color=color, alpha=alpha)
            points.set_label(label if finished else None)


def _mark(
    axes: Any, x: float, episode: Episode, label: str, color: str, star: bool = False
) -> None:
    """One episode that stands out among the dots."""
    shape = {"marker": "*", "markersize": 14} if star else {"marker": "D", "markersize": 7}
    line = {"linestyle": "none", "color": color, "markeredgecolor": "black", "label": label}
    axes.plot([x], [episode.score], **shape, **line)


def _kept(result: SearchResult, episode: Episode) -> list[float]:
    """Heights of the bars: per cent of the dense model, or bits."""
    if result.space == "bits":
        return list(result.values_of(episode).values())
    return [100 * ratio for ratio in result.preserve_ratios_of(episode).values()]


def _colors(result: SearchResult) -> dict[str, str]:
    """A colour for each source, the same in every picture for those that are known."""
    sources = dict.fromkeys(episode.source for episode in result.episodes)
    others = [source for source in sources if source not in _COLORS]
    mixed = {source: _OTHERS[i % len(_OTHERS)] for i, source in enumerate(others)}
    return {source: {**_COLORS, **mixed}[source] for source in sources}

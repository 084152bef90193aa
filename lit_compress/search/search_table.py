"""What a ratio search found, as text: the rows of its tables and all of them together."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lit_compress.measure.table import UNKNOWN, Quantity, aligned, count, megabytes, millions

if TYPE_CHECKING:
    from lit_compress.search.search_result import Episode, SearchResult

__all__ = ["decision_rows", "episode_rows", "search_table", "source_rows"]

_BAR = 20  # characters of a layer that is kept whole
_KEPT = {"channels": "kept", "sparsity": "density", "bits": "bits"}
_SHOWN: dict[str, Callable[[float], str]] = {
    "macs": millions,
    "num_params": count,
    "weights": count,
    "size_bytes": megabytes,
    "latency_ms": "{:,.3f} ms".format,
    "mean_bits": "{:.2f}".format,
}


def decision_rows(result: SearchResult) -> list[list[str]]:
    """The winner layer by layer: a header, then name, full, kept, preserve ratio and a bar.

    Raises:
        ValueError: If no episode finished.
    """
    values, ratios = result.values, result.preserve_ratios
    rows = [["layer", "full", _KEPT[result.space], "ratio", ""]]
    for decision in result.decisions:
        value, ratio = values[decision.name], ratios[decision.name]
        filled = max(1, round(_BAR * ratio))
        bar = "█" * filled + "░" * (_BAR - filled)
        rows.append([decision.name, f"{decision.full:g}", f"{value:.4g}", f"{ratio:.1%}", bar])
    return rows


def episode_rows(result: SearchResult) -> list[list[str | int | float | bool | None]]:
    """All episodes as numbers, for a table that is sorted and drawn elsewhere.

    Columns are episode, source, metric, reward, whether it was evaluated to its end, and every cost
    relative to the dense model's; the dense model is the row with the source ``"dense"``. What is
    not known is ``None``.
    """
    costs = list(result.dense_costs)
    header = ["episode", "source", result.metric, "reward", "complete"]
    rows: list[list[str | int | float | bool | None]] = [
        [*header, *(f"{cost}_ratio" for cost in costs)],
        [None, "dense", _known(result.dense_score), None, True, *(1.0 for _ in costs)],
    ]
    for episode in result.episodes:
        numbers = (_known(episode.score), _known(episode.reward), episode.complete)
        ratios = (_known(result.cost_ratio(episode, cost)) for cost in costs)
        rows.append([episode.number, episode.source, *numbers, *ratios])
    return rows


def source_rows(result: SearchResult) -> list[list[str]]:
    """The best of each source by falling reward: a header, the dense model, then a row each.

    Columns are source, episode, metric, reward, and every cost relative to the dense model's.
    """
    costs = list(result.dense_costs)
    rows = [["source", "episode", result.metric, "reward", *costs]]
    whole = [f"{1:.1%}" for _ in costs]
    rows.append(["dense", UNKNOWN, f"{result.dense_score:.4f}", UNKNOWN, *whole])
    for source, episode in result.best_by_source().items():
        ratios = [result.cost_ratio(episode, cost) for cost in costs]
        shares = [UNKNOWN if math.isnan(ratio) else f"{ratio:.1%}" for ratio in ratios]
        numbers = (str(episode.number), f"{episode.score:.4f}", f"{episode.reward:.4f}")
        rows.append([source, *numbers, *shares])
    return rows


def search_table(result: SearchResult) -> str:
    """The text that `SearchResult.table` promises."""
    if result.best is None:
        return f"search of {result.space}: no episode finished\n{_counts(result)}"
    best = result.best_episode
    heading = (
        f"{result.metric} {result.dense_score:.4f} → {best.score:.4f} "
        f"({best.score - result.dense_score:+.4f}), found by {best.source} in episode {best.number}"
    )
    costs = [
        Quantity(name, dense, best.costs.get(name), _show(name)).row()
        for name, dense in result.dense_costs.items()
    ]
    layers, sources = decision_rows(result), source_rows(result)
    parts = [
        [heading, _budget(result, best), _counts(result)],
        aligned(("cost", "dense", "best", "ratio"), costs),
        aligned(layers[0], layers[1:]),
        ["the best reward of each source", *aligned(sources[0], sources[1:])],
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _budget(result: SearchResult, best: Episode) -> str:
    if result.budget is None:
        return f"no budget; reward: {result.reward}"
    cost, limit = result.budget
    used, show = best.costs.get(cost, math.nan), _show(cost)
    return (
        f"budget: {cost} {show(used)} of at most {show(limit)}, {used / limit:.1%} used; "
        f"reward: {result.reward}"
    )


def _counts(result: SearchResult) -> str:
    number = len(result.episodes)
    return (
        f"{number} episode{'' if number == 1 else 's'}, {result.num_failed} failed, "
        f"{result.num_given_up} given up early, {result.cpu_seconds:,.1f} s of CPU time"
    )


def _known(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _show(cost: str) -> Callable[[float], str]:
    return _SHOWN.get(cost, "{:,.6g}".format)

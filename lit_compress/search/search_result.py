"""The result of a ratio search: its episodes and the best of them, as data and as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.measure.table import UNKNOWN, Quantity, aligned, count, megabytes, millions
from lit_compress.plain import SavedAsJSON
from lit_compress.search.evaluation import Mode
from lit_compress.search.problem import Decision, chosen_levels

__all__ = ["Episode", "SearchResult", "Space", "decision_rows", "episode_rows", "source_rows"]

Space = Literal["channels", "sparsity", "bits"]

_FOUND: dict[Space, str] = {"channels": "plan", "sparsity": "sparsities", "bits": "layer_bits"}
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


@dataclass(frozen=True)
class Episode:
    """One candidate of a search and how it did.

    Attributes:
        number: From 0, in the order of the search.
        source: Who proposed it: ``"uniform"``, ``"shallow"``, ``"deep"``, ``"global"``,
            ``"random"``, ``"sensitivity"``, ``"ddpg"``.
        choice: The index of the level of each decision.
        score: The user's metric; NaN where evaluation failed.
        reward: What the search maximises; NaN where evaluation failed.
        costs: What the candidate costs, by name, absolute.
        complete: Whether it was evaluated on all examples. Where it was given up early, the score
            is from a part of them and not to be compared.
        failure: Why evaluation failed, or ``None``.
        seconds: CPU seconds that it took.
    """

    number: int
    source: str
    choice: tuple[int, ...]
    score: float
    reward: float
    costs: Mapping[str, float]
    complete: bool
    failure: str | None
    seconds: float

    @property
    def finished(self) -> bool:
        """Whether it can win: evaluated on all examples, without failure, the reward a number."""
        return self.complete and self.failure is None and not math.isnan(self.reward)


@dataclass(frozen=True)
class SearchResult(SavedAsJSON):
    """The episodes of a ratio search and the best of them, complete or as far as a run has come.

    ``print(result)`` shows what was found, layer by layer, and the best of each source.

    Attributes:
        space: What was searched: channels kept, densities of weights, or bits.
        decisions: One for each layer or group of coupled layers, in forward order.
        metric: Name of the user's metric.
        mode: ``"max"`` where more of the metric is better, ``"min"`` where less is.
        dense_score: The metric of the dense model, on the same examples.
        dense_costs: What the dense model costs, by name, absolute.
        budget: The name of a cost and its absolute limit, or ``None``.
        reward: What was maximised, in words: ``"score"``, ``"error_log_macs"``.
        episodes: In the order of the search, their numbers rising.
        best: The number of the winning episode, which is a finished one; ``None`` if none is.
        setting: What the result depends on, in words: seed, digest of the weights, data.

    Raises:
        ValueError: If these contradict each other.
    """

    space: Space
    decisions: tuple[Decision, ...]
    metric: str
    mode: Mode
    dense_score: float
    dense_costs: Mapping[str, float]
    budget: tuple[str, float] | None
    reward: str
    episodes: tuple[Episode, ...]
    best: int | None
    setting: Mapping[str, str]

    json_format: ClassVar[str] = "lit-compress ratio search 1"
    json_name: ClassVar[str] = "the result of a ratio search"

    def __post_init__(self) -> None:
        for what, word, known in (("space", self.space, Space), ("mode", self.mode, Mode)):
            if word not in get_args(known):
                raise ValueError(
                    f"{what} is {word!r}; expected {' or '.join(map(repr, get_args(known)))}."
                )
        if self.budget is not None and self.budget[0] not in self.dense_costs:
            raise ValueError(
                f"the budget is on {self.budget[0]!r}, which is not among the dense model's costs; "
                f"these are {', '.join(map(repr, self.dense_costs)) or 'none'}."
            )
        before = -1
        for episode in self.episodes:
            self._check_episode(episode, before)
            before = episode.number
        winner = next((e for e in self.episodes if e.number == self.best), None)
        if self.best is not None and (winner is None or not winner.finished):
            raise ValueError(
                f"the best episode is said to be number {self.best}, which "
                f"{'is not there' if winner is None else 'was not evaluated to its end'}; expected "
                "the number of an episode that finished, or None."
            )

    # --- The winner -------------------------------------------------------------------------------

    @property
    def best_episode(self) -> Episode:
        """The winning episode.

        Raises:
            ValueError: If no episode finished; ``best`` is ``None`` then.
        """
        for episode in self.episodes:
            if episode.number == self.best:
                return episode
        failures = [e.failure for e in self.episodes if e.failure is not None]
        reason = f" The last failure: {failures[-1]}" if failures else ""
        raise ValueError(
            f"none of {len(self.episodes)} episodes finished ({self.num_failed} failed, "
            f"{self.num_given_up} were given up early), so there is no best one; let the search "
            f"run longer, or fix what fails.{reason}"
        )

    @property
    def values(self) -> dict[str, float]:
        """The winner's level of each decision, by name: channels kept, density, or bits."""
        return self.values_of(self.best_episode)

    @property
    def preserve_ratios(self) -> dict[str, float]:
        """The winner's levels ÷ those of the dense model, in (0, 1], by name."""
        return self.preserve_ratios_of(self.best_episode)

    @property
    def plan(self) -> ChannelPlan:
        """The winner's channels, for ``ChannelPruning(plan=...)``.

        Raises:
            ValueError: If other things than channels were searched, or no episode finished.
        """
        self._check_space("channels")
        kept = {name: round(value) for name, value in self.values.items()}
        return ChannelPlan(kept, {d.name: round(d.full) for d in self.decisions})

    @property
    def sparsities(self) -> dict[str, float]:
        """The winner's zeros ÷ weights of each layer, in [0, 1).

        Raises:
            ValueError: If other things than sparsity were searched, or no episode finished.
        """
        self._check_space("sparsity")
        return {name: 1 - density for name, density in self.values.items()}

    @property
    def layer_bits(self) -> dict[str, int]:
        """The winner's bits of each layer's weights.

        Raises:
            ValueError: If other things than bits were searched, or no episode finished.
        """
        self._check_space("bits")
        return {name: round(bits) for name, bits in self.values.items()}

    # --- All episodes -----------------------------------------------------------------------------

    def values_of(self, episode: Episode) -> dict[str, float]:
        """An episode's level of each decision, by name."""
        return chosen_levels(self.decisions, episode.choice)

    def preserve_ratios_of(self, episode: Episode) -> dict[str, float]:
        """An episode's levels ÷ those of the dense model, in (0, 1], by name."""
        values = self.values_of(episode)
        return {decision.name: values[decision.name] / decision.full for decision in self.decisions}

    def cost_ratio(self, episode: Episode, cost: str) -> float:
        """What an episode costs ÷ what the dense model does; NaN where either is unknown."""
        dense = self.dense_costs.get(cost)
        return episode.costs.get(cost, math.nan) / dense if dense else math.nan

    def best_by_source(self) -> dict[str, Episode]:
        """The finished episode with the best reward of each source, by falling reward."""
        best: dict[str, Episode] = {}
        for episode in self.episodes:
            known = best.get(episode.source)
            if episode.finished and (known is None or episode.reward > known.reward):
                best[episode.source] = episode
        return dict(sorted(best.items(), key=lambda item: -item[1].reward))

    def running_best(self) -> tuple[float, ...]:
        """The best reward of finished episodes up to each episode; NaN before the first."""
        best, running = math.nan, []
        for episode in self.episodes:
            if episode.finished and not best >= episode.reward:
                best = episode.reward
            running.append(best)
        return tuple(running)

    @property
    def num_failed(self) -> int:
        """Episodes whose evaluation failed."""
        return sum(episode.failure is not None for episode in self.episodes)

    @property
    def num_given_up(self) -> int:
        """Episodes that were stopped early because they could not win any more."""
        return sum(not e.complete and e.failure is None for e in self.episodes)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all episodes."""
        return sum(episode.seconds for episode in self.episodes)

    # --- As text ----------------------------------------------------------------------------------

    def table(self) -> str:
        """The winner and its costs, its layers, and the best of each source, as text.

        Where no episode finished, the text says so.
        """
        return _table(self)

    def __str__(self) -> str:
        return self.table()

    # --- Inside -----------------------------------------------------------------------------------

    def _check_space(self, space: Space) -> None:
        if self.space != space:
            raise ValueError(
                f"this search was over {self.space}, so it found no {_FOUND[space]}; ask for "
                f"{_FOUND[self.space]}."
            )

    def _check_episode(self, episode: Episode, before: int) -> None:
        if episode.number <= before:
            raise ValueError(
                f"episode {episode.number} comes after episode {before}; expected rising numbers "
                "from 0."
            )
        if len(episode.choice) != len(self.decisions):
            raise ValueError(
                f"episode {episode.number} chooses {len(episode.choice)} levels, expected "
                f"{len(self.decisions)}, one for each decision."
            )
        for decision, index in zip(self.decisions, episode.choice, strict=True):
            if not 0 <= index < len(decision.levels):
                raise ValueError(
                    f"episode {episode.number} chooses level {index} of {decision.name!r}, "
                    f"expected 0 to {len(decision.levels) - 1}."
                )


# --- As text --------------------------------------------------------------------------------------


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


def _table(result: SearchResult) -> str:
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

"""Reward functions, and which episode wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias

from lit_compress.search.evaluation import Mode
from lit_compress.search.search_result import Episode

__all__ = ["Reward", "RewardFunction", "RewardKind", "best_episode", "reward_function"]

RewardKind: TypeAlias = Literal["score", "error_log_macs", "error_log_params"]
RewardFunction: TypeAlias = Callable[[float, Mapping[str, float]], float]
"""The reward for a score and the costs by name; higher is better."""
Reward: TypeAlias = RewardKind | RewardFunction

_LOG_COSTS = {"error_log_macs": "macs", "error_log_params": "num_params"}


def reward_function(reward: Reward, mode: Mode = "max") -> RewardFunction:
    """The reward of an episode (He et al. 2018, "AMC", section 3.3).

    Args:
        reward: ``"score"``: the metric (minus it for mode ``"min"``), which wants a budget.
            ``"error_log_macs"``: ``-(1 - metric) * ln(macs)``, which finds a smaller model at the
            same error and is used without a budget; ``"error_log_params"`` likewise. Or a function
            of metric and costs.
        mode: Whether more of the metric is better.

    Raises:
        ValueError: If the reward is unknown, or needs an accuracy and the mode is ``"min"``.
    """
    if callable(reward):
        return reward
    if reward == "score":
        sign = 1.0 if mode == "max" else -1.0
        return lambda score, costs: sign * score
    if reward not in _LOG_COSTS:
        known = ", ".join(map(repr, ("score", *_LOG_COSTS)))
        raise ValueError(f"reward is {reward!r}; expected one of {known}, or a function.")
    if mode == "min":
        raise ValueError(
            f"reward {reward!r} is minus the error times a logarithm, and the error is 1 - metric: "
            "it needs a metric in [0, 1] of which more is better, such as an accuracy."
        )
    cost = _LOG_COSTS[reward]

    def error_log_cost(score: float, costs: Mapping[str, float]) -> float:
        if not 0 <= score <= 1:
            raise ValueError(
                f"reward {reward!r} needs a metric in [0, 1], and it came as {score}; give the "
                "name of an accuracy, or a function as the reward."
            )
        return -(1 - score) * math.log(costs[cost])

    return error_log_cost


def best_episode(
    episodes: Sequence[Episode],
    *,
    tolerance: float | None = None,
    dense_score: float = math.nan,
    mode: Mode = "max",
    cost: str = "macs",
) -> int | None:
    """The number of the episode that wins, among those that were evaluated to their end.

    Args:
        episodes: All of them.
        tolerance: Loss of metric that is accepted: then the cheapest episode within it wins, and
            the best reward only where there is none. ``None``: the best reward wins.
        dense_score: The metric of the dense model, for the tolerance.
        mode: Whether more of the metric is better.
        cost: What cheap means.

    Returns:
        The first of equals; ``None`` if no episode finished.
    """
    finished = [episode for episode in episodes if episode.finished]
    if not finished:
        return None
    if tolerance is not None:
        sign = 1.0 if mode == "max" else -1.0
        near = [e for e in finished if sign * (dense_score - e.score) <= tolerance]
        if near:
            return min(near, key=lambda e: (e.costs[cost], -e.reward, e.number)).number
    return max(finished, key=lambda e: (e.reward, -e.number)).number

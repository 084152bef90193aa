"""What the ratio search study is judged by, from its JSON alone.

The bars come from the original AMC code, run on the same MobileNet-v1 (0.5), the same data and the
same budget on one core: see :data:`ORIGINAL`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

SEEDS = (1, 2, 3)
CASES = (("mobilenet_v1", 0.5), ("mobilenet_v1", 0.35), ("plain20", 0.5))
"""Networks, and their MACs kept ÷ dense."""
TUNED_CASES = (("mobilenet_v1", 0.5), ("plain20", 0.5))
SPARSITIES = (0.8, 0.9, 0.95)
RULES = ("uniform", "shallow", "deep")

ORIGINAL = {
    "dense_score": 0.9096,
    "best_score": 0.9044,
    "cost_ratio": 0.503,
    "cpu_seconds_per_episode": 5.0,
    "uniform": 0.8604,
    "shallow": 0.8784,
    "deep": 0.9042,
}
"""The authors' code: MobileNet-v1 (0.5) at half of the MACs, seed 1, 300 episodes."""

LEAD_OVER_UNIFORM = 0.04
_ROUNDING = 1e-9

Sense = Literal["at least", "at most"]


@dataclass(frozen=True)
class Bar:
    """One thing that has to hold.

    Attributes:
        what: In words.
        value: What was measured; NaN where it was not.
        sense: Whether more or less is better.
        limit: What is asked for; NaN where it depends on something that was not measured.
        digits: Of the numbers when they are shown.
    """

    what: str
    value: float
    sense: Sense
    limit: float
    digits: int = 4

    @property
    def holds(self) -> bool:
        """Whether it does; not, where something was not measured."""
        if self.sense == "at least":
            return self.value >= self.limit - _ROUNDING
        return self.value <= self.limit + _ROUNDING

    @property
    def verdict(self) -> str:
        """``"held"``, ``"missed"`` or ``"not measured"``."""
        if math.isnan(self.value) or math.isnan(self.limit):
            return "not measured"
        return "held" if self.holds else "missed"

    def __str__(self) -> str:
        numbers = f"{self.value:.{self.digits}f} ({self.sense} {self.limit:.{self.digits}f})"
        return f"{self.verdict:12} {self.what}: {numbers}"


def bars(results: dict[str, Any]) -> list[Bar]:
    """All bars of the study.

    Args:
        results: Of the study, complete or not.
    """
    found = [bar for case in CASES for seed in SEEDS for bar in search_bars(results, *case, seed)]
    found += [tuning_bar(results, *case) for case in TUNED_CASES]
    return found + [bar for level in SPARSITIES for bar in sparsity_bars(results, level)]


# --- The searches ---------------------------------------------------------------------------------


def search_of(
    results: dict[str, Any], model: str, space: str, target: float, method: str, seed: int
) -> dict[str, Any] | None:
    """One search; ``None`` where it was not run."""
    wanted = {"model": model, "space": space, "target": target, "method": method, "seed": seed}
    return next((s for s in results["searches"] if wanted.items() <= s.items()), None)


def channel_search(
    results: dict[str, Any], model: str, target: float, method: str, seed: int
) -> dict[str, Any] | None:
    """One search for channels; ``None`` where it was not run."""
    return search_of(results, model, "channels", target, method, seed)


def rule_score(results: dict[str, Any], model: str, target: float, rule: str) -> float:
    """The best score of a heuristic, each of its choices scored to the end; NaN if unknown."""
    search = channel_search(results, model, target, "rules", 1)
    best = {} if search is None else search["best_by_source"]
    return float(best[rule]["score"]) if rule in best else math.nan


def search_bars(results: dict[str, Any], model: str, target: float, seed: int) -> list[Bar]:
    """What one search for channels is held to."""
    search = channel_search(results, model, target, "ddpg", seed)
    known = search or {}
    score, ratio = (known.get(name, math.nan) for name in ("best_score", "cost_ratio"))
    case = f"{model} at {target:g}, seed {seed}"
    rules = {rule: rule_score(results, model, target, rule) for rule in RULES}
    found = [Bar(f"{case}: MACs kept / dense", ratio, "at most", target)]
    if (model, target) == ("mobilenet_v1", 0.5):
        found.append(
            Bar(f"{case}: best reward, the original's", score, "at least", ORIGINAL["best_score"])
        )
    lead = LEAD_OVER_UNIFORM if model == "mobilenet_v1" else 0.0
    asked = f"uniform + {lead:g}" if lead else "uniform"
    found.append(Bar(f"{case}: best reward, {asked}", score, "at least", rules["uniform"] + lead))
    found += [
        Bar(f"{case}: best reward, best {rule}", score, "at least", rules[rule])
        for rule in ("shallow", "deep")
    ]
    return found


# --- The training runs ----------------------------------------------------------------------------


def top1s(runs: Sequence[dict[str, Any]], what: str = "test_top1", **wanted: Any) -> list[float]:
    """Top-1 in percent of the runs that are as wanted."""
    return [100 * run[what] for run in runs if wanted.items() <= run.items()]


def mean_of_seeds(values: Sequence[float]) -> float:
    """NaN unless there is one for each seed."""
    return mean(values) if len(values) == len(SEEDS) else math.nan


def tuning_bar(results: dict[str, Any], model: str, target: float) -> Bar:
    """After tuning, what was searched is no worse than uniform, on the mean of the seeds."""
    searched, uniform = (
        mean_of_seeds(top1s(results["tuned"], model=model, target=target, method=method))
        for method in ("searched", "uniform")
    )
    what = f"{model} at {target:g}, tuned: mean test top-1 of searched, uniform"
    return Bar(what, searched, "at least", uniform, 2)


def sparse_means(results: dict[str, Any], level: float) -> dict[str, float]:
    """Means over the seeds of the runs at one level, by method; NaN where some are missing."""
    return {
        method: mean_of_seeds(top1s(results["sparse"], target=level, method=method))
        for method in ("searched+distillation", "uniform+distillation", "uniform")
    }


def sparsity_bars(results: dict[str, Any], level: float) -> tuple[Bar, Bar]:
    """Searched with distillation, at least uniform with distillation, at least uniform."""
    means = sparse_means(results, level)
    case = f"resnet20 at {100 * level:g} % zeros: mean test top-1 of"
    searched, distilled, alone = means.values()
    return (
        Bar(
            f"{case} searched + distillation, uniform + distillation",
            searched,
            "at least",
            distilled,
            2,
        ),
        Bar(f"{case} uniform + distillation, uniform", distilled, "at least", alone, 2),
    )

"""The searches of the ratio search study: each is one ``Trainer.fit`` that only searches.

Methods of a search:

- ``ddpg``: ``RatioSearch`` as it comes: heuristics, random choices, then the agent;
- ``rules``: the heuristics alone (uniform, shallow, deep), each scored on all images, because
  a race gives up those that are far behind: what the others are compared with;
- ``random``, ``sensitivity``: random shapes, and ratios derived from what each group alone does to
  the score, each as large as the budget allows;
- ``agent alone``: the agent as in AMC, without heuristics and without trying around the best;
- ``tries alone``: ``ddpg`` without the agent: heuristics, random choices, then only tries
  around the best.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from ratio_search_bars import CASES, SEEDS, SPARSITIES
from sparsity_distillation import quiet_trainer

from lit_compress.callbacks.search.ratio_search import RatioSearch
from lit_compress.search.problem import RatioProblem
from lit_compress.search.search_result import Episode, SearchResult
from lit_compress.search.searchers import DDPGSearcher, Proposal, Searcher
from lit_compress.search.settings import CandidateSettings, ScoringSettings
from lit_compress.tasks import CIFAR10JPEGDataModule, ImageClassifier

NUM_RULES = 43  # uniform, and 21 each of shallow and deep
NO_RACE = ("rules", "sensitivity")
ABLATIONS = (
    ("random", 1),
    ("sensitivity", 1),
    ("agent alone", 1),
    *(("tries alone", seed) for seed in SEEDS),
)
"""Methods and seeds, of MobileNet-v1 at half of the MACs."""
WEIGHTS = {
    "mobilenet_v1": "mobilenetv1-0.5-cifar10-jpeg",
    "plain20": "plain20-cifar10-jpeg",
    "resnet20": "resnet20-cifar10-jpeg",
}
ROUND_TO = {"mobilenet_v1": 8, "plain20": 1}
"""Channels kept are multiples of it. Plain-20 is 16 wide: multiples of 8 make no uniform ratio."""


@dataclass(frozen=True)
class Settings:
    """What all searches share."""

    num_episodes: int = 300
    num_sparsity_episodes: int = 200
    val_per_class: int = 500
    data_seed: int = 1
    batch_size: int = 128
    round_to: dict[str, int] = field(default_factory=lambda: dict(ROUND_TO))


@dataclass(frozen=True)
class Search:
    """One search.

    Attributes:
        model: The network's name.
        space: ``"channels"`` or ``"sparsity"``.
        target: MACs kept ÷ dense, or zeros ÷ weights.
        method: How; see above.
        seed: Of the search. All searches score on the same images.
    """

    model: str
    space: str
    target: float
    method: str
    seed: int


def channel_searches() -> list[Search]:
    """The searches for channels, the most important first."""
    return [
        *(Search(model, "channels", target, "rules", 1) for model, target in CASES),
        *(Search(m, "channels", t, "ddpg", seed) for seed in SEEDS for m, t in CASES),
        *(Search(CASES[0][0], "channels", CASES[0][1], *ablation) for ablation in ABLATIONS),
    ]


def sparsity_searches() -> list[Search]:
    """The searches for the density of each layer's weights."""
    return [Search("resnet20", "sparsity", level, "ddpg", 1) for level in SPARSITIES]


def trained_module(model: str, lr: float = 0.02, weight_decay: float = 5e-4) -> ImageClassifier:
    """A trained network of the study."""
    return ImageClassifier(
        model,
        model_args={"width": 0.5} if model == "mobilenet_v1" else None,
        weights=WEIGHTS[model],
        lr=lr,
        weight_decay=weight_decay,
    )


class AgentAlone(RatioSearch):
    """The agent with nothing to begin from but random choices."""

    def _make_searcher(self, problem: RatioProblem, *_: Any) -> Searcher:
        starts = min(self.agent.learning_starts, self.num_episodes // 3)
        settings = replace(self.agent, learning_starts=starts)
        return DDPGSearcher(problem, settings, self.seed, elite_share=0.0)


class TriesAlone(RatioSearch):
    """The search as it comes, but no episode is the agent's, which has too few steps to learn."""

    def _make_searcher(self, problem: RatioProblem, rules: list[Proposal], *_: Any) -> DDPGSearcher:
        starts = min(self.agent.learning_starts, self.num_episodes // 3)
        never = self.num_episodes * len(problem.decisions) + 1
        settings = replace(self.agent, learning_starts=starts, batch_size=never, buffer_size=never)
        return DDPGSearcher(problem, settings, self.seed, rules[: max(starts, 1)], elite_share=1.0)


ALONE = {"agent alone": AgentAlone, "tries alone": TriesAlone}


def callback(point: Search, settings: Settings, folder: str) -> RatioSearch:
    """The callback under test; it writes its files to ``folder``."""
    in_channels = point.space == "channels"
    num_episodes = settings.num_episodes if in_channels else settings.num_sparsity_episodes
    return ALONE.get(point.method, RatioSearch)(
        point.space,  # type: ignore[arg-type]
        target_macs_ratio=point.target if in_channels else None,
        final_sparsity=None if in_channels else point.target,
        metric="val_top1",
        mode="max",
        num_episodes=NUM_RULES if point.method == "rules" else num_episodes,
        searcher="ddpg" if point.method in ALONE else point.method,  # type: ignore[arg-type]
        candidates=CandidateSettings(round_to=settings.round_to.get(point.model, 1)),
        scoring=ScoringSettings(
            split="val",
            num_examples=10 * settings.val_per_class,
            race=point.method not in NO_RACE,
        ),
        folder=folder,
        seed=point.seed,
    )


def search_data(settings: Settings) -> CIFAR10JPEGDataModule:
    """Training images without augmentation; those to score on are held out of them."""
    data = CIFAR10JPEGDataModule(
        batch_size=settings.batch_size,
        val_per_class=settings.val_per_class,
        augmentation=None,
        seed=settings.data_seed,
    )
    data.setup()
    return data


def searched(
    module: pl.LightningModule, data: pl.LightningDataModule, chosen: RatioSearch
) -> tuple[SearchResult, float]:
    """Search, and nothing else.

    Returns:
        The result, and the CPU seconds of the whole fit: finding the channels, calibration, every
        evaluation, and the agent.
    """
    trainer = quiet_trainer(0, [chosen])
    began = time.process_time()
    trainer.fit(module, data)
    seconds = time.process_time() - began
    assert chosen.result is not None, "the fit ran no search"
    return chosen.result, seconds


def run(point: Search, settings: Settings) -> dict[str, Any]:
    """One search of the study, as plain data."""
    pl.seed_everything(point.seed, verbose=False)
    module = trained_module(point.model)
    data = search_data(settings)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result, cpu_seconds = searched(module, data, callback(point, settings, folder))
    wall_seconds = round(time.perf_counter() - began, 1)
    return vars(point) | compact(result, cpu_seconds) | {"wall_seconds": wall_seconds}


def compact(result: SearchResult, cpu_seconds: float) -> dict[str, Any]:
    """What of a search is kept: the winner, the best of each source, and every reward.

    Args:
        result: Of a search with a budget.
        cpu_seconds: Of the whole search.
    """
    best = result.best_episode
    return {
        "dense_score": _rounded(result.dense_score),
        "best_score": _rounded(best.score),
        "best_episode": best.number,
        "best_source": best.source,
        "cost_ratio": cost_ratio(result, best),
        "found": result.values,
        "full": {decision.name: decision.full for decision in result.decisions},
        "best_by_source": {
            source: {
                "score": _rounded(episode.score),
                "episode": episode.number,
                "cost_ratio": cost_ratio(result, episode),
                "found": list(result.values_of(episode).values()),
            }
            for source, episode in result.best_by_source().items()
        },
        "num_by_source": _counts([episode.source for episode in result.episodes]),
        "num_given_up": result.num_given_up,
        "num_failed": result.num_failed,
        "num_episodes": len(result.episodes),
        "cpu_seconds": _rounded(cpu_seconds, 1),
        "cpu_seconds_per_episode": _rounded(cpu_seconds / len(result.episodes), 3),
        "rewards": [_rounded(episode.reward) for episode in result.episodes],
    }


def cost_ratio(result: SearchResult, episode: Episode) -> float:
    """What an episode costs ÷ what the dense network does, of the cost that the budget is on."""
    assert result.budget is not None, "every search of the study has a budget"
    return result.cost_ratio(episode, result.budget[0])


def _rounded(value: float, digits: int = 6) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else round(value, digits)


def _counts(words: list[str]) -> dict[str, int]:
    return {word: words.count(word) for word in dict.fromkeys(words)}


# --- What must hold for every search --------------------------------------------------------------


def weights_of(module: pl.LightningModule) -> dict[str, torch.Tensor]:
    """A copy of everything that a module's checkpoint would hold."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def broken_invariants(
    result: SearchResult, before: dict[str, torch.Tensor], module: pl.LightningModule
) -> list[str]:
    """What does not hold after a search.

    Args:
        result: Of a search with a budget.
        before: :func:`weights_of` the module before it.
        module: The module after it.
    """
    assert result.budget is not None
    cost, limit = result.budget
    broken = [
        f"episode {episode.number} costs {episode.costs[cost]:.6g} {cost} of {limit:.6g}"
        for episode in result.episodes
        if episode.costs[cost] > limit * (1 + 1e-9)
    ]
    winner = result.best_episode
    broken += [
        f"the best reward, {winner.reward:.4f}, is below {source}'s {episode.reward:.4f}"
        for source, episode in result.best_by_source().items()
        if episode.reward > winner.reward
    ]
    after = module.state_dict()
    if before.keys() != after.keys():
        broken.append("the module has other tensors after the search")
    broken += [
        f"{name} was changed by the search"
        for name, value in before.items()
        if name in after and not torch.equal(value, after[name])
    ]
    return broken

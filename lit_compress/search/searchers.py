"""Searchers by ask and tell: heuristics, random search, sensitivities, DDPG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_compress.search.ddpg import DDPGAgent, DDPGSettings, truncated_normal
from lit_compress.search.environment import num_features, transitions, walk
from lit_compress.search.evaluation import Evaluation, Mode
from lit_compress.search.problem import Choice, RatioProblem

__all__ = [
    "DDPGSearcher",
    "Proposal",
    "RandomSearcher",
    "RulesSearcher",
    "Searcher",
    "ranking",
    "rules_of_thumb",
    "sensitivity_proposals",
    "sensitivity_shape",
]

_LEAST_RATIO = 0.2
_LEAST_NOISE = 0.02
_ATTEMPTS = 10
_NOISE_GROWTH = 1.5


@dataclass(frozen=True)
class Proposal:
    """A choice to try.

    Attributes:
        choice: The choice.
        source: Who it comes from.
    """

    choice: Choice
    source: str


class Searcher(Protocol):
    """Proposes choices and learns from what they were worth."""

    def ask(self) -> Proposal:
        """The next choice to try."""

    def tell(self, proposal: Proposal, reward: float) -> None:
        """What it was worth; no finite number where it could not be evaluated."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next proposals depend on."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`, exactly."""


def rules_of_thumb(
    problem: RatioProblem, num_each: int = 21, worth: Sequence[Tensor] | None = None
) -> list[Proposal]:
    """The policies that AMC is compared with (He et al. 2018, figures 2 and 3), and a ranking.

    Args:
        problem: The problem.
        num_each: Shallow and deep policies each, at least 0.
        worth: For each decision what every part of it is worth, any shape, where that compares
            over decisions.

    Returns:
        ``"uniform"``: one ratio for all. ``"deep"``: ratios fall from the first decision to the
        last along straight lines of rising steepness, the last of which ends at 0. ``"shallow"``:
        the same the other way round. ``"global"``, where ``worth`` is given: each decision keeps
        its share of what is worth most in all of them. Each as large as the budget allows;
        duplicates dropped.
    """
    count = len(problem.decisions)
    proposals = [Proposal(problem.scaled([1.0] * count), "uniform")]
    if worth is not None:
        proposals.append(Proposal(problem.along(ranking(worth)), "global"))
    for index in range(num_each):
        steepness = (index + 1) / num_each
        falling = [1 - steepness * step / max(count - 1, 1) for step in range(count)]
        proposals.append(Proposal(problem.scaled(falling), "deep"))
        proposals.append(Proposal(problem.scaled(falling[::-1]), "shallow"))
    return list({(p.choice, p.source): p for p in proposals}.values())


def ranking(worth: Sequence[Tensor]) -> Callable[[float], list[float]]:
    """The path on which decisions keep what is worth most in all of them together.

    Args:
        worth: For each decision what every part of it is worth, of any shape, not empty.

    Returns:
        From a share of all parts, in [0, 1], to the share of each decision's own parts that are
        among them.

    Examples:
        >>> path = ranking([torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0, 4.0, 0.0])])
        >>> path(0.5)
        [0.5, 0.5]
    """
    rising = [values.detach().flatten().double().sort().values for values in worth]
    of_all = torch.cat(rising).sort().values

    def at(place: float) -> list[float]:
        kept = round(place * len(of_all))
        if kept == 0:
            return [0.0] * len(rising)
        least = of_all[len(of_all) - kept]
        return [1 - int(torch.searchsorted(own, least)) / len(own) for own in rising]

    return at


def sensitivity_shape(
    problem: RatioProblem, curves: Mapping[str, Mapping[float, float]], tolerance: float
) -> list[float]:
    """Ratios from what each decision alone does to the score.

    Args:
        problem: The problem.
        curves: For decisions by name, the loss of score (higher is worse) by preserve ratio, with
            only that one below 1.
        tolerance: What each decision alone may lose.

    Returns:
        For each decision the least ratio of its curve up to which no loss passes the tolerance; 1
        where it has none. :meth:`RatioProblem.scaled` makes a choice of it.
    """
    shape = []
    for decision in problem.decisions:
        ratio = 1.0
        for lower, loss in sorted(curves.get(decision.name, {}).items(), reverse=True):
            if loss > tolerance:
                break
            ratio = min(ratio, lower)
        shape.append(ratio)
    return shape


def sensitivity_proposals(
    problem: RatioProblem,
    probe: Callable[[Choice], Evaluation],
    mode: Mode = "max",
    num_points: int = 4,
    num_tolerances: int = 16,
) -> list[Proposal]:
    """Choices derived from what each decision alone does to the score.

    Args:
        problem: The problem.
        probe: Evaluates a choice that need not meet the budget.
        mode: Whether more of the metric is better.
        num_points: Levels tried of each decision, beside its highest.
        num_tolerances: Tolerances tried, at most: so many choices.

    Returns:
        For rising tolerances the ratios up to which each decision alone loses no more, as large as
        the budget allows; duplicates dropped.
    """
    sign = 1.0 if mode == "max" else -1.0
    highest = problem.highest
    dense = probe(highest).score
    curves: dict[str, dict[float, float]] = {}
    for step, decision in enumerate(problem.decisions):
        last = highest[step]
        for index in sorted({last * point // (num_points + 1) for point in range(num_points + 1)}):
            if index < last:
                worth = probe((*highest[:step], index, *highest[step + 1 :]))
                loss = math.inf if worth.failure else sign * (dense - worth.score)
                curves.setdefault(decision.name, {})[decision.ratios[index]] = loss
    losses = sorted({v for curve in curves.values() for v in curve.values() if v < math.inf})
    picked = losses[:: max(len(losses) // num_tolerances, 1)][:num_tolerances]
    shapes = [sensitivity_shape(problem, curves, tolerance) for tolerance in picked]
    choices = dict.fromkeys(problem.scaled(shape) for shape in shapes)
    return [Proposal(choice, "sensitivity") for choice in choices]


class RulesSearcher:
    """Proposals that were made beforehand, one after another and then from the first again.

    Args:
        proposals: At least one.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, proposals: Sequence[Proposal]) -> None:
        if not proposals:
            raise ValueError("there are no proposals; expected at least one.")
        self._proposals = tuple(proposals)
        self._asked = 0

    def ask(self) -> Proposal:
        """The next one."""
        self._asked += 1
        return self._proposals[(self._asked - 1) % len(self._proposals)]

    def tell(self, proposal: Proposal, reward: float) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        """How many were asked for."""
        return {"asked": self._asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._asked = state["asked"]


class RandomSearcher:
    """Random shapes, each as large as the budget allows.

    Args:
        problem: The problem.
        seed: Of its random numbers, which are its own.
    """

    def __init__(self, problem: RatioProblem, seed: int = 0) -> None:
        self._problem = problem
        self._generator = torch.Generator().manual_seed(seed)

    def ask(self) -> Proposal:
        """A choice whose ratios are in proportion to uniform numbers in [.2, 1]."""
        return Proposal(random_choice(self._problem, self._generator), "random")

    def tell(self, proposal: Proposal, reward: float) -> None:
        """Learns nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The state of its random numbers."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._generator.set_state(state["generator"])


def random_choice(problem: RatioProblem, generator: torch.Generator) -> Choice:
    """A random shape scaled to the budget; without one, random ratios."""
    uniform = torch.rand(len(problem.decisions), generator=generator, dtype=torch.float64)
    shape = (_LEAST_RATIO + (1 - _LEAST_RATIO) * uniform).tolist()
    if problem.budget is not None:
        return problem.scaled(shape)
    return tuple(d.nearest(ratio) for d, ratio in zip(problem.decisions, shape, strict=True))


class DDPGSearcher:
    """The agent of :mod:`~lit_compress.search.ddpg`, and where its first episodes come from.

    The first episodes are heuristics, then random choices; the agent learns from all of them.
    After ``learning_starts`` the actor decides, with falling noise. Where that leads to a choice
    that was tried already, noise grows until it does not, so that no episode is wasted.

    Learning runs in a thread of its own while the next choice is evaluated, so the actor that is
    asked has not seen the last episode yet. The result does not depend on which of them is faster.

    Args:
        problem: The problem.
        settings: What the agent learns with.
        seed: Of its random numbers, which are its own.
        first: Choices to begin with.
        elite_share: Part of the actor's episodes in which the noise is around the best choice so
            far, not around the actor's, in [0, 1]: what the actor has not found out yet can be
            found by trying there.

    Raises:
        ValueError: If ``elite_share`` is out of range.
    """

    def __init__(
        self,
        problem: RatioProblem,
        settings: DDPGSettings | None = None,
        seed: int = 0,
        first: Sequence[Proposal] = (),
        elite_share: float = 0.5,
    ) -> None:
        if not 0 <= elite_share <= 1:
            raise ValueError(f"elite_share is {elite_share}, expected a share in [0, 1].")
        self._problem = problem
        self._agent = DDPGAgent(num_features(problem), settings, seed)
        self._random = torch.Generator().manual_seed(seed)
        self._first = tuple(first)
        self._elite_share = elite_share
        self._asked = 0
        self._tried: set[Choice] = set()
        self._best: tuple[float, Choice] | None = None
        self._acting = self._agent.acting_copy()
        self._thread = ThreadPoolExecutor(1, "ddpg")
        self._learning: Future[object] | None = None

    def ask(self) -> Proposal:
        """The next choice: a heuristic, a random one, or the actor's."""
        number, self._asked = self._asked, self._asked + 1
        if number < len(self._first):
            return self._first[number]
        if number < self._agent.settings.learning_starts or self._best is None:
            return Proposal(random_choice(self._problem, self._random), "random")
        elite = float(torch.rand((), generator=self._random)) < self._elite_share
        noise = self._agent.noise_at(number)
        return Proposal(self._near(self._best[1] if elite else None, noise), "ddpg")

    def tell(self, proposal: Proposal, reward: float) -> None:
        """Learn from an episode, whoever proposed it.

        A reward that is no finite number teaches only not to try the choice again.
        """
        self._tried.add(proposal.choice)
        if not math.isfinite(reward):
            return
        if self._best is None or reward > self._best[0]:
            self._best = reward, proposal.choice
        self._wait()
        self._acting = self._agent.acting_copy()
        states, actions = transitions(self._problem, proposal.choice)
        self._learning = self._thread.submit(self._agent.learn, states, actions, reward)

    def state_dict(self) -> dict[str, Any]:
        """Agent, random numbers and what was tried."""
        acting = {name: t.clone() for name, t in self._acting.state_dict().items()}
        self._wait()
        return {
            "agent": self._agent.state_dict(),
            "acting": acting,
            "random": self._random.get_state(),
            "asked": self._asked,
            "tried": [list(choice) for choice in sorted(self._tried)],
            "best": None if self._best is None else [self._best[0], list(self._best[1])],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._wait()
        self._agent.load_state_dict(state["agent"])
        self._acting.load_state_dict(state["acting"])
        self._random.set_state(state["random"])
        self._asked = state["asked"]
        self._tried = {tuple(choice) for choice in state["tried"]}
        best = state["best"]
        self._best = None if best is None else (best[0], tuple(best[1]))

    def _wait(self) -> None:
        """Until the agent learned from its last episode."""
        if self._learning is not None:
            self._learning.result()
            self._learning = None

    def _near(self, center: Choice | None, noise: float) -> Choice:
        """A choice near the actor's or a given one, a new one where noise can find it."""
        actions = None if center is None else self._problem.actions(center)
        choice: Choice = ()
        for attempt in range(_ATTEMPTS):
            spread = max(noise, _LEAST_NOISE) if attempt or actions else noise
            spread *= _NOISE_GROWTH**attempt
            choice = walk(self._problem, self._noisy(actions, spread))
            if choice not in self._tried:
                break
        return choice

    def _noisy(self, actions: Sequence[float] | None, noise: float) -> Callable[[Tensor], float]:
        """Acts with noise around the actor's action, or around given ones in turn."""
        if actions is None:
            return lambda state: self._agent.explore(state, noise, self._acting)
        remaining = iter(actions)
        return lambda state: truncated_normal(
            next(remaining), noise, float(torch.rand((), generator=self._random))
        )

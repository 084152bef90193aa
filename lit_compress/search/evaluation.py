"""Evaluator: scores choices, remembers the scores, and stops hopeless choices early."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from torch import nn

from lit_compress.search.problem import Choice
from lit_compress.search.racing import is_hopeless

__all__ = ["Evaluation", "Evaluator", "GiveUp", "Mode", "Score", "Scored", "plain_score"]

Mode: TypeAlias = Literal["max", "min"]

GiveUp: TypeAlias = Callable[[Sequence[float], Sequence[int]], bool]
"""Asked after each batch: the metric and the examples so far, after each batch up to then."""


@dataclass(frozen=True)
class Scored:
    """What scoring a network gave.

    Attributes:
        value: The metric, of the examples that were looked at.
        running: The metric after each batch; empty where it was computed in one piece.
        num_examples: Examples seen after each batch.
        complete: Whether all examples were looked at.
    """

    value: float
    running: tuple[float, ...] = ()
    num_examples: tuple[int, ...] = ()
    complete: bool = True


class Score(Protocol):
    """Scores a network on the same examples each time, and leaves it as it is."""

    def __call__(self, network: nn.Module, give_up: GiveUp | None = None) -> Scored:
        """Score a network; where ``give_up`` says so, with the examples so far."""


@dataclass(frozen=True)
class Evaluation:
    """The worth of a choice.

    Attributes:
        score: The metric; NaN where it could not be had.
        complete: Whether all examples were looked at.
        failure: Why it could not be had.
    """

    score: float
    complete: bool = True
    failure: str | None = None


class Evaluator:
    """Evaluates choices, remembers them, and races them against the best so far.

    Only complete scores count for the best, and only choices that are behind it beyond chance are
    given up, so that the winner is chosen among scores of all examples, as without a race.

    Args:
        build: Makes the network of a choice.
        score: Scores it.
        mode: Whether more of the metric is better.
        race: Whether to give up hopeless choices. Only for searches that maximise the metric
            itself, and for scores that report running values, on the same batches each time.
        tune: Trains the network of a choice in place for a short while, before it is scored.
    """

    def __init__(
        self,
        build: Callable[[Choice], nn.Module],
        score: Score,
        mode: Mode = "max",
        *,
        race: bool = True,
        tune: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self._build = build
        self._score = score
        self._sign = 1.0 if mode == "max" else -1.0
        self._race = race
        self._tune = tune
        self._known: dict[Choice, Evaluation] = {}
        self._incumbent: Scored | None = None

    def __call__(self, choice: Choice) -> Evaluation:
        """Evaluate a choice.

        A network that raises, or whose metric is NaN or infinite, costs this choice only.

        Raises:
            MemoryError: As everything that is no ``Exception`` of the network's own.
        """
        if choice not in self._known:
            self._known[choice] = self._evaluated(choice)
        return self._known[choice]

    def probe(self, choice: Choice) -> Evaluation:
        """Evaluate a choice that is no candidate, one beyond the budget: it is in no race."""
        try:
            value = self._score(self._build(choice)).value
        except MemoryError:
            raise
        except Exception as error:  # as for a candidate
            return Evaluation(math.nan, failure=f"{type(error).__name__}: {error}")
        return Evaluation(value)

    def is_known(self, choice: Choice) -> bool:
        """Whether a choice costs nothing any more."""
        return choice in self._known

    def state_dict(self) -> dict[str, Any]:
        """What was evaluated, as plain data."""
        rival = self._incumbent
        return {
            "known": [[list(c), e.score, e.complete, e.failure] for c, e in self._known.items()],
            "incumbent": None
            if rival is None
            else [rival.value, list(rival.running), list(rival.num_examples)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._known = {
            tuple(choice): Evaluation(score, complete, failure)
            for choice, score, complete, failure in state["known"]
        }
        rival = state["incumbent"]
        self._incumbent = None
        if rival is not None:
            self._incumbent = Scored(rival[0], tuple(rival[1]), tuple(rival[2]))

    def _evaluated(self, choice: Choice) -> Evaluation:
        try:
            network = self._build(choice)
            if self._tune is not None:
                self._tune(network)
            scored = self._score(network, self._give_up if self._race else None)
        except MemoryError:
            raise
        except Exception as error:  # a search outlives a candidate, whatever it raises
            return Evaluation(math.nan, failure=f"{type(error).__name__}: {error}")
        if not math.isfinite(scored.value):
            return Evaluation(math.nan, failure=f"the metric is {scored.value}")
        if scored.complete:
            self._note_incumbent(scored)
        return Evaluation(scored.value, scored.complete)

    def _note_incumbent(self, scored: Scored) -> None:
        best = self._incumbent
        if best is None or self._sign * scored.value > self._sign * best.value:
            self._incumbent = scored

    def _give_up(self, running: Sequence[float], num_examples: Sequence[int]) -> bool:
        best = self._incumbent
        if best is None or not best.running:
            return False
        ours, theirs = ([self._sign * v for v in r] for r in (running, best.running))
        return is_hopeless(ours, theirs, best.num_examples)


def plain_score(score: Callable[[nn.Module], float]) -> Score:
    """A user's function of a network as a :class:`Score`."""

    def scored(network: nn.Module, give_up: GiveUp | None = None) -> Scored:
        return Scored(float(score(network)))

    return scored

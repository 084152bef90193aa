"""The search loop: ask, evaluate, tell; saved after each episode, so that it can resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lit_compress.files import replacing
from lit_compress.search.evaluation import Evaluator, Mode
from lit_compress.search.problem import Choice, RatioProblem
from lit_compress.search.rewards import Reward, best_episode, reward_function
from lit_compress.search.search_result import Episode, SearchResult, Space
from lit_compress.search.searchers import Proposal, Searcher

__all__ = ["SearchTask", "search_ratios"]

_FORMAT = "lit-compress ratio search state 1"


@dataclass(frozen=True)
class SearchTask:
    """What is searched and how it is judged.

    Attributes:
        space: What the decisions are about.
        problem: The decisions, their costs and the budget.
        metric: The metric's name.
        mode: Whether more of it is better.
        dense_score: The dense model's.
        reward: What is maximised; see :func:`~lit_compress.search.rewards.reward_function`.
        tolerance: Loss of metric that is accepted for the cheapest episode to win; see
            :func:`~lit_compress.search.rewards.best_episode`.
        setting: What else the result depends on, in words. A search goes on from a file only where
            it was made with the same.
    """

    space: Space
    problem: RatioProblem
    metric: str
    mode: Mode
    dense_score: float
    reward: Reward = "score"
    tolerance: float | None = None
    setting: Mapping[str, str] = field(default_factory=dict)

    def result(self, episodes: tuple[Episode, ...]) -> SearchResult:
        """The result that episodes make."""
        budget = self.problem.budget
        return SearchResult(
            self.space,
            self.problem.decisions,
            self.metric,
            self.mode,
            self.dense_score,
            self.problem.full_costs,
            None if budget is None else (budget.cost, budget.limit),
            self.reward if isinstance(self.reward, str) else "function",
            episodes,
            self._best(episodes),
            dict(self.setting),
        )

    def _best(self, episodes: tuple[Episode, ...]) -> int | None:
        cost = self.problem.budget.cost if self.problem.budget else next(iter(self.problem.costs))
        if self.reward == "error_log_params":
            cost = "num_params"
        return best_episode(
            episodes,
            tolerance=self.tolerance,
            dense_score=self.dense_score,
            mode=self.mode,
            cost=cost,
        )


def search_ratios(
    task: SearchTask,
    searcher: Searcher,
    evaluate: Evaluator,
    num_episodes: int,
    *,
    state_file: Path | None = None,
    saves: bool = True,
    on_episode: Callable[[SearchResult], object] | None = None,
    agree: Callable[[Proposal], Proposal] = lambda proposal: proposal,
    settle: Callable[[Choice], float] | None = None,
    num_finalists: int = 5,
) -> SearchResult:
    """Search until a number of episodes is reached.

    An interruption from the keyboard ends the search with the best so far. An episode whose
    evaluation fails is counted and teaches nothing.

    Args:
        task: What is searched.
        searcher: Who proposes choices.
        evaluate: Scores them.
        num_episodes: Episodes altogether, those of an interrupted run included; at least 1.
        state_file: Where everything is saved after each episode, whole or not at all. Where it is
            there already, the search goes on from it, exactly.
        saves: Whether this process writes it; of several that share the file only one does.
        on_episode: Called with the result so far after each episode.
        agree: Makes processes try the same choice.
        settle: Scores a choice once more, in full precision; then the best episodes, and the best
            of each source, are scored so in the end, and the winner is chosen by these scores.
            Where that is interrupted, or fails for all, the result is as without it.
        num_finalists: How many of the best are settled, at least 1.

    Returns:
        All episodes and the winner.

    Raises:
        ValueError: If ``num_episodes`` or ``num_finalists`` is below 1, or the state file is
            damaged or of another search.
    """
    for name, number in (("num_episodes", num_episodes), ("num_finalists", num_finalists)):
        if number < 1:
            raise ValueError(f"{name} is {number}; expected at least 1.")
    episodes: list[Episode] = []
    if state_file is not None and state_file.is_file():
        episodes = _restored(state_file, task, searcher, evaluate)
    try:
        while len(episodes) < num_episodes:
            episodes.append(_episode(len(episodes), task, searcher, evaluate, agree))
            if state_file is not None and saves:
                _save(state_file, task, searcher, evaluate, episodes)
            if on_episode is not None:
                on_episode(task.result(tuple(episodes)))
    except KeyboardInterrupt:
        if not episodes:
            raise
    result = task.result(tuple(episodes))
    if settle is None:
        return result
    try:
        return _settled(task, result, settle, num_finalists)
    except KeyboardInterrupt:
        return result


def _episode(
    number: int,
    task: SearchTask,
    searcher: Searcher,
    evaluate: Evaluator,
    agree: Callable[[Proposal], Proposal],
) -> Episode:
    """Ask, evaluate, tell."""
    began = time.process_time()
    proposal = agree(searcher.ask())
    worth = evaluate(proposal.choice)
    costs = task.problem.cost_of(proposal.choice)
    reward = reward_function(task.reward, task.mode)
    gained = math.nan if worth.failure else reward(worth.score, costs)
    searcher.tell(proposal, gained)
    return Episode(
        number,
        proposal.source,
        proposal.choice,
        worth.score,
        gained,
        costs,
        worth.complete and worth.failure is None,
        worth.failure,
        time.process_time() - began,
    )


def _settled(
    task: SearchTask, result: SearchResult, settle: Callable[[Choice], float], num_finalists: int
) -> SearchResult:
    """The result with the best choices, and the best of each source, scored once more.

    These scores decide on the winner. Other episodes keep the scores that they have, which compare
    with these only roughly. A choice that fails now cannot win, and the failure is told.
    """
    reward = reward_function(task.reward, task.mode)
    finished = sorted((e for e in result.episodes if e.finished), key=lambda e: -e.reward)
    finalists = dict.fromkeys(list(dict.fromkeys(e.choice for e in finished))[:num_finalists])
    finalists |= dict.fromkeys(e.choice for e in result.best_by_source().values())
    if result.best is not None:
        finalists[result.best_episode.choice] = None  # the cheapest within a tolerance
    scores = {choice: _score_or_failure(settle, choice) for choice in finalists}

    def settled(episode: Episode) -> Episode:
        score = scores[episode.choice]
        if isinstance(score, str):
            return replace(episode, score=math.nan, reward=math.nan, failure=score)
        return replace(episode, score=score, reward=reward(score, episode.costs))

    again = {e.number: settled(e) for e in finished if e.choice in scores}
    winner = task.result(tuple(again[number] for number in sorted(again))).best
    if winner is None:
        return result
    episodes = tuple(again.get(e.number, e) for e in result.episodes)
    return replace(task.result(episodes), best=winner)


def _score_or_failure(settle: Callable[[Choice], float], choice: Choice) -> float | str:
    try:
        score = settle(choice)
    except MemoryError:
        raise
    except Exception as error:  # a search outlives a candidate, whatever it raises
        return f"{type(error).__name__}: {error}"
    return score if math.isfinite(score) else f"the metric is {score}"


# --- Files ----------------------------------------------------------------------------------------


def _fingerprint(task: SearchTask) -> dict[str, Any]:
    """What has to be the same for a search to go on."""
    budget = task.problem.budget
    return {
        "space": task.space,
        "metric": [task.metric, task.mode],
        "reward": task.reward if isinstance(task.reward, str) else "function",
        "budget": None if budget is None else [budget.cost, budget.limit],
        "decisions": [[d.name, list(d.levels), d.full] for d in task.problem.decisions],
        "setting": dict(task.setting),
    }


def _save(
    file: Path,
    task: SearchTask,
    searcher: Searcher,
    evaluate: Evaluator,
    episodes: list[Episode],
) -> None:
    state = {
        "format": _FORMAT,
        "task": _fingerprint(task),
        "episodes": [{**vars(e), "costs": dict(e.costs)} for e in episodes],
        "searcher": searcher.state_dict(),
        "evaluator": evaluate.state_dict(),
    }
    with replacing(file) as part:
        torch.save(state, part)


def _restored(
    file: Path, task: SearchTask, searcher: Searcher, evaluate: Evaluator
) -> list[Episode]:
    try:
        state = torch.load(file, weights_only=True)
        found = state.get("format") if isinstance(state, dict) else None
    except Exception as error:  # whatever a damaged archive raises
        raise ValueError(
            f"{str(file)!r} cannot be read as the state of a search ({type(error).__name__}); "
            "remove it to begin again, or give another folder."
        ) from error
    if found != _FORMAT:
        raise ValueError(
            f"{str(file)!r} has the format {found!r}, expected {_FORMAT!r}; give another folder."
        )
    ours = _fingerprint(task)
    for key, value in ours.items():
        if state["task"].get(key) != value:
            raise ValueError(
                f"{str(file)!r} holds another search: its {key} is "
                f"{_shown(state['task'].get(key))} and not {_shown(value)}. Give another folder, "
                "or remove the file to begin again."
            )
    searcher.load_state_dict(state["searcher"])
    evaluate.load_state_dict(state["evaluator"])
    return [Episode(**fields) for fields in state["episodes"]]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."

"""The environment of an agent: a walk through the layers, with a state before each decision.

He et al. 2018 ("AMC", section 3.1): a state describes the layer at hand (index, kind, sizes), what
was saved before it, what can still be saved after it, and the last action that was carried out.
Here "what" is the cost that the budget is on. Costs are tables, so that a walk runs no network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_compress.search.problem import Choice, RatioProblem

__all__ = ["num_features", "transitions", "walk"]

_CHANGING = 4  # reduced, rest, last action, position


def num_features(problem: RatioProblem) -> int:
    """The length of a state."""
    return len(problem.decisions[0].features) + _CHANGING


def walk(problem: RatioProblem, act: Callable[[Tensor], float]) -> Choice:
    """Let an agent decide on all layers, one after another.

    Args:
        problem: The problem.
        act: Gives an action in [0, 1], for a state of shape ``[num_features(problem)]``, float32,
            each number in [0, 1]. It is a preserve ratio, or which of the levels
            (:class:`~lit_compress.search.problem.Decision`).

    Returns:
        The choice, which meets the budget and spends it.
    """
    chosen: Choice = ()
    for _ in problem.decisions:
        chosen = (*chosen, problem.clip(chosen, act(_state(problem, chosen))))
    return problem.filled(chosen)


def transitions(problem: RatioProblem, choice: Choice) -> tuple[Tensor, Tensor]:
    """The states and actions of an episode as it was carried out.

    Args:
        problem: The problem.
        choice: A finished choice, whoever made it, with nothing left of the budget that a level
            more could take (:meth:`RatioProblem.filled`).

    Returns:
        States, float32 ``[num_decisions, num_features]``, and the actions that lead to exactly this
        choice, float32 ``[num_decisions]``.
    """
    steps = range(len(choice))
    states = torch.stack([_state(problem, choice[:step]) for step in steps])
    return states, torch.tensor(problem.actions(choice), dtype=torch.float32)


def _state(problem: RatioProblem, chosen: Choice) -> Tensor:
    """What is seen before the decision after ``chosen``."""
    step, count = len(chosen), len(problem.decisions)
    names = tuple(problem.costs)
    cost = problem.costs[problem.budget.cost if problem.budget else names[0]]
    lavish = (*chosen, *problem.highest[step:])
    frugal = (*chosen, *[0] * (count - step))
    most, left, least = cost(problem.values([problem.highest, lavish, frugal])).tolist()
    last = problem.decisions[step - 1].actions[chosen[-1]] if step else 1.0
    changing = [(most - left) / most, (left - least) / most, last, step / max(count - 1, 1)]
    return torch.tensor([*problem.decisions[step].features, *changing], dtype=torch.float32)

"""RatioProblem: the decisions of a search, their costs, and a budget that is always met.

A problem knows nothing of networks: it is a table of decisions (channels kept, density, bits; one
for each layer or group of coupled layers, in forward order) and of costs that never fall where a
decision keeps more. That is enough to say at each step which values are still allowed, for every
kind of cost, measured latency included: the rule of He et al. 2018 ("AMC", algorithm 1), there
solved for MACs only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Budget", "Choice", "Cost", "Decision", "RatioProblem", "chosen_levels"]

Choice: TypeAlias = tuple[int, ...]
"""The index of a level for each decision, from 0."""

Cost: TypeAlias = Callable[[Tensor], Tensor]
"""Costs of many choices: float64 ``[n, num_decisions]`` of level values to float64 ``[n]``.

Never lower where a value is higher.
"""

_ROUNDING = 1e-9  # relative: sums of the same numbers in another order are no breach of a budget


@dataclass(frozen=True)
class Decision:
    """How much of one layer, or of one group of coupled layers, is kept.

    Attributes:
        name: The layer's or the group's name.
        levels: What can be chosen, rising: channels kept, density of weights in (0, 1], bits.
        full: What the dense model has: channels, 1.0, bits; at least the last level.
        features: What describes the layer to an agent, scaled to [0, 1].
        by_level: Whether an agent's action in [0, 1] says which of the levels, from the first to
            the last in equal steps; else it is a preserve ratio. For levels that are a small part
            of [0, 1], or in geometric steps.
    """

    name: str
    levels: tuple[float, ...]
    full: float
    features: tuple[float, ...] = ()
    by_level: bool = False

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.levels, self.levels[1:], strict=False))
        if not self.levels or not rising or not 0 < self.levels[0] <= self.levels[-1] <= self.full:
            raise ValueError(
                f"the levels of decision {self.name!r} are {list(self.levels)[:8]} of "
                f"{self.full}; expected at least one number, rising, in (0, {self.full}]."
            )

    @property
    def ratios(self) -> tuple[float, ...]:
        """The levels as preserve ratios, in (0, 1]."""
        return tuple(level / self.full for level in self.levels)

    @property
    def actions(self) -> tuple[float, ...]:
        """What an agent does to take each level, in [0, 1]."""
        if not self.by_level:
            return self.ratios
        steps = max(len(self.levels) - 1, 1)
        return tuple(index / steps for index in range(len(self.levels)))

    def taken_by(self, action: float) -> int:
        """The index of the level that an action in [0, 1] takes."""
        if not self.by_level:
            return self.nearest(action)
        return math.floor(action * (len(self.levels) - 1) + 0.5)

    def nearest(self, ratio: float) -> int:
        """The index of the level nearest to a preserve ratio; a tie keeps more."""
        return min(
            range(len(self.levels)),
            key=lambda index: (abs(self.levels[index] / self.full - ratio), -index),
        )


def chosen_levels(decisions: Sequence[Decision], choice: Choice) -> dict[str, float]:
    """The levels of a choice, by the names of the decisions."""
    pairs = zip(decisions, choice, strict=True)
    return {decision.name: decision.levels[index] for decision, index in pairs}


@dataclass(frozen=True)
class Budget:
    """What a choice may cost at most.

    Attributes:
        cost: The name of the cost.
        limit: In the cost's unit, above 0.
    """

    cost: str
    limit: float


@dataclass(frozen=True)
class RatioProblem:
    """Decisions, their costs, and a budget.

    Attributes:
        decisions: In forward order.
        costs: By name; the budget's is among them.
        budget: What a choice may cost at most, or ``None``.

    Raises:
        ValueError: If there is nothing to decide, two decisions have one name or differ in the
            number of their features, there is no cost, the budget names none, every choice meets
            it, or no choice does; the lowest cost that can be reached is given.
    """

    decisions: tuple[Decision, ...]
    costs: Mapping[str, Cost]
    budget: Budget | None = None
    _levels: tuple[Tensor, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [decision.name for decision in self.decisions]
        if not any(len(decision.levels) > 1 for decision in self.decisions):
            raise ValueError(
                "there is nothing to search: no layer has more than one value to choose from. Is "
                "the model too small for round_to, or are all of its layers ignored?"
            )
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"two decisions are named {twice!r}; expected one for each layer.")
        first = self.decisions[0]
        for other in self.decisions:
            if len(other.features) != len(first.features):
                raise ValueError(
                    f"decision {other.name!r} has {len(other.features)} features and "
                    f"{first.name!r} has {len(first.features)}; describe all of them alike."
                )
        if not self.costs:
            raise ValueError("there are no costs; expected at least one, such as 'macs'.")
        levels = tuple(torch.tensor(d.levels, dtype=torch.float64) for d in self.decisions)
        object.__setattr__(self, "_levels", levels)
        if self.budget is not None:
            self._check_budget(self.budget)

    # --- Choices ----------------------------------------------------------------------------------

    @property
    def highest(self) -> Choice:
        """The choice that keeps most."""
        return tuple(len(decision.levels) - 1 for decision in self.decisions)

    def values(self, choices: Sequence[Choice]) -> Tensor:
        """The level values of choices, float64 ``[len(choices), num_decisions]``."""
        indices = torch.tensor(choices, dtype=torch.int64).view(-1, len(self.decisions))
        columns = [level[index] for level, index in zip(self._levels, indices.T, strict=True)]
        return torch.stack(columns, 1)

    def ratios(self, choice: Choice) -> tuple[float, ...]:
        """The preserve ratios of a choice, in (0, 1]."""
        pairs = zip(self.decisions, choice, strict=True)
        return tuple(decision.levels[index] / decision.full for decision, index in pairs)

    def actions(self, choice: Choice) -> tuple[float, ...]:
        """The actions that a choice is made of, in [0, 1]."""
        pairs = zip(self.decisions, choice, strict=True)
        return tuple(decision.actions[index] for decision, index in pairs)

    def cost_of(self, choice: Choice) -> dict[str, float]:
        """What a choice costs, by name."""
        values = self.values([choice])
        return {name: float(cost(values)[0]) for name, cost in self.costs.items()}

    @property
    def full_costs(self) -> dict[str, float]:
        """What the model costs with everything kept, by name."""
        full = torch.tensor([[d.full for d in self.decisions]], dtype=torch.float64)
        return {name: float(cost(full)[0]) for name, cost in self.costs.items()}

    def meets(self, choice: Choice) -> bool:
        """Whether a choice is within the budget."""
        if self.budget is None:
            return True
        return self.cost_of(choice)[self.budget.cost] <= self._limit

    # --- The budget, step by step -----------------------------------------------------------------

    def allowed(self, chosen: Choice) -> tuple[int, int]:
        """What the next decision may take.

        Args:
            chosen: The decisions before it.

        Returns:
            The lowest and the highest index. With the highest, later decisions at their lowest
            still meet the budget. The lowest is the highest one that meets it whatever later
            decisions take: below that, some of the budget would be left for sure. Every choice
            that :meth:`filled` leaves as it is lies within these bounds at each step.
        """
        step = len(chosen)
        last = len(self.decisions[step].levels) - 1
        if self.budget is None:
            return 0, last
        rest = self.decisions[step + 1 :]
        frugal = [(*chosen, index, *[0] * len(rest)) for index in range(last + 1)]
        lavish = [(*chosen, index, *self.highest[step + 1 :]) for index in range(last + 1)]
        costs = self.costs[self.budget.cost](self.values(frugal + lavish))
        fits = costs <= self._limit
        high = max(int(fits[: last + 1].sum()) - 1, 0)
        low = max(int(fits[last + 1 :].sum()) - 1, 0)
        return low, high

    def clip(self, chosen: Choice, action: float) -> int:
        """The allowed level nearest to the one that an action takes, as an index.

        Args:
            chosen: The decisions before it.
            action: In [0, 1]; see :class:`Decision`.
        """
        low, high = self.allowed(chosen)
        return min(max(self.decisions[len(chosen)].taken_by(action), low), high)

    def filled(self, choice: Choice) -> Choice:
        """The choice with what is left of the budget spent, a level at a time.

        Each time the decision is raised that closes most of the gap.
        """
        if self.budget is None:
            return choice
        cost = self.costs[self.budget.cost]
        while True:
            raised = [
                (*choice[:index], choice[index] + 1, *choice[index + 1 :])
                for index in range(len(choice))
                if choice[index] < self.highest[index]
            ]
            if not raised:
                return choice
            costs = cost(self.values(raised))
            costs = torch.where(costs <= self._limit, costs, -math.inf)
            best = int(costs.argmax())
            if costs[best] == -math.inf:
                return choice
            choice = raised[best]

    def scaled(self, shape: Sequence[float]) -> Choice:
        """The choice whose ratios are in proportion to a shape, as large as the budget allows.

        Args:
            shape: A number of at least 0 for each decision; ratios above 1 are cut to 1.

        Returns:
            The choice nearest to ``u * shape`` with the largest ``u`` that meets the budget, and
            what is left of it spent; without a budget, everything kept.

        Raises:
            ValueError: If the shape has another length, or a number that is negative or no number.
        """
        if len(shape) != len(self.decisions) or not all(0 <= s < math.inf for s in shape):
            raise ValueError(
                f"the shape is {list(shape)[:8]}, expected {len(self.decisions)} finite numbers of "
                "at least 0."
            )
        whole = 1.0 / max(min((s for s in shape if s > 0), default=1.0), 1e-3)
        return self.along(lambda place: [min(place * whole * share, 1.0) for share in shape])

    def along(self, path: Callable[[float], Sequence[float]]) -> Choice:
        """The choice nearest to the farthest place on a path that the budget allows.

        Args:
            path: From a place in [0, 1] to the ratios of all decisions, none of which falls where
                the place rises.

        Returns:
            The choice, with what is left of the budget spent; without a budget, everything kept.
        """
        if self.budget is None:
            return self.highest

        def at(place: float) -> Choice:
            pairs = zip(self.decisions, path(place), strict=True)
            return tuple(decision.nearest(ratio) for decision, ratio in pairs)

        below, above = 0.0, 1.0
        if self.meets(at(above)):
            return self.filled(at(above))
        for _ in range(40):
            middle = (below + above) / 2
            below, above = (middle, above) if self.meets(at(middle)) else (below, middle)
        return self.filled(at(below))

    # --- Inside -----------------------------------------------------------------------------------

    @property
    def _limit(self) -> float:
        assert self.budget is not None
        return self.budget.limit * (1 + _ROUNDING)

    def _check_budget(self, budget: Budget) -> None:
        if budget.cost not in self.costs:
            raise ValueError(
                f"the budget is on {budget.cost!r}; expected one of "
                f"{', '.join(map(repr, self.costs))}."
            )
        if not 0 < budget.limit < math.inf:
            raise ValueError(f"the budget is {budget.limit}; expected a finite number above 0.")
        cost = self.costs[budget.cost]
        least, most = cost(self.values([(0,) * len(self.decisions), self.highest])).tolist()
        if least > self._limit:
            raise ValueError(
                f"the budget is {budget.limit:.6g} {budget.cost}, and the lowest that the bounds "
                f"allow is {least:.6g} ({least / self.full_costs[budget.cost]:.1%} of the dense "
                "model); raise the budget, lower the bounds, or ignore fewer layers."
            )
        if most <= budget.limit:
            raise ValueError(
                f"the budget is {budget.limit:.6g} {budget.cost} and the most that can be chosen "
                f"costs {most:.6g}: nothing is to be saved. Give a budget below that."
            )

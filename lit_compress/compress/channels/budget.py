"""Find the plan that meets a target of MACs, parameters, bytes or milliseconds."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_compress.compress.channels.costs import PlanCost
from lit_compress.compress.channels.order import RemovalOrder, halvings, plan_of
from lit_compress.compress.channels.plan import ChannelPlan, rounding_step

__all__ = ["meet_target"]


def meet_target(
    order: RemovalOrder,
    cost: Callable[[ChannelPlan], float],
    target: float,
    *,
    tolerance: float = 0.01,
) -> ChannelPlan:
    """The plan that costs as much as allowed, and never more.

    The shortest beginning of the order that meets the target is found by bisection. Where it costs
    too little, the gap is closed, because one rounding step of a small model can be many per cent:
    with a :class:`PlanCost` first by whole rounding steps of other groups, then by half steps (4,
    2, 1) in as few groups as possible; with any other cost, which may be slow to evaluate, only by
    keeping some of the channels that went last.

    Args:
        order: The channels of the model and how groups share the burden.
        cost: The cost of a plan, positive, and no higher where fewer channels are kept. Unless it
            is a :class:`PlanCost` it is asked about ten times, and once about each plan.
        target: What the plan may cost at most, in (0, the dense model's cost].
        tolerance: The plan costs at least ``target * (1 - tolerance)``, in [0, 1).

    Returns:
        A plan with ``target * (1 - tolerance) <= cost(plan) <= target``.

    Raises:
        ValueError: If ``target`` or ``tolerance`` is out of range, ``cost`` is that of another
            model, or no plan meets the target; the nearest costs that can be reached are given.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}, expected a share of the target in [0, 1).")
    if isinstance(cost, PlanCost):
        if cost.groups.groups != order.groups.groups:
            raise ValueError(
                f"the cost is that of a model with {len(cost.groups.groups)} groups and the order "
                f"that of one with {len(order.groups.groups)}, or their channels differ; make both "
                "from the same groups."
            )
    else:
        cost = _asked_once(cost)
    window = _Window(target, target * (1 - tolerance))
    dense = order.plan(0)
    dense_cost = cost(dense)
    if not 0 < target <= dense_cost:
        raise ValueError(
            f"the target is {_shown(target)} and the dense model costs {_shown(dense_cost)}; "
            "expected a target above 0 and not above that, for half of it "
            f"{_shown(dense_cost / 2)}."
        )
    if window.holds(dense_cost):
        return dense
    least = cost(order.plan(len(order.removals)))
    if least > target:
        raise ValueError(
            f"the target is {_shown(target)} and the lowest cost that can be reached is "
            f"{_shown(least)} ({least / dense_cost:.1%} of the dense model); raise the target or "
            "max_pruning_ratio, or ignore fewer layers."
        )
    if isinstance(cost, PlanCost):
        return _Gap(order, cost, window).closed()
    return _met_by_few_calls(order, cost, window)


@dataclass(frozen=True)
class _Window:
    """The costs that meet a target."""

    highest: float
    lowest: float

    def holds(self, cost: float) -> bool:
        return self.lowest <= cost <= self.highest

    def missed(self, below: float, above: float) -> ValueError:
        return ValueError(
            f"no plan was found that costs from {_shown(self.lowest)} to {_shown(self.highest)}; "
            f"the nearest cost {_shown(below)} and {_shown(above)}. Give one of these as the "
            "target, a larger tolerance or a smaller round_to."
        )


def _met_by_few_calls(
    order: RemovalOrder, cost: Callable[[ChannelPlan], float], window: _Window
) -> ChannelPlan:
    """Bisect the order, then the channels that go last, and stop at the first plan that will do."""
    few, many = 0, len(order.removals)  # cost more than the target, and no more
    while many - few > 1:
        middle = (few + many) // 2
        if window.holds(cost(order.plan(middle))):
            return order.plan(middle)
        if cost(order.plan(middle)) <= window.highest:
            many = middle
        else:
            few = middle
    kept = order.kept(many)
    index = order.removals[few].group
    num_blocks = order.groups.groups[index].num_blocks

    def with_kept(number: int) -> ChannelPlan:
        return plan_of(order.groups, [*kept[:index], number, *kept[index + 1 :]])

    low, high = kept[index], order.kept(few)[index]
    while not window.holds(cost(with_kept(low))):
        middle = (low + high) // 2 // num_blocks * num_blocks
        if middle == low:
            raise window.missed(cost(with_kept(low)), cost(with_kept(high)))
        if cost(with_kept(middle)) <= window.highest:
            low = middle
        else:
            high = middle
    return with_kept(low)


def _asked_once(cost: Callable[[ChannelPlan], float]) -> Callable[[ChannelPlan], float]:
    """The same cost, which remembers its answers: they may be slow, and differ the next time."""
    answers: dict[tuple[int, ...], float] = {}

    def remembered(plan: ChannelPlan) -> float:
        kept = tuple(plan.kept.values())
        if kept not in answers:
            answers[kept] = cost(plan)
        return answers[kept]

    return remembered


def _shown(cost: float) -> str:
    return f"{cost:.0f}" if cost >= 1e5 else f"{cost:.7g}"


class _Gap:
    """Closes the gap between the two neighbouring beginnings of an order around a target.

    As long as that meets the target, no group strays from them by more than one rounding step, or
    8 channels where steps are smaller.
    """

    def __init__(self, order: RemovalOrder, cost: PlanCost, window: _Window) -> None:
        self._order = order
        self._cost = cost
        self._window = window
        self._reach = max(order.round_to, 8)
        num_removals = bisect_left(
            range(len(order.removals)), True, key=lambda n: cost(order.plan(n)) <= window.highest
        )
        self._below = torch.tensor(order.kept(num_removals))
        self._above = torch.tensor(order.kept(num_removals - 1))
        self._full = torch.tensor(order.kept(0))
        self._least = torch.tensor(order.kept(len(order.removals)))
        self._most = self._higher(self._below, self._reach)

    def closed(self) -> ChannelPlan:
        """The first candidate that meets the target."""
        below = -math.inf
        for kept in self._candidates():
            cost = float(self._cost.of_each(kept[None])[0])
            if self._window.holds(cost):
                return plan_of(self._order.groups, kept.tolist())
            below = max(below, cost)
        raise self._window.missed(below, float(self._cost.of_each(self._above[None])[0]))

    def _candidates(self) -> Iterator[Tensor]:
        """Ever finer ways to keep more than ``below`` does, none above the target."""
        coarse, *finer = halvings(self._order.round_to)
        yield self._below
        kept = self._grown(self._below, coarse)
        yield kept
        yield self._shrunk_once(coarse)
        yield self._swapped(kept, coarse)
        for step in finer:
            yield self._grown_once(kept, step)
            yield self._shrunk_once(step)
        for step in finer:
            kept = self._grown(kept, step)
            yield kept
            yield self._swapped(kept, step)
        self._most = self._full
        yield self._swapped(self._grown(kept, 1), 1)

    def _grown(self, kept: Tensor, step: int, but: int | None = None) -> Tensor:
        """Give single steps back while one fits, each time to the group that closes most.

        Args:
            kept: Channels kept in each group, shape ``[num_groups]``.
            step: What the channels given back make a multiple of.
            but: The index of a group that gets none.
        """
        while True:
            higher = self._higher(kept, step)
            grows = (higher > kept) & (higher <= self._most)
            if but is not None:
                grows[but] = False
            best = self._costliest(_one_changed(kept, higher)[grows])
            if best is None:
                return kept
            kept, cost = best
            if cost >= self._window.lowest:
                return kept

    def _grown_once(self, kept: Tensor, step: int) -> Tensor:
        """Give a single group as many of these steps back as close most."""
        rows, higher = [kept[None]], kept
        for _ in range(0, self._reach, step):
            higher = torch.minimum(self._higher(higher, step), self._most)
            rows.append(_one_changed(kept, higher))
        best = self._costliest(torch.cat(rows))
        return kept if best is None else best[0]

    def _shrunk_once(self, step: int) -> Tensor:
        """Take from ``above``, in a single group, as few of these steps as the target demands."""
        rows, lower = [self._below[None]], self._above
        for _ in range(0, self._reach, step):
            lower = self._lower(lower, step)
            rows.append(_one_changed(self._above, lower))
        best = self._costliest(torch.cat(rows))
        return self._below if best is None else best[0]

    def _swapped(self, kept: Tensor, step: int) -> Tensor:
        """Take from one group and give steps to others, as near to ``below`` as can be."""
        swaps = [kept]
        for size in halvings(self._reach):
            if size % step:
                continue
            lower = self._lower(kept, size)
            taken = (lower < kept).nonzero().flatten().tolist()
            without = _one_changed(kept, lower)
            swaps += [self._grown(without[index], step, but=index) for index in taken]
        rows = torch.stack(swaps)
        meets = self._cost.of_each(rows) >= self._window.lowest
        far = ((rows - self._below).abs() / self._full).sum(1)
        return rows[int(torch.where(meets, far, math.inf).argmin())]

    def _costliest(self, rows: Tensor) -> tuple[Tensor, float] | None:
        """The costliest of the rows that the target allows, and what it costs."""
        costs = self._cost.of_each(rows)
        costs = torch.where(costs <= self._window.highest, costs, -math.inf)
        if not bool((costs > -math.inf).any()):
            return None
        best = int(costs.argmax())
        return rows[best], float(costs[best])

    def _higher(self, kept: Tensor, step: int) -> Tensor:
        """The next multiples above the channels kept, or all channels where there is none."""
        steps = self._steps(step)
        return torch.minimum((kept // steps + 1) * steps, self._full)

    def _lower(self, kept: Tensor, step: int) -> Tensor:
        """The next multiples below the channels kept, or these where that would be too few."""
        steps = self._steps(step)
        lower = (kept - 1) // steps * steps
        return torch.where(lower >= self._least, lower, kept)

    def _steps(self, round_to: int) -> Tensor:
        return torch.tensor([rounding_step(g, round_to) for g in self._order.groups.groups])


def _one_changed(kept: Tensor, changed: Tensor) -> Tensor:
    """Row i keeps ``changed[i]`` in group i and as many as before in the others."""
    return torch.where(torch.eye(len(kept), dtype=torch.bool), changed, kept)

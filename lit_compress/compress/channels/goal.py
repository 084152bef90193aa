"""ChannelGoal: what channel pruning should reach, as a user declares it, and the plan for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from torch import Tensor, nn

from lit_compress.compress.channels.budget import meet_target
from lit_compress.compress.channels.costs import PlanCost
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.order import (
    RemovalOrder,
    check_pruning_ratio,
    plan_from_ratios,
    plan_from_scores,
    ratios_of_groups,
    uniform_plan,
)
from lit_compress.compress.channels.plan import ChannelPlan

__all__ = ["ChannelAllocation", "ChannelGoal", "PruningRatio", "check_count"]

ChannelAllocation: TypeAlias = Literal["uniform", "global"]
PruningRatio: TypeAlias = float | list[float] | dict[str, float]

_SEARCHED = "searched"
LATENCY_TOLERANCE = 0.05
"""How far below its target a latency may lie; the others may lie 1 % below."""


@dataclass(frozen=True)
class ChannelGoal:
    """Which channels are to be left in the end: by number, by ratio or by what the model may cost.

    Attributes:
        pruning_ratio: Channels removed ÷ original: one for every group, a list with one for each,
            or by name patterns of groups. Beside a target, a list or mapping gives the proportions.
        plan: The numbers themselves, the path of a JSON file with them, or ``"searched"`` where a
            search is to find them; then a plan has to take its place before :meth:`resolve`.
        target_macs_ratio: MACs kept ÷ dense, in (0, 1].
        target_params_ratio: Parameters kept ÷ dense, in (0, 1].
        target_size_bytes: Bytes of the weights' file.
        target_latency_ms: Milliseconds of one forward pass of one example.
        allocation: How a ratio or target is shared: ``"uniform"`` (the same ratio in each group) or
            ``"global"`` (channels of least importance in the whole model go first).
        round_to: Kept channels are multiples of it, at least 1.

    Raises:
        ValueError: If none or several ways to say it are given, or a value is out of range.
    """

    pruning_ratio: PruningRatio | None = None
    plan: ChannelPlan | str | Path | None = None
    target_macs_ratio: float | None = None
    target_params_ratio: float | None = None
    target_size_bytes: int | None = None
    target_latency_ms: float | None = None
    allocation: ChannelAllocation = "uniform"
    round_to: int = 8

    def __post_init__(self) -> None:
        given = [name for name in _TARGETS if getattr(self, name) is not None]
        proportions = isinstance(self.pruning_ratio, (list, dict)) and bool(given)
        ways = [n for n in ("pruning_ratio", "plan") if getattr(self, n) is not None] + given
        if len(ways) - proportions != 1:
            raise ValueError(
                f"{' and '.join(ways) or 'nothing'} was given to say how many channels are to go; "
                "give exactly one of pruning_ratio, plan, "
                f"{', '.join(_TARGETS)} (beside a target, a pruning_ratio by list or mapping gives "
                "the proportions)."
            )
        if self.allocation not in ("uniform", "global"):
            raise ValueError(f"allocation is {self.allocation!r}, expected 'uniform' or 'global'.")
        if self.allocation == "global" and isinstance(self.pruning_ratio, (list, dict)):
            raise ValueError(
                "allocation='global' finds out how much each group loses, and pruning_ratio says "
                "it for each; give a single number or allocation='uniform'."
            )
        check_count("round_to", self.round_to)
        for name in given:
            _check_target(name, getattr(self, name))
        _check_ratios(self.pruning_ratio)
        if not isinstance(self.plan, (ChannelPlan, str, Path, type(None))):
            raise ValueError(
                f"plan is {self.plan!r}, expected a ChannelPlan or the path of its JSON file."
            )
        if self.waits_for_search:
            return
        if isinstance(self.plan, (str, Path)) and not Path(self.plan).is_file():
            raise ValueError(f"plan is {str(self.plan)!r}, and there is no such file.")

    @property
    def waits_for_search(self) -> bool:
        """Whether the plan is still to be found."""
        return self.plan == _SEARCHED

    @property
    def needs_latency(self) -> bool:
        """Whether the plan depends on measured latency."""
        return self.target_latency_ms is not None

    def resolve(
        self,
        groups: ChannelGroups,
        model: nn.Module,
        scores: Tensor,
        layer_macs: Mapping[str, int],
        latency_ms: Callable[[ChannelPlan], float],
        prefix: str = "",
    ) -> ChannelPlan:
        """The plan for a model.

        Args:
            groups: The channels of the dense model.
            model: The dense model.
            scores: How much each channel matters, shape ``[groups.num_channels]``; comparable
                between groups where ``allocation`` is ``"global"``.
            layer_macs: MACs of each layer of the dense model, by module name.
            latency_ms: Measures the model that a plan leaves; called only for a latency target.
            prefix: Dotted name of the model in a LightningModule, which patterns may begin with.

        Raises:
            ValueError: If a plan is for another model or its file is damaged, a name pattern
                matches no group, or the target cannot be reached.
        """
        assert not self.waits_for_search, "a plan takes the place of 'searched' before"
        if self.plan is not None:
            plan = self.plan if isinstance(self.plan, ChannelPlan) else ChannelPlan.load(self.plan)
            plan.check(groups)
            return plan
        ratios = None
        if isinstance(self.pruning_ratio, (list, dict)):
            ratios = ratios_of_groups(groups, self.pruning_ratio, prefix)
        if self.allocation == "global":
            order = RemovalOrder.by_scores(groups, scores, round_to=self.round_to)
        else:
            order = RemovalOrder.by_ratios(groups, ratios, round_to=self.round_to)
        if self.target_macs_ratio is not None:
            cost = PlanCost.macs(groups, model, layer_macs)
            return meet_target(order, cost, self.target_macs_ratio * cost(order.plan(0)))
        if self.target_params_ratio is not None:
            cost = PlanCost.num_params(groups, model)
            return meet_target(order, cost, self.target_params_ratio * cost(order.plan(0)))
        if self.target_size_bytes is not None:
            return meet_target(order, PlanCost.size_bytes(groups, model), self.target_size_bytes)
        if self.target_latency_ms is not None:
            return meet_target(
                order, latency_ms, self.target_latency_ms, tolerance=LATENCY_TOLERANCE
            )
        if ratios is not None:
            return plan_from_ratios(groups, ratios, round_to=self.round_to)
        ratio = self.pruning_ratio
        assert isinstance(ratio, (int, float)), "__post_init__ has seen to it"
        if self.allocation == "global":
            return plan_from_scores(groups, scores, ratio, round_to=self.round_to)
        return uniform_plan(groups, ratio, round_to=self.round_to)


_TARGETS = ("target_macs_ratio", "target_params_ratio", "target_size_bytes", "target_latency_ms")


def check_count(name: str, count: int) -> None:
    """Refuse what is no positive whole number.

    Raises:
        ValueError: If ``count`` is not an int from 1 on.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} is {count!r}, expected a whole number from 1 on.")


def _check_ratios(ratios: object) -> None:
    if isinstance(ratios, (list, dict)):
        named = ratios.items() if isinstance(ratios, dict) else enumerate(ratios)
        shown = {f"pruning_ratio[{key!r}]": ratio for key, ratio in named}
    else:
        shown = {} if ratios is None else {"pruning_ratio": ratios}
    for name, ratio in shown.items():
        if not isinstance(ratio, (int, float)):
            raise ValueError(
                f"{name} is {ratio!r}, expected a number in [0, 1), or for pruning_ratio itself "
                "also a list of them or a mapping from name patterns."
            )
        check_pruning_ratio(name, ratio)


def _check_target(name: str, target: float) -> None:
    is_number = isinstance(target, (int, float)) and not isinstance(target, bool)
    if not is_number or not math.isfinite(target) or target <= 0:
        raise ValueError(f"{name} is {target!r}, expected a positive number.")
    if name.endswith("ratio") and target > 1:
        raise ValueError(
            f"{name} is {target}, expected what is kept ÷ dense, in (0, 1]. For half of it "
            f"write {name}=0.5."
        )

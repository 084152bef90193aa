"""The search space over channels of each group: the problem, and networks of choices."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.costs import PlanCost
from lit_compress.compress.channels.groups import ChannelGroup, ChannelGroups
from lit_compress.compress.channels.plan import ChannelPlan, rounding_step
from lit_compress.compress.channels.slim_copies import SlimCopies
from lit_compress.search.layer_features import layer_features
from lit_compress.search.problem import Budget, Choice, Cost, Decision, RatioProblem, chosen_levels

__all__ = ["ChannelSpace"]


class ChannelSpace:
    """Makes problems of a network's channel groups, and the network of each choice.

    Layers that a residual sum, a concatenation or a depthwise convolution ties share one decision.

    Args:
        network: The dense network.
        groups: Its channels.
        copies: Makes slim copies of it.
        layer_macs: MACs of each layer for one example, by module name.
        round_to: Channels kept are multiples of it where a group has more.
        min_preserve_ratio: No group keeps a smaller share of its channels, in (0, 1].
        latency_ms: Milliseconds of many plans: int64 ``[n, num_groups]`` of channels kept to
            float64 ``[n]``; without it there is no cost of that name.

    Raises:
        ValueError: If an argument is out of range.
    """

    name = "channels"
    worth: tuple[Tensor, ...] | None = None

    def __init__(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        copies: SlimCopies,
        layer_macs: Mapping[str, int],
        *,
        round_to: int = 8,
        min_preserve_ratio: float = 0.2,
        latency_ms: Cost | None = None,
    ) -> None:
        if not 0 < min_preserve_ratio <= 1:
            raise ValueError(
                f"min_preserve_ratio is {min_preserve_ratio}, expected a share of channels in "
                "(0, 1]."
            )
        self.groups = groups
        self._copies = copies
        described = layer_features(network, [g.name for g in groups.groups], layer_macs)
        self.decisions = tuple(
            Decision(
                group.name,
                channel_levels(group, round_to, min_preserve_ratio),
                group.num_channels,
                features,
            )
            for group, features in zip(groups.groups, described, strict=True)
        )
        plan_costs = {
            "macs": PlanCost.macs(groups, network, layer_macs),
            "num_params": PlanCost.num_params(groups, network),
            "size_bytes": PlanCost.size_bytes(groups, network),
        }
        self.costs: dict[str, Cost] = {name: _of_values(c) for name, c in plan_costs.items()}
        if latency_ms is not None:
            self.costs["latency_ms"] = latency_ms

    def problem(self, budget: Budget | None) -> RatioProblem:
        """The problem under a budget.

        Raises:
            ValueError: As :class:`~lit_compress.search.problem.RatioProblem`.
        """
        return RatioProblem(self.decisions, self.costs, budget)

    def plan(self, choice: Choice) -> ChannelPlan:
        """The plan of a choice."""
        kept = {name: int(level) for name, level in chosen_levels(self.decisions, choice).items()}
        return ChannelPlan(kept, {decision.name: int(decision.full) for decision in self.decisions})

    def network(self, choice: Choice) -> nn.Module:
        """The slim network of a choice, in evaluation mode."""
        return self._copies(self.plan(choice)).eval()


def channel_levels(
    group: ChannelGroup, round_to: int = 8, min_preserve_ratio: float = 0.2
) -> tuple[float, ...]:
    """Channels that a group can keep.

    Args:
        group: The group.
        round_to: They are multiples of it (and of the group's blocks), where the group has more.
        min_preserve_ratio: The least share that is kept, in (0, 1].

    Returns:
        Rising whole numbers, the last of which is all channels.

    Examples:
        >>> channel_levels(ChannelGroup("conv", 36), 8, 0.2)
        (8.0, 16.0, 24.0, 32.0, 36.0)
    """
    step = rounding_step(group, round_to)
    least = max(math.ceil(min_preserve_ratio * group.num_channels / step - 1e-9), 1) * step
    multiples = range(least, group.num_channels, step)
    return (*map(float, multiples), float(group.num_channels))


def _of_values(cost: PlanCost) -> Cost:
    def of_values(values: Tensor) -> Tensor:
        return cost.of_each(values.to(torch.int64))

    return of_values

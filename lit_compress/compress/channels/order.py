"""The order in which groups give up channels, and the nested plans that follow from it.

Every rule for sharing a pruning ratio among the groups (the same ratio for all, given ratios,
global ranking) is an order in which the groups give up channels, one rounding step at a time. The
plans of a rule are the beginnings of its order, so they are nested: a higher ratio never keeps
more channels in any group. A target is met by looking for the right beginning
(:mod:`~lit_compress.compress.channels.budget`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from lit_compress.compress.channels.groups import ChannelGroup, ChannelGroups
from lit_compress.compress.channels.plan import ChannelPlan, check_scores, rounding_step
from lit_compress.compress.layers import match_layers

__all__ = [
    "Removal",
    "RemovalOrder",
    "check_pruning_ratio",
    "plan_from_ratios",
    "plan_from_scores",
    "ratios_of_groups",
    "uniform_plan",
]


class Removal(NamedTuple):
    """One rounding step of channels that one group gives up.

    Attributes:
        group: The group's index.
        kept: Channels that it has left afterwards.
        due: When, on the scale of the rule: the ratio at which half of the step is due, or the
            mean score of the channels that go.
        round_to: What ``kept`` was rounded to.
    """

    group: int
    kept: int
    due: float
    round_to: int


@dataclass(frozen=True, eq=False)
class RemovalOrder:
    """The order in which groups give up channels.

    Attributes:
        groups: The channels of the model.
        round_to: Kept channels are multiples of it, where the group has more.
        removals: What goes, first to last. After those rounded to ``round_to`` come those rounded
            to half of it, and so on to single channels; only targets that cannot be met otherwise
            get there.
    """

    groups: ChannelGroups
    round_to: int
    removals: tuple[Removal, ...]

    @classmethod
    def by_ratios(
        cls,
        groups: ChannelGroups,
        ratios: Mapping[str, float] | Sequence[float] | None = None,
        *,
        round_to: int = 8,
        max_pruning_ratio: float = 1.0,
    ) -> RemovalOrder:
        """Groups give up channels in proportion to ratios.

        At scale s a group with ratio r is to lose the share ``s * r`` of its channels, rounded to
        the nearest multiple of ``round_to``, where a tie keeps more.

        Args:
            groups: The channels of the model.
            ratios: As for :func:`plan_from_ratios`; by default the same for all groups.
            round_to: As for :func:`uniform_plan`.
            max_pruning_ratio: No group loses a larger share of its channels, in [0, 1].

        Raises:
            ValueError: As :func:`plan_from_ratios`.
        """
        shares = [1.0] * len(groups.groups) if ratios is None else ratios_of_groups(groups, ratios)

        def due(group: int, upper: int, lower: int) -> float:
            lost = 1 - (upper + lower) / 2 / groups.groups[group].num_channels
            return lost / shares[group] if shares[group] else math.inf

        return cls._sorted(groups, round_to, max_pruning_ratio, due)

    @classmethod
    def by_scores(
        cls,
        groups: ChannelGroups,
        scores: Tensor,
        *,
        round_to: int = 8,
        max_pruning_ratio: float = 0.9,
    ) -> RemovalOrder:
        """The channels with the least scores of the whole model go first.

        They go a rounding step at a time: the least of each group together (of each of its blocks
        the same number), the step with the least mean score first.

        Args:
            groups: The channels of the model.
            scores: How much each channel matters, shape ``[num_channels]``, comparable between
                groups.
            round_to: As for :func:`uniform_plan`.
            max_pruning_ratio: No group loses a larger share of its channels, in [0, 1].

        Raises:
            ValueError: If ``scores`` has another shape or holds a number that is not finite, or
                an argument is out of range.
        """
        checked = check_scores(groups, scores)
        ranked = [
            checked[start : start + group.num_channels].view(group.num_blocks, -1).sort(1).values
            for group, start in zip(groups.groups, groups.starts, strict=False)
        ]

        def due(group: int, upper: int, lower: int) -> float:
            num_blocks, length = ranked[group].shape
            gone = ranked[group][:, length - upper // num_blocks : length - lower // num_blocks]
            return float(gone.mean())

        return cls._sorted(groups, round_to, max_pruning_ratio, due)

    @classmethod
    def _sorted(
        cls,
        groups: ChannelGroups,
        round_to: int,
        max_pruning_ratio: float,
        due: Callable[[int, int, int], float],
    ) -> RemovalOrder:
        if not 0 <= max_pruning_ratio <= 1:
            raise ValueError(
                f"max_pruning_ratio is {max_pruning_ratio}, expected a share of channels in [0, 1]."
            )
        removals = []
        for index, group in enumerate(groups.groups):
            kept, latest = group.num_channels, -math.inf
            for step in halvings(round_to):
                values = _kept_values(group, kept, step, max_pruning_ratio)
                for upper, lower in pairwise(values):
                    # Within a group nothing may overtake, whatever the rounding of means.
                    latest = max(latest, due(index, upper, lower))
                    removals.append(Removal(index, lower, latest, step))
                kept = values[-1]
        removals = [removal for removal in removals if removal.due < math.inf]
        removals.sort(key=lambda removal: (-removal.round_to, removal.due))
        return cls(groups, round_to, tuple(removals))

    @property
    def num_rounded(self) -> int:
        """How many of the removals, the first, are rounded to ``round_to``."""
        return sum(removal.round_to == self.round_to for removal in self.removals)

    def kept(self, num_removals: int) -> list[int]:
        """Channels left in each group after the first ``num_removals`` removals."""
        kept = [group.num_channels for group in self.groups.groups]
        for removal in self.removals[:num_removals]:
            kept[removal.group] = removal.kept
        return kept

    def plan(self, num_removals: int) -> ChannelPlan:
        """The plan of the first ``num_removals`` removals."""
        return plan_of(self.groups, self.kept(num_removals))


def uniform_plan(groups: ChannelGroups, pruning_ratio: float, *, round_to: int = 8) -> ChannelPlan:
    """Every group loses the same share of its channels.

    Args:
        groups: The channels of the model.
        pruning_ratio: Channels removed ÷ original, in [0, 1).
        round_to: Kept channels are multiples of it (and of the group's blocks), to the nearest,
            where a tie keeps more; at least one multiple is kept. Groups with no more channels
            than that are not rounded. 1 rounds nothing.

    Raises:
        ValueError: If ``pruning_ratio`` or ``round_to`` is out of range.
    """
    check_pruning_ratio("pruning_ratio", pruning_ratio)
    return _plan_at(RemovalOrder.by_ratios(groups, round_to=round_to), pruning_ratio)


def plan_from_ratios(
    groups: ChannelGroups,
    ratios: Mapping[str, float] | Sequence[float],
    *,
    round_to: int = 8,
) -> ChannelPlan:
    """Every group loses its own share of its channels.

    Args:
        groups: The channels of the model.
        ratios: As for :func:`ratios_of_groups`.
        round_to: As for :func:`uniform_plan`.

    Raises:
        ValueError: If ``round_to`` is out of range, or as :func:`ratios_of_groups`.
    """
    return _plan_at(RemovalOrder.by_ratios(groups, ratios, round_to=round_to), 1.0)


def plan_from_scores(
    groups: ChannelGroups,
    scores: Tensor,
    pruning_ratio: float,
    *,
    round_to: int = 8,
    max_pruning_ratio: float = 0.9,
) -> ChannelPlan:
    """The channels with the least scores of the whole model go, wherever they are.

    Args:
        groups: The channels of the model.
        scores: How much each channel matters, shape ``[num_channels]``, comparable between groups.
        pruning_ratio: Channels removed ÷ original over all groups together, in
            [0, ``max_pruning_ratio``]; met as nearly as ``round_to`` allows.
        round_to: As for :func:`uniform_plan`.
        max_pruning_ratio: No group loses a larger share of its channels, in [0, 1].

    Raises:
        ValueError: If a number is out of range, or ``scores`` has another shape or holds a number
            that is not finite.
    """
    check_pruning_ratio("pruning_ratio", pruning_ratio)
    if pruning_ratio > max_pruning_ratio:
        raise ValueError(
            f"pruning_ratio is {pruning_ratio}, above max_pruning_ratio={max_pruning_ratio}, which "
            "no group may exceed; raise max_pruning_ratio."
        )
    order = RemovalOrder.by_scores(
        groups, scores, round_to=round_to, max_pruning_ratio=max_pruning_ratio
    )
    kept = [group.num_channels for group in groups.groups]
    removed = [0]
    for removal in order.removals[: order.num_rounded]:
        removed.append(removed[-1] + kept[removal.group] - removal.kept)
        kept[removal.group] = removal.kept
    wanted = pruning_ratio * groups.num_channels
    return order.plan(min(range(len(removed)), key=lambda n: abs(removed[n] - wanted)))


def check_pruning_ratio(name: str, ratio: float) -> None:
    """Refuse what is no pruning ratio.

    Raises:
        ValueError: If ``ratio`` is not a number in [0, 1).
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise ValueError(f"{name} is {ratio!r}, expected a number in [0, 1).")
    if not 0 <= ratio < 1:
        hint = f" For {ratio} % write {ratio / 100}." if 1 < ratio < 100 else ""
        raise ValueError(
            f"{name} is {ratio}, expected a share of channels to remove in [0, 1).{hint}"
            + (" A layer without channels computes nothing." if ratio == 1 else "")
        )


def halvings(round_to: int) -> list[int]:
    """``round_to``, half of it, and so on down to 1."""
    steps = [round_to]
    while steps[-1] > 1:
        steps.append(steps[-1] // 2)
    return steps


def plan_of(groups: ChannelGroups, kept: Sequence[int]) -> ChannelPlan:
    """The plan that keeps these numbers of channels, one for each group in their order."""
    channels = {group.name: group.num_channels for group in groups.groups}
    return ChannelPlan(dict(zip(channels, kept, strict=True)), channels)


def _plan_at(order: RemovalOrder, scale: float) -> ChannelPlan:
    """The plan of the removals that are due at a scale, rounded ones only."""
    # A tie keeps more; the slack is for the rounding of ratios such as 0.1.
    due = [r.due < scale - 1e-9 for r in order.removals if r.round_to == order.round_to]
    return order.plan(sum(due))


def _kept_values(
    group: ChannelGroup, most: int, round_to: int, max_pruning_ratio: float
) -> list[int]:
    """``most`` and the multiples below it that a group may keep, descending."""
    step = rounding_step(group, round_to)
    # 16 * (1 - 0.9) is a little above 1.6 in floating point, 20 * (1 - 0.9) a little below 2.
    least = max(group.num_blocks, math.ceil(group.num_channels * (1 - max_pruning_ratio) - 1e-9))
    return [most, *range((most - 1) // step * step, least - 1, -step)]


def ratios_of_groups(
    groups: ChannelGroups, ratios: Mapping[str, float] | Sequence[float], prefix: str = ""
) -> list[float]:
    """One ratio for each group.

    Args:
        groups: The channels of the model.
        ratios: Channels removed ÷ original, in [0, 1). Either by name pattern, of which the first
            that matches a group's name counts (see
            :func:`~lit_compress.compress.layers.match_layers`), and groups that none matches stay
            as they are; or one for each group, in their order.
        prefix: Dotted name of the model in a LightningModule, which patterns may begin with.

    Raises:
        ValueError: If a ratio is out of range, a pattern matches no group (the nearest names are
            given), or there are more or fewer ratios than groups.
    """
    names = [group.name for group in groups.groups]
    if isinstance(ratios, Mapping):
        for glob, ratio in ratios.items():
            check_pruning_ratio(f"pruning_ratio[{glob!r}]", ratio)
        matched = match_layers("pruning_ratio", ratios, names, prefix)
        return [ratios[matched[name]] if name in matched else 0.0 for name in names]
    if len(ratios) != len(names):
        raise ValueError(
            f"pruning_ratio lists {len(ratios)} ratios and the model has {len(names)} groups; give "
            f"one for each of {', '.join(names)}, in this order, or a mapping from names."
        )
    for name, ratio in zip(names, ratios, strict=True):
        check_pruning_ratio(f"pruning_ratio of group {name!r}", ratio)
    return list(ratios)

"""ChannelProgress: how far a model is on the way from dense to its plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from torch import Tensor

from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.plan import ChannelPlan, choose_channels

__all__ = ["ChannelProgress", "Spread"]

Spread: TypeAlias = Literal["channels", "layers"]


class ChannelProgress:
    """A model's channels, from dense to what a plan leaves.

    Attributes:
        dense: The groups before the first cut.
        now: The groups as they are; the owner of the model sets it after each cut.
        plan: What is to be left in the end.

    Args:
        groups: The groups of the dense model.
        plan: For the dense model.
        spread: ``"channels"``: part of the way, every group has lost a part of what it is to lose;
            ``"layers"``: some groups, from the first on, have lost all of it and the others
            nothing (PocketFlow's group fine-tuning).
        round_to: Channels kept on the way are multiples of it.
        now: The groups as they are, where the model was cut before; a group without any channel
            to spare may be missing.

    Raises:
        ValueError: If the plan is for another model, ``spread`` is unknown, or fewer channels are
            left already than the plan keeps.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        plan: ChannelPlan,
        spread: Spread = "channels",
        round_to: int = 8,
        now: ChannelGroups | None = None,
    ) -> None:
        check_spread(spread)
        plan.check(groups)
        self.dense = groups
        self.now = groups if now is None else now
        self.plan = plan
        self._refuse_way_back()
        self._spread = spread
        self._round_to = round_to

    def due(self, fraction: float) -> ChannelPlan:
        """What is to be left after a part of the way, as a plan for the model as it is.

        Args:
            fraction: The part of the way, in [0, 1]. What is gone by then stays gone.
        """
        if self._spread == "channels":
            part = self.plan.part_way(self.dense, fraction, round_to=self._round_to)
        else:
            names = [group.name for group in self.dense.groups if group.name in self.plan.kept]
            done = names[: round(fraction * len(names))]
            part = ChannelPlan(
                {name: self.plan.kept[name] for name in done},
                {name: self.plan.channels[name] for name in done},
            )
        left = {name: channels for name, channels in self.kept.items() if name in part.kept}
        return ChannelPlan({name: min(part.kept[name], n) for name, n in left.items()}, left)

    def choose(self, fraction: float, scores: Tensor) -> Tensor:
        """The channels that stay after a part of the way: those with the highest scores.

        Args:
            fraction: As for :meth:`due`.
            scores: Shape ``[now.num_channels]``.

        Returns:
            bool, shape ``[now.num_channels]``.
        """
        return choose_channels(self.now, self.due(fraction), scores)

    @property
    def kept(self) -> dict[str, int]:
        """Channels that each group has now, by name."""
        return {group.name: group.num_channels for group in self.now.groups}

    def _refuse_way_back(self) -> None:
        for name, kept in self.plan.kept.items():
            if kept > (left := self.kept.get(name, 1)):
                raise ValueError(
                    f"the plan keeps {kept} of the {self.plan.channels[name]} channels of group "
                    f"{name!r}, and an earlier cut left {left}; channels do not come back. Ratios "
                    "and targets are relative to the dense model: ask for fewer, or start with the "
                    "dense model or an earlier checkpoint."
                )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, for a checkpoint."""
        return {
            "dense": self.dense.state_dict(),
            "now": self.now.state_dict(),
            "plan": self.plan.to_json(),
            "spread": self._spread,
            "round_to": self._round_to,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ChannelProgress:
        """What :meth:`state_dict` wrote."""
        dense = ChannelGroups.from_state_dict(state["dense"])
        plan = ChannelPlan.from_json(state["plan"])
        now = ChannelGroups.from_state_dict(state["now"])
        return cls(dense, plan, state["spread"], state["round_to"], now)


def check_spread(spread: str) -> None:
    """Refuse what is no way to spread a plan.

    Raises:
        ValueError: If ``spread`` is unknown.
    """
    if spread not in ("channels", "layers"):
        raise ValueError(f"spread is {spread!r}, expected 'channels' or 'layers'.")

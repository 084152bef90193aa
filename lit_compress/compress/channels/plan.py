"""ChannelPlan: how many channels each group keeps; which channels those are.

A :class:`ChannelPlan` is data: it is made once (from a ratio, by ranking, for a target, by a
search), written as JSON, read by people, and carried out by a cut.
:mod:`~lit_compress.compress.channels.order` and :mod:`~lit_compress.compress.channels.budget` make
plans.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_compress.compress.channels.groups import ChannelGroup, ChannelGroups
from lit_compress.files import write_text

__all__ = ["ChannelPlan", "check_scores", "choose_channels", "rounding_step"]


@dataclass(frozen=True)
class ChannelPlan:
    """How many channels each group keeps.

    Groups of the model that the plan does not name keep all of their channels.

    Attributes:
        kept: Channels that stay, by the group's name, each in ``[1, channels[name]]``.
        channels: Channels that there were, by the same names.

    Raises:
        ValueError: If the names differ or a number is out of range.

    Example:
        >>> plan = ChannelPlan(kept={"conv1": 24, "conv2": 64}, channels={"conv1": 32, "conv2": 64})
        >>> print(plan)
        group  channels  kept  pruning ratio
        conv1        32    24          25.0%
        conv2        64    64           0.0%
        total        96    88           8.3%
        >>> ChannelPlan.from_json(plan.to_json()) == plan
        True
    """

    kept: Mapping[str, int]
    channels: Mapping[str, int]

    def __post_init__(self) -> None:
        odd = [name for name in (*self.kept, *self.channels) if not self._names_twice(name)]
        if odd:
            where = "kept" if odd[0] in self.kept else "channels"
            raise ValueError(
                f"the plan names the group {odd[0]!r} in {where} only; expected the same names in "
                "kept and channels."
            )
        for name, kept in self.kept.items():
            channels = self.channels[name]
            if not _is_count(channels) or channels < 1:
                raise ValueError(
                    f"the plan gives group {name!r} {channels!r} channels, expected a whole number "
                    "of at least 1."
                )
            if not _is_count(kept) or not 1 <= kept <= channels:
                raise ValueError(
                    f"the plan keeps {kept!r} channels of group {name!r}, expected a whole number "
                    f"from 1 to {channels}; to remove a layer altogether change the model."
                )
        object.__setattr__(self, "kept", dict(self.kept))
        object.__setattr__(self, "channels", {name: self.channels[name] for name in self.kept})

    @property
    def pruning_ratios(self) -> dict[str, float]:
        """Channels removed ÷ original, in [0, 1), by group."""
        return {name: 1 - kept / self.channels[name] for name, kept in self.kept.items()}

    def check(self, groups: ChannelGroups) -> None:
        """Refuse a model that this is no plan for.

        Args:
            groups: The channels of the model.

        Raises:
            ValueError: If a group of the plan is not among the model's, has another number of
                channels there, or could not keep as many because its blocks must stay equal. The
                first mismatch is named.
        """
        found = {group.name: group for group in groups.groups}
        for name, kept in self.kept.items():
            group = found.get(name)
            if group is None:
                raise ValueError(
                    f"the plan has a group {name!r} and the model has none of that name; its "
                    f"groups are {_some(list(found))}. Is the plan for another model?"
                )
            if group.num_channels != self.channels[name]:
                raise ValueError(
                    f"the plan is for {self.channels[name]} channels in group {name!r} and the "
                    f"model has {group.num_channels}; use the plan on the model that it was made "
                    "for, before any cut."
                )
            if kept % group.num_blocks:
                low = kept // group.num_blocks * group.num_blocks
                nearest = [n for n in (low, low + group.num_blocks) if n]
                raise ValueError(
                    f"the plan keeps {kept} channels of group {name!r}, whose {group.num_blocks} "
                    "blocks must keep the same number each; keep "
                    f"{' or '.join(map(str, nearest))}."
                )

    def kept_in(self, groups: ChannelGroups) -> dict[str, int]:
        """Channels that stay in every group of a model, those included that the plan leaves alone.

        Args:
            groups: The channels of the model.

        Returns:
            By group, in the order of ``groups``; what :meth:`ChannelGroups.axis_sizes` takes.

        Raises:
            ValueError: As :meth:`check`.
        """
        self.check(groups)
        return {g.name: self.kept.get(g.name, g.num_channels) for g in groups.groups}

    def part_way(self, groups: ChannelGroups, fraction: float, *, round_to: int = 8) -> ChannelPlan:
        """The plan after a part of the way from the dense model to this plan.

        Of each group ``fraction`` of the channels that are to go are gone, to the nearest multiple
        of ``round_to`` or end of the way; a tie keeps more. The numbers never rise with
        ``fraction``.

        Args:
            groups: The channels of the dense model.
            fraction: The part of the way, in [0, 1]: 0 keeps everything, 1 is this plan.
            round_to: As for :func:`~lit_compress.compress.channels.order.uniform_plan`.

        Returns:
            A plan for the dense model.

        Raises:
            ValueError: If ``fraction`` or ``round_to`` is out of range, or as :meth:`check`.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction is {fraction}, expected a part of the way in [0, 1].")
        self.check(groups)
        part = {}
        for name, kept in self.kept.items():
            channels = self.channels[name]
            step = rounding_step(groups[name], round_to)
            wish = channels - (channels - kept) * fraction
            multiple = math.floor(wish / step) * step
            low, high = max(multiple, kept), min(multiple + step, channels)
            part[name] = high if high - wish <= wish - low else low
        return ChannelPlan(part, self.channels)

    def for_cut_model(self, groups: ChannelGroups) -> ChannelPlan:
        """The same plan for a model that was cut part of the way to it.

        Args:
            groups: The channels that the model still has (:meth:`ChannelGroups.after`).

        Returns:
            A plan that keeps the same numbers, out of those that are left.

        Raises:
            ValueError: If a group has fewer channels left than the plan keeps, or more than the
                plan was made for, or as :meth:`check`.
        """
        left = {group.name: group.num_channels for group in groups.groups}
        for name, kept in self.kept.items():
            if name in left and not kept <= left[name] <= self.channels[name]:
                raise ValueError(
                    f"the plan takes group {name!r} from {self.channels[name]} channels to {kept} "
                    f"and the model has {left[name]}, which is not on the way."
                )
        cut = ChannelPlan(self.kept, {name: left.get(name, n) for name, n in self.channels.items()})
        cut.check(groups)
        return cut

    def to_json(self) -> str:
        """The plan as JSON: for each group ``{"channels": 32, "kept": 24}``."""
        numbers = {n: {"channels": self.channels[n], "kept": kept} for n, kept in self.kept.items()}
        lines = [f"  {json.dumps(name)}: {json.dumps(pair)}" for name, pair in numbers.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> ChannelPlan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is no JSON, has another structure or holds numbers that are no
                plan.
        """
        try:
            numbers = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the text is no JSON ({error}); expected a channel plan.") from error
        if not isinstance(numbers, dict):
            raise ValueError(
                f"the JSON holds a {type(numbers).__name__}, expected a channel plan: an object "
                'with {"channels": 32, "kept": 24} for each group.'
            )
        for name, pair in numbers.items():
            if not isinstance(pair, dict) or set(pair) != {"channels", "kept"}:
                raise ValueError(
                    f"group {name!r} of the channel plan is {json.dumps(pair)}, expected an object "
                    'with two numbers as in {"channels": 32, "kept": 24}.'
                )
        return cls(
            {name: pair["kept"] for name, pair in numbers.items()},
            {name: pair["channels"] for name, pair in numbers.items()},
        )

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file, whole or not at all; folders are made."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> ChannelPlan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no plan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # UnicodeDecodeError is one too
            raise ValueError(f"{path} cannot be read as a channel plan: {error}") from error

    def __str__(self) -> str:
        total = (sum(self.channels.values()), sum(self.kept.values()))
        rows = [("group", "channels", "kept", "pruning ratio")]
        for name, channels, kept in [
            *((name, self.channels[name], kept) for name, kept in self.kept.items()),
            ("total", *total),
        ]:
            ratio = 1 - kept / channels if channels else 0.0
            rows.append((name, str(channels), str(kept), f"{ratio:.1%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        )

    def _names_twice(self, name: str) -> bool:
        return name in self.kept and name in self.channels


def choose_channels(groups: ChannelGroups, plan: ChannelPlan, scores: Tensor) -> Tensor:
    """The channels with the highest scores, exactly as many as planned.

    Args:
        groups: The channels of the model.
        plan: How many stay in each group. Where a group has blocks, each block keeps its share.
        scores: How much each channel matters, shape ``[num_channels]``, any finite numbers; only
            compared within a block. Of equal scores the channel with the lower number stays.

    Returns:
        bool, shape ``[num_channels]``, on the CPU: true where the channel stays.

    Raises:
        ValueError: If the plan is for another model, or ``scores`` has another shape or holds a
            number that is not finite.
    """
    kept = plan.kept_in(groups)
    ranked = check_scores(groups, scores)
    keep = torch.zeros(groups.num_channels, dtype=torch.bool)
    for group, start in zip(groups.groups, groups.starts, strict=False):
        span = slice(start, start + group.num_channels)
        best_first = (
            ranked[span].view(group.num_blocks, -1).argsort(dim=1, descending=True, stable=True)
        )
        chosen = best_first[:, : kept[group.name] // group.num_blocks]
        keep[span].view(group.num_blocks, -1).scatter_(1, chosen, True)
    return keep


def check_scores(groups: ChannelGroups, scores: Tensor) -> Tensor:
    """Scores of channels as float64 on the CPU.

    Args:
        groups: The channels of the model.
        scores: One number for each, shape ``[num_channels]``.

    Raises:
        ValueError: If they have another shape or one is not finite; the group is named.
    """
    if scores.shape != (groups.num_channels,):
        raise ValueError(
            f"scores have the shape {tuple(scores.shape)}, expected one number for each of the "
            f"{groups.num_channels} channels."
        )
    checked = scores.detach().to("cpu", torch.float64)
    finite = checked.isfinite()
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        at = next(i for i, start in enumerate(groups.starts[1:]) if first < start)
        raise ValueError(
            f"the score of channel {first - groups.starts[at]} in group "
            f"{groups.groups[at].name!r} is {float(checked[first])}, expected finite numbers; are "
            "the weights or gradients finite?"
        )
    return checked


def rounding_step(group: ChannelGroup, round_to: int) -> int:
    """What the kept channels of a group are a multiple of.

    Returns:
        The least common multiple of ``round_to`` and ``group.num_blocks``; only ``num_blocks``
        where the group has no more channels than that.

    Raises:
        ValueError: If ``round_to`` is no whole number of at least 1.
    """
    if not _is_count(round_to) or round_to < 1:
        raise ValueError(
            f"round_to is {round_to!r}, expected a whole number of at least 1; 1 does not round."
        )
    step = math.lcm(round_to, group.num_blocks)
    return step if step < group.num_channels else group.num_blocks


def _is_count(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _some(names: list[str], most: int = 6) -> str:
    shown = ", ".join(map(repr, names[:most])) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")

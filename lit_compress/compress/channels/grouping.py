"""Make channel groups from ties: which atoms are channels, and which channels form a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from lit_compress.compress.channels.groups import (
    AxisRole,
    ChannelAxis,
    ChannelGroup,
    ChannelGroups,
    ChannelWidth,
    LeftAlone,
)
from lit_compress.compress.channels.ties import Array
from lit_compress.compress.channels.trace_state import TraceState
from lit_compress.compress.layers import plain_name

__all__ = ["AxisKey", "Evidence", "group_channels"]

AxisKey = tuple[str, int]
"""A tensor's name and one of its dimensions."""

_UNREAD = "is read by no layer"


@dataclass(frozen=True)
class Evidence:
    """What a trace found out.

    Attributes:
        model: The module that ran.
        state: The ties between atoms, and how weights were used.
        axes: The atoms of each axis, shape ``[size]``.
        order: Every parameter and buffer that was used, by its first use.
        widths: Attributes of modules that hold a number of channels.
    """

    model: nn.Module
    state: TraceState
    axes: Mapping[AxisKey, Array]
    order: Mapping[str, int]
    widths: tuple[ChannelWidth, ...] = ()

    def role(self, key: AxisKey) -> AxisRole | None:
        """How an axis is used; ``None`` if not at all."""
        if key[0] not in self.order:
            return None
        roles = {self.state.roles.get(atom) for atom in self.axes[key].tolist()}
        return "out" if "out" in roles else "in" if "in" in roles else "scale"


def group_channels(evidence: Evidence) -> ChannelGroups:
    """Sort classes of atoms into groups of channels.

    Channels are what weights make, what something reads and what nothing pins. A group are the
    channels that the same weights make, and those that blocks bond to them.

    Args:
        evidence: What a trace found out.

    Returns:
        The groups, in the order in which the forward pass meets them.
    """
    return _Grouping(evidence).result()


class _Grouping:
    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence
        self.ties = evidence.state.ties
        self.pinned = dict(self.ties.pinned)
        used = [key for key in evidence.axes if evidence.role(key) is not None]
        self.keys = sorted(used, key=lambda key: evidence.order[key[0]])
        self.roles = {key: evidence.role(key) for key in self.keys}
        self.roots = {key: self.ties.roots(evidence.axes[key]) for key in self.keys}

    def result(self) -> ChannelGroups:
        members = self._members()
        while True:
            members, blocks, failed = self._bonded(members)
            if not failed:
                break
            members = [m for m in members if not self._give_up(m, failed)]
        members.sort(key=self._first_use)
        groups: list[ChannelGroup] = []
        ids: dict[int, int] = {}
        names: set[str] = set()
        for classes in members:
            base = name = _layer_of(self._producers(classes[0])[0][0]) or "(root)"
            number = 1
            while name in names:
                number += 1
                name = f"{base}#{number}"
            names.add(name)
            groups.append(ChannelGroup(name, len(classes), blocks[classes[0]]))
            for root in classes:
                ids[root] = len(ids)
        axes = []
        for key in self.keys:
            channels = torch.tensor([ids.get(root, -1) for root in self.roots[key].tolist()])
            role = self.roles[key]
            if role is not None and bool((channels >= 0).any()):
                axes.append(ChannelAxis(key[0], key[1], channels, role))
        left = self._left_alone(ids)
        return ChannelGroups(tuple(groups), tuple(axes), left, self.evidence.widths)

    def _give_up(self, classes: list[int], failed: set[int]) -> bool:
        """Whether some of the channels failed; then all stay, for the same reason."""
        culprit = next((root for root in classes if root in failed), None)
        if culprit is not None:
            for root in classes:
                self.pinned.setdefault(root, self.pinned[culprit])
        return culprit is not None

    def _members(self) -> list[list[int]]:
        """Classes of atoms that are made by the same layers and can be cut, group by group."""
        makers: dict[int, list[AxisKey]] = {}
        readers: set[int] = set()
        for key in self.keys:
            role = self.roles[key]
            for root in dict.fromkeys(self.roots[key].tolist()):
                if role == "out":
                    makers.setdefault(root, []).append(key)
                elif role == "in":
                    readers.add(root)
        self.makers = makers
        for atoms in self.evidence.state.contracted:
            readers.update(self.ties.roots(atoms).tolist())
        for root in makers:
            if root not in readers:
                self.pinned.setdefault(root, _UNREAD)
        by_makers: dict[tuple[AxisKey, ...], list[int]] = {}
        for root, keys in makers.items():
            if root not in self.pinned:
                by_makers.setdefault(tuple(keys), []).append(root)
        return list(by_makers.values())

    def _bonded(self, members: list[list[int]]) -> tuple[list[list[int]], dict[int, int], set[int]]:
        """Join groups that bonds hold together and order their channels by blocks.

        Returns:
            The groups, the number of blocks by the first class of each, and the classes that turned
            out to be impossible to cut.
        """
        member_of = {root: i for i, classes in enumerate(members) for root in classes}
        bonds = [self.ties.roots(rows) for rows in self.ties.bonds]
        failed: set[int] = set()
        joined = list(range(len(members)))

        def find(i: int) -> int:
            while joined[i] != i:
                i = joined[i]
            return i

        for rows in bonds:
            free = [root for root in np.unique(rows).tolist() if root in member_of]
            if free and len(free) < np.unique(rows).size:
                for root in free:
                    failed.add(root)
                    reason = "shares blocks with channels that have to stay"
                    self.pinned.setdefault(root, reason)
            for root in free[1:]:
                joined[find(member_of[root])] = find(member_of[free[0]])
        if failed:
            return members, {}, failed
        merged: dict[int, list[int]] = {}
        for i, classes in enumerate(members):
            merged.setdefault(find(i), []).extend(classes)
        blocks: dict[int, int] = {}
        ordered = []
        for classes in merged.values():
            own = set(classes)
            partition = _finest([rows for rows in bonds if own & set(rows.ravel().tolist())], own)
            if partition is None:
                for root in classes:
                    self.pinned.setdefault(root, "has blocks that contradict each other")
                failed |= own
                continue
            in_order = [root for block in partition for root in block] or classes
            blocks[in_order[0]] = max(1, len(partition))
            ordered.append(in_order)
        return (members if failed else ordered), blocks, failed

    def _producers(self, root: int) -> list[AxisKey]:
        keys = self.makers[root]
        weights = [key for key in keys if not key[0].endswith("bias")]
        return weights or keys

    def _first_use(self, classes: list[int]) -> int:
        return min(self.evidence.order[self._producers(root)[0][0]] for root in classes)

    def _left_alone(self, ids: dict[int, int]) -> tuple[LeftAlone, ...]:
        left: dict[str, str] = {}
        for key in self.keys:
            roots = self.roots[key].tolist()
            makes = self.roles[key] == "out" or key[0] in self._misunderstood
            if makes and not any(root in ids for root in roots):
                reasons = [self.pinned[r] for r in roots if r in self.pinned]
                left.setdefault(_layer(key[0]), reasons[0] if reasons else _UNREAD)
        for name, parameter in self.evidence.model.named_parameters():
            if name not in self.evidence.order and parameter.dim() > 1:
                left.setdefault(_layer(name), "was not reached by the forward pass")
        return tuple(LeftAlone(layer, reason) for layer, reason in left.items())

    @cached_property
    def _misunderstood(self) -> set[str]:
        """Weights of layers, of whose use no rule says anything."""
        roles, model = self.evidence.state.roles, self.evidence.model
        noted = {
            name
            for (name, _), atoms in self.evidence.axes.items()
            if any(atom in roles for atom in atoms.tolist())
        }
        weights = {name for name, dim in self.keys if dim > 0} - noted
        return {n for n in weights if not any(model.get_submodule(n.rpartition(".")[0]).children())}


def _layer(tensor: str) -> str:
    return _layer_of(tensor) or tensor


def _layer_of(tensor: str) -> str:
    return plain_name(tensor).rpartition(".")[0]


def _finest(bonds: list[Array], own: set[int]) -> list[list[int]] | None:
    """The finest partition that bonds ask for; ``[]`` for none, ``None`` if they contradict."""
    rows = dict.fromkeys(tuple(dict.fromkeys(row)) for bond in bonds for row in bond.tolist())
    block_of: dict[int, int] = {}
    blocks: list[list[int]] = []
    for row in sorted(rows, key=len):
        within = {block_of.get(root) for root in row}
        if within == {None}:
            block_of.update(dict.fromkeys(row, len(blocks)))
            blocks.append(list(row))
        elif len(row) != sum(len(blocks[i]) for i in within if i is not None):
            return None  # it cuts across blocks
    if blocks and (set(block_of) != own or len({len(block) for block in blocks}) > 1):
        return None
    return blocks

"""Coupled channels as data: which index of which tensor belongs to which channel.

A residual sum, a concatenation or a depthwise convolution ties channels of several layers together:
they can only be removed from all of them at once. :class:`ChannelGroups` says, for every axis of
every parameter and buffer, which channel each of its indices belongs to. That is all that is needed
to cut a model, its optimizer state, its masks and its averages, and no tracing is needed any more
once it is known. :func:`~lit_compress.compress.channels.tracing.find_channel_groups` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "AxisRole",
    "ChannelAxis",
    "ChannelGroup",
    "ChannelGroups",
    "ChannelWidth",
    "LeftAlone",
    "take",
]

AxisRole = Literal["out", "in", "scale"]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several layers that are decided on together.

    Attributes:
        name: The first layer that makes them, as ``model.named_modules`` has it.
        num_channels: How many there are, at least 1.
        num_blocks: The channels are that many equal runs of neighbours (the groups of a grouped
            convolution or norm), and each must keep the same number; 1 where there is no such
            bond. Divides ``num_channels``.
    """

    name: str
    num_channels: int
    num_blocks: int = 1


@dataclass(frozen=True, eq=False)
class ChannelAxis:
    """One dimension of one parameter or buffer.

    Attributes:
        tensor: Its name, as ``named_parameters`` or ``named_buffers`` has it.
        dim: The dimension, from 0.
        channels: For each index along it, shape ``[size]``, int64: the channel it belongs to,
            counted through all groups, or -1 where it belongs to none and always stays.
        role: ``"out"`` where a weight makes the channels (its bias too), ``"in"`` where a weight
            reads them, ``"scale"`` where each channel is treated on its own (norms, depthwise
            convolutions, per-channel factors).
    """

    tensor: str
    dim: int
    channels: Tensor
    role: AxisRole


@dataclass(frozen=True)
class LeftAlone:
    """A layer whose channels cannot be cut.

    Attributes:
        layer: Its name.
        reason: Why, to be read after the name.
    """

    layer: str
    reason: str


@dataclass(frozen=True)
class ChannelWidth:
    """An attribute of a module that holds a number of channels, and has to follow a cut.

    Those that torch's own layers have (``out_channels``, ``num_features``) follow without it.

    Attributes:
        module: The module's name; empty for the whole model.
        attribute: The attribute's name.
        tensor: A parameter that has as many channels.
        dim: Along this dimension of it.
        divisor: The attribute is the dimension's size divided by this, as for the size of a head.
    """

    module: str
    attribute: str
    tensor: str
    dim: int
    divisor: int = 1


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """All the channels of a model that can be cut.

    Channels are numbered through all groups: group 0 has the first ``groups[0].num_channels``.

    Attributes:
        groups: The groups, in the order in which the forward pass meets them.
        axes: Every axis that holds one of their channels.
        left_alone: The layers that make channels which cannot be cut, and why.
        widths: Attributes that have to follow, beside those of torch's own layers.
    """

    groups: tuple[ChannelGroup, ...]
    axes: tuple[ChannelAxis, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    widths: tuple[ChannelWidth, ...] = ()
    starts: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        starts = [0]
        for group in self.groups:
            starts.append(starts[-1] + group.num_channels)
        object.__setattr__(self, "starts", tuple(starts))

    @property
    def num_channels(self) -> int:
        """Channels of all groups together."""
        return self.starts[-1]

    def __getitem__(self, name: str) -> ChannelGroup:
        """The group of that name.

        Raises:
            KeyError: If there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"there is no group {name!r}; there are {[g.name for g in self.groups]}")

    def span(self, name: str) -> slice:
        """Where the channels of the group of that name lie among all channels.

        Raises:
            KeyError: If there is no such group.
        """
        index = self.groups.index(self[name])
        return slice(self.starts[index], self.starts[index + 1])

    def axes_of(self, name: str) -> tuple[ChannelAxis, ...]:
        """The axes that hold a channel of the group of that name.

        Raises:
            KeyError: If there is no such group.
        """
        span = self.span(name)
        return tuple(
            axis
            for axis in self.axes
            if bool(((axis.channels >= span.start) & (axis.channels < span.stop)).any())
        )

    def num_kept(self, keep: Tensor) -> dict[str, int]:
        """Channels that a choice keeps in each group, by name.

        Args:
            keep: bool, shape ``[num_channels]``; true where the channel stays.

        Raises:
            ValueError: If ``keep`` has another shape or dtype.
        """
        self._check_shape(keep)
        return {
            group.name: int(keep[start : start + group.num_channels].sum())
            for group, start in zip(self.groups, self.starts, strict=False)
        }

    def check(self, keep: Tensor) -> None:
        """Refuse a choice that no model could have.

        Args:
            keep: bool, shape ``[num_channels]``; true where the channel stays.

        Raises:
            ValueError: If ``keep`` has another shape or dtype, a group would lose all of its
                channels, or its blocks would keep different numbers.
        """
        for group, (name, kept) in zip(self.groups, self.num_kept(keep).items(), strict=True):
            if kept == 0:
                raise ValueError(
                    f"no channel of group {name!r} would be left of {group.num_channels}; keep at "
                    f"least {group.num_blocks}."
                )
            in_blocks = keep[self.span(name)].view(group.num_blocks, -1).sum(1)
            if group.num_blocks > 1 and bool((in_blocks != in_blocks[0]).any()):
                raise ValueError(
                    f"group {name!r} has {group.num_blocks} blocks that must keep the same number "
                    f"of channels, but they would keep {in_blocks.tolist()}; choose within blocks."
                )

    def kept_indices(self, keep: Tensor) -> dict[str, dict[int, Tensor]]:
        """What a choice leaves of each tensor.

        Args:
            keep: bool, shape ``[num_channels]``; true where the channel stays.

        Returns:
            For each parameter or buffer that shrinks, by name: for each dimension that shrinks,
            the indices that stay, int64, ascending. :func:`take` applies it.

        Raises:
            ValueError: As :meth:`check`.
        """
        self.check(keep)
        kept: dict[str, dict[int, Tensor]] = {}
        for axis in self.axes:
            stays = _stays(axis, keep)
            if not bool(stays.all()):
                kept.setdefault(axis.tensor, {})[axis.dim] = stays.nonzero().flatten()
        return kept

    def after(self, keep: Tensor) -> ChannelGroups:
        """The groups of the model that a choice leaves, the channels numbered again.

        Args:
            keep: bool, shape ``[num_channels]``; true where the channel stays.

        Raises:
            ValueError: As :meth:`check`.
        """
        self.check(keep)
        renumbered = torch.where(keep, keep.cumsum(0) - 1, -1)
        axes = []
        for axis in self.axes:
            channels = axis.channels[_stays(axis, keep)]
            channels = torch.where(channels >= 0, renumbered[channels.clamp(min=0)], -1)
            axes.append(replace(axis, channels=channels))
        kept = self.num_kept(keep)
        groups = tuple(replace(group, num_channels=kept[group.name]) for group in self.groups)
        return replace(self, groups=groups, axes=tuple(axes))

    def axis_sizes(self, kept: Mapping[str, int]) -> dict[tuple[str, int], int]:
        """The sizes that axes would have.

        Args:
            kept: Channels kept in each group, by name.

        Returns:
            The size of each axis, by tensor name and dimension.
        """
        sizes = {}
        for axis in self.axes:
            held = axis.channels[axis.channels >= 0]
            size = axis.channels.numel() - held.numel()
            group_of = torch.bucketize(held, torch.tensor(self.starts[1:]), right=True)
            positions = group_of.bincount(minlength=len(self.groups)).tolist()
            for group, count in zip(self.groups, positions, strict=True):
                size += count * kept[group.name] // group.num_channels
            sizes[axis.tensor, axis.dim] = size
        return sizes

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, for a checkpoint; :meth:`from_state_dict` is the way back."""
        return {
            "groups": [[g.name, g.num_channels, g.num_blocks] for g in self.groups],
            "axes": [[a.tensor, a.dim, a.channels.to(torch.int32), a.role] for a in self.axes],
            "left_alone": [[layer.layer, layer.reason] for layer in self.left_alone],
            "widths": [[w.module, w.attribute, w.tensor, w.dim, w.divisor] for w in self.widths],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ChannelGroups:
        """What :meth:`state_dict` wrote."""
        return cls(
            tuple(ChannelGroup(*group) for group in state["groups"]),
            tuple(
                ChannelAxis(tensor, dim, channels.to("cpu", torch.int64), role)
                for tensor, dim, channels, role in state["axes"]
            ),
            tuple(LeftAlone(*layer) for layer in state["left_alone"]),
            tuple(ChannelWidth(*width) for width in state["widths"]),
        )

    def __str__(self) -> str:
        text = f"{len(self.groups)} groups, {self.num_channels} channels"
        if not self.left_alone:
            return text
        lines = "\n".join(f"  {layer.layer}: {layer.reason}" for layer in self.left_alone)
        return f"{text}; skipped:\n{lines}"

    def _check_shape(self, keep: Tensor) -> None:
        if keep.dtype != torch.bool or keep.shape != (self.num_channels,):
            raise ValueError(
                f"keep is {keep.dtype} of shape {tuple(keep.shape)}, expected one bool for each of "
                f"the {self.num_channels} channels."
            )


def take(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """The part of a tensor that a cut leaves.

    Args:
        tensor: A tensor shaped as the parameter before the cut, on any device: the parameter
            itself, its gradient, momentum, mask or average.
        kept: By dimension, the indices that stay; one value of
            :meth:`ChannelGroups.kept_indices`.

    Returns:
        A contiguous copy in the tensor's memory format, without gradient history.
    """
    memory_format = _memory_format(tensor)
    part = tensor.detach()
    for dim, indices in kept.items():
        part = part.index_select(dim, indices.to(part.device))
    return part.clone(memory_format=memory_format)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _stays(axis: ChannelAxis, keep: Tensor) -> Tensor:
    return (axis.channels < 0) | keep[axis.channels.clamp(min=0)]

"""Channel groups written by hand, and a plain cut by them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.groups import (
    AxisRole,
    ChannelAxis,
    ChannelGroup,
    ChannelGroups,
    take,
)

Axis = tuple[str, int, Sequence[int], AxisRole]


def groups_of(sizes: dict[str, int], *axes: Axis) -> ChannelGroups:
    """Groups by name and size; axes as (tensor, dimension, channels, role)."""
    return ChannelGroups(
        tuple(ChannelGroup(name, size) for name, size in sizes.items()),
        tuple(ChannelAxis(t, d, torch.tensor(list(c)), role) for t, d, c, role in axes),
    )


def conv_net(bias: bool = False, norm: bool = True) -> tuple[nn.Sequential, ChannelGroups]:
    """Grey images -> conv (6) -> norm -> ReLU -> conv (4) -> ReLU -> flatten 3 x 3 -> linear."""
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=bias),
        nn.BatchNorm2d(6) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=bias),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )
    first, second = range(6), range(6, 10)
    axes: list[Axis] = [("0.weight", 0, first, "out"), ("3.weight", 1, first, "in")]
    if norm:
        axes += [(f"1.{n}", 0, first, "scale") for n in ("weight", "bias", "running_mean")]
        axes += [("1.running_var", 0, first, "scale")]
    axes += [
        ("3.weight", 0, second, "out"),
        ("6.weight", 1, [c for c in second for _ in range(9)], "in"),
    ]
    if bias:
        axes += [("0.bias", 0, first, "out"), ("3.bias", 0, second, "out")]
    return model, groups_of({"0": 6, "3": 4}, *axes)


def cut(model: nn.Module, groups: ChannelGroups, keep: Tensor) -> nn.Module:
    """A copy without the channels that are not kept."""
    slim = copy.deepcopy(model)
    for name, kept in groups.kept_indices(keep).items():
        layer, _, short = name.rpartition(".")
        tensor = getattr(slim.get_submodule(layer), short)
        tensor.data = take(tensor, kept)
    return slim

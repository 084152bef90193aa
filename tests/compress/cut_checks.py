"""Whether a slim model computes what the dense one does without the channels that went."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.tracing import find_channel_groups
from lit_compress.compress.channels.trial import tensors_in


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def random_keep(groups: ChannelGroups, leave: Sequence[str] = ()) -> Tensor:
    """About half of each group, of each block as many; all of the groups named in ``leave``."""
    keep = torch.ones(groups.num_channels, dtype=torch.bool)
    for group in groups.groups:
        if group.name not in leave:
            for block in keep[groups.span(group.name)].view(group.num_blocks, -1):
                block[torch.randperm(len(block))[: len(block) // 2]] = False
    return keep


def silence(model: nn.Module, groups: ChannelGroups, keep: Tensor) -> None:
    """Zeros in place of what makes the channels that are not kept; what reads them is left."""
    own = tensors_of(model)
    with torch.no_grad():
        for axis in groups.axes:
            gone = (axis.channels >= 0) & ~keep[axis.channels.clamp(min=0)]
            if axis.role != "in":
                own[axis.tensor].index_fill_(axis.dim, gone.nonzero().flatten(), 0.0)


def randomise(model: nn.Module) -> nn.Module:
    """Numbers that leave nothing to chance: no two norms alike, no zeros."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter.data, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model


def groups_when_cut(
    model: nn.Module,
    *inputs: Any,
    leave: Sequence[str] = (),
    forward: Callable[[nn.Module], Any] | None = None,
) -> ChannelGroups:
    """Find the groups, cut them at random and compare with the silenced model.

    Returns:
        The groups that were found.
    """
    torch.manual_seed(0)
    randomise(model)
    run = forward or (lambda m: m(*inputs))
    groups = find_channel_groups(model, run)
    keep = random_keep(groups, leave)
    slim = copy.deepcopy(model)
    left = cut_channels(slim, groups, keep)
    assert left.num_kept(torch.ones(left.num_channels, dtype=torch.bool)) == groups.num_kept(keep)
    dense = copy.deepcopy(model)
    silence(dense, groups, keep)
    for module in (dense, slim):
        module.eval()
    with torch.no_grad():
        pairs = list(zip(tensors_in(run(dense)), tensors_in(run(slim)), strict=True))
    assert pairs
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    slim.train()
    loss = sum(t.float().square().mean() for t in tensors_in(run(slim)) if t.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
    return groups

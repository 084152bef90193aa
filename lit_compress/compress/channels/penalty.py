"""ChannelPenalty: pull channels towards zero before they are removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.schedules import check_moment

__all__ = ["ChannelPenalty", "PenaltyKind", "add_penalty"]


PenaltyKind: TypeAlias = Literal["l2", "group_lasso"]
"""The norm of a penalty."""


@dataclass(frozen=True)
class ChannelPenalty:
    """How the channels that are about to go are pulled towards zero before each cut.

    The pull grows in a straight line from 0 to ``strength`` over the last part of the way to the
    cut, and is added to the gradients, so that it is no part of the logged loss.

    Attributes:
        strength: The pull at the cut, relative to the gradient of the loss: each weight w has
            ``strength * w`` (``"l2"``) or ``strength * w / ‖its channel‖`` (``"group_lasso"``)
            added to its gradient. Positive.
        kind: ``"l2"``: growing regularisation (Wang et al. 2021, "Neural Pruning via Growing
            Regularization", section 3.2). ``"group_lasso"``: the gradient of the sum of channel
            norms (Wen et al. 2016, "Learning Structured Sparsity", equation 2).
        begin: The moment from which on it pulls, in the schedule's unit and as its moments: a
            float is a fraction of the run, an int absolute.

    Raises:
        ValueError: If a value is out of range.
    """

    strength: float
    kind: PenaltyKind = "l2"
    begin: int | float = 0

    def __post_init__(self) -> None:
        is_number = isinstance(self.strength, (int, float)) and not isinstance(self.strength, bool)
        if not (is_number and 0 < self.strength < float("inf")):
            raise ValueError(f"strength is {self.strength!r}, expected a positive number.")
        if self.kind not in ("l2", "group_lasso"):
            raise ValueError(f"kind is {self.kind!r}, expected 'l2' or 'group_lasso'.")
        check_moment("begin", self.begin)

    def strength_at(self, now: int, begin: int, cut: int) -> float:
        """The pull at a moment: 0 up to ``begin``, then a straight line to the full one at ``cut``.

        Examples:
            >>> penalty = ChannelPenalty(0.1)
            >>> [penalty.strength_at(now, begin=10, cut=20) for now in (5, 10, 15, 20)]
            [0.0, 0.0, 0.05, 0.1]
        """
        return self.strength * min(1.0, max(0, now - begin) / max(1, cut - begin))


@torch.no_grad()
def add_penalty(
    parameters: Mapping[str, nn.Parameter],
    groups: ChannelGroups,
    keep: Tensor,
    strength: float,
    kind: PenaltyKind = "l2",
) -> None:
    """Add the pull on channels that are about to go to the gradients of what makes them.

    Args:
        parameters: Parameters by name; those without a gradient are passed over.
        groups: The channels of the model.
        keep: bool, shape ``[groups.num_channels]``; false where the channel is about to go.
        strength: As :class:`ChannelPenalty` has it, at least 0.
        kind: As :class:`ChannelPenalty` has it.
    """
    for axis in groups.axes:
        weight = parameters.get(axis.tensor)
        if weight is None or weight.grad is None or axis.role == "in":
            continue
        goes = ((axis.channels >= 0) & ~keep[axis.channels.clamp(min=0)]).nonzero().flatten()
        if not len(goes):
            continue
        goes = goes.to(weight.device)
        part = weight.index_select(axis.dim, goes)
        if kind == "group_lasso":
            others = [d for d in range(part.dim()) if d != axis.dim]
            norms = part.square().sum(others, keepdim=True).sqrt() if others else part.abs()
            part = part / norms.clamp(min=torch.finfo(part.dtype).tiny)
        weight.grad.index_add_(axis.dim, goes, part.to(weight.grad.dtype), alpha=strength)

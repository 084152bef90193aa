"""The sizes of tensor axes as a function of the channels that groups keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_compress.compress.channels.groups import ChannelAxis, ChannelGroups

__all__ = ["AxisSizes", "check_axis", "check_known"]


class AxisSizes:
    """The sizes of axes for many plans at once.

    As :meth:`ChannelGroups.axis_sizes`, in three operations on small tensors.

    Args:
        groups: The channels of the model.
        axes: The axes that are asked about; one that holds no channel has a fixed size.
    """

    def __init__(self, groups: ChannelGroups, axes: Sequence[ChannelAxis]) -> None:
        entries: list[tuple[int, int, int]] = []  # axis, group, how often it stands on the axis
        fixed = []
        boundaries = torch.tensor(groups.starts[1:])
        for index, axis in enumerate(axes):
            held = axis.channels[axis.channels >= 0]
            group_of = torch.bucketize(held, boundaries, right=True)
            counts = torch.bincount(group_of, minlength=len(groups.groups)).tolist()
            entries += [(index, group, count) for group, count in enumerate(counts) if count]
            fixed.append(axis.channels.numel() - held.numel())
        table = torch.tensor(entries, dtype=torch.int64).view(-1, 3)
        self._axis, self._group, self._counts = table.unbind(1)
        channels = torch.tensor([group.num_channels for group in groups.groups], dtype=torch.int64)
        self._channels = channels[self._group]
        self._fixed = torch.tensor([*fixed, 1])

    def __call__(self, kept: Tensor) -> Tensor:
        """The sizes for each plan, and a last column of ones.

        Args:
            kept: Channels kept, int64, shape ``[num_plans, num_groups]``.

        Returns:
            int64, shape ``[num_plans, num_axes + 1]``.
        """
        stays = self._counts * kept[:, self._group] // self._channels
        return self._fixed.repeat(len(kept), 1).index_add_(1, self._axis, stays)


def check_axis(axis: ChannelAxis, shape: Sequence[int]) -> None:
    """Refuse an axis of another model.

    Args:
        axis: What the groups know of a tensor.
        shape: The shape that the tensor has.

    Raises:
        ValueError: If it has no such axis, or one of another size.
    """
    if axis.dim >= len(shape) or shape[axis.dim] != axis.channels.numel():
        raise ValueError(
            f"the groups know {axis.tensor!r} with {axis.channels.numel()} indices in dimension "
            f"{axis.dim} and the model has it with the shape {tuple(shape)}; find the groups of "
            "this model as it is now."
        )


def check_known(
    groups: ChannelGroups, tensors: Mapping[str, object], buffers: Mapping[str, object]
) -> None:
    """Refuse groups of another model.

    Args:
        groups: The channels of a model.
        tensors: By name, the tensors that the model has.
        buffers: Others that it has.

    Raises:
        ValueError: If the groups hold a tensor that is in neither.
    """
    for axis in groups.axes:
        if axis.tensor not in tensors and axis.tensor not in buffers:
            raise ValueError(
                f"the groups hold the tensor {axis.tensor!r} and the model has none of that name; "
                "find the groups of this model."
            )

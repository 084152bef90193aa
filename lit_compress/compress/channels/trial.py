"""Try out cuts: remove channels for one run, restore them, and keep the groups that ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.groups import ChannelAxis, ChannelGroups, LeftAlone

__all__ = [
    "Forward",
    "Shapes",
    "Trial",
    "output_shapes",
    "tensors_in",
    "undisturbed",
    "without_groups",
]

Forward: TypeAlias = Callable[[nn.Module], Any]
Shapes: TypeAlias = list[torch.Size]


@dataclass(frozen=True)
class Trial:
    """Cuts a model and sees whether it still runs.

    Attributes:
        model: The model; it is as it was after each trial.
        forward: Calls it on example inputs.
        shapes: The shapes of its outputs in evaluation and in training mode.
    """

    model: nn.Module
    forward: Forward
    shapes: tuple[Shapes, Shapes]

    def failure(self, groups: ChannelGroups, names: Sequence[str] | None = None) -> str | None:
        """What goes wrong when some groups lose channels; ``None`` if nothing.

        Each loses another part, so that no two widths that the code takes for one stay equal by
        chance.

        Args:
            groups: All groups.
            names: Those that lose channels; by default all.
        """
        keep = torch.ones(groups.num_channels, dtype=torch.bool)
        for number, group in enumerate(groups.groups):
            if names is None or group.name in names:
                block = group.num_channels // group.num_blocks
                stays = block - min(block - 1, 1 + 5 * number % max(1, block // 2))
                keep[groups.span(group.name)].view(group.num_blocks, block)[:, stays:] = False
        try:
            with _cut_for_now(self.model, groups, keep):
                for training, expected in zip((False, True), self.shapes, strict=True):
                    found = output_shapes(self.model, self.forward, training)
                    if found != expected:
                        return f"the model's output would have the shapes {found}"
        except Exception as error:  # whatever a model may raise
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        return None

    def passed(self, groups: ChannelGroups) -> ChannelGroups:
        """Leave those groups alone without some of whose channels the model does not run.

        Args:
            groups: All groups.
        """

        def bisect(names: Sequence[str]) -> dict[str, str]:
            reason = self.failure(groups, names)
            if reason is None:
                return {}
            if len(names) == 1:
                return {names[0]: f"the model does not run without some of them: {reason}"}
            half = len(names) // 2
            return {**bisect(names[:half]), **bisect(names[half:])}

        names = [group.name for group in groups.groups]
        return without_groups(groups, bisect(names)) if names else groups


def output_shapes(model: nn.Module, forward: Forward, training: bool) -> Shapes:
    """Run a model undisturbed, and say the shapes of the tensors that it returns.

    Without their first dimension: a detector finds more or fewer things with other weights.

    Args:
        model: The model.
        forward: Calls it on example inputs.
        training: In training mode, or in evaluation mode.
    """
    with undisturbed(model, training):
        outputs = forward(model)
    return [tensor.shape[1:] for tensor in tensors_in(outputs)]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that a value holds: in containers, dataclasses and other plain objects.

    Args:
        value: What a model returned.
    """
    tensors: list[Tensor] = []
    seen: dict[int, Any] = {}
    rest = [value]
    while rest:
        leaf = rest.pop(0)
        if isinstance(leaf, Tensor):
            tensors.append(leaf)
        elif not isinstance(leaf, (nn.Module, type)) and id(leaf) not in seen:
            seen[id(leaf)] = leaf
            parts = list(leaf.values()) if isinstance(leaf, Mapping) else tree_leaves(leaf)
            if len(parts) == 1 and parts[0] is leaf:
                parts = list(getattr(leaf, "__dict__", {}).values())
            rest = [*parts, *rest]
    return tensors


def without_groups(groups: ChannelGroups, reasons: Mapping[str, str]) -> ChannelGroups:
    """Leave groups alone.

    Args:
        groups: The groups.
        reasons: Why, by the name of each group that is to be skipped.
    """
    stays = [group for group in groups.groups if group.name not in reasons]
    renumbered = torch.full((groups.num_channels + 1,), -1)  # the last one is for -1 itself
    start = 0
    for group in stays:
        renumbered[groups.span(group.name)] = torch.arange(start, start + group.num_channels)
        start += group.num_channels
    axes = tuple(
        ChannelAxis(axis.tensor, axis.dim, renumbered[axis.channels], axis.role)
        for axis in groups.axes
        if bool((renumbered[axis.channels] >= 0).any())
    )
    left = tuple(LeftAlone(name, reason) for name, reason in reasons.items())
    return replace(groups, groups=tuple(stays), axes=axes, left_alone=(*groups.left_alone, *left))


@contextmanager
def _cut_for_now(model: nn.Module, groups: ChannelGroups, keep: Tensor) -> Iterator[None]:
    """A model without some channels, until the context ends; it takes no copy."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [(tensor, tensor.data, tensor.grad) for tensor in tensors]
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        cut_channels(model, groups, keep)
        yield
    finally:
        for tensor, data, gradient in values:
            if tensor.shape != data.shape:
                tensor.grad = None
                tensor.data = data
                tensor.grad = gradient
        for now, before in attributes:
            now.clear()
            now.update(before)


@contextmanager
def undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """Run a model in a mode, leaving modes, buffers and the random state as they were.

    Args:
        model: The model.
        training: In training mode, or in evaluation mode.
    """
    modes = {module: module.training for module in model.modules()}
    places = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.is_cuda})
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused operator hides what it does
    for module in modes:
        module.training = training
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, mode in modes.items():
            module.training = mode
        for held, before in places:
            held.update(before)  # some code puts a new tensor in place of a buffer
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)

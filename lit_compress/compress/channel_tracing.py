"""Finds the coupled channels of a model by running it.

Below autograd, every operator that runs is looked at once, in evaluation and in training mode, and
the indices that have to stand or fall together are tied. So it does not matter how a model is
written: weights used without their module, frozen weights, heads, slices and concatenations along
any dimension are followed, and what reaches an operator without a rule, a tensor of fixed size or
the model's output is left alone, with the reason.

The idea of dependency groups is that of DepGraph (Fang et al. 2023, "Towards Any Structural
Pruning", section 3); following single indices of every dimension instead of modules and their
channels is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_compress.compress.channel_cut import cut_channels
from lit_compress.compress.channel_groups import (
    AxisRole,
    ChannelAxis,
    ChannelGroup,
    ChannelGroups,
    LeftAlone,
)
from lit_compress.compress.channel_rules import TraceState, rule_for
from lit_compress.compress.channel_ties import Array, Traced

__all__ = ["Forward", "find_channel_groups"]

Forward = Callable[[nn.Module], Any]


def find_channel_groups(
    model: nn.Module, forward: Forward, ignored_layers: Sequence[str] = ()
) -> ChannelGroups:
    """Find out which channels of a model can be cut, and which only together.

    The model runs twice, in evaluation and in training mode, without gradients; its modes, buffers
    and the random state are restored. Then copies are cut in every group and must give outputs of
    the same shapes; groups without some of whose channels they do not are left alone.

    Args:
        model: Any module that runs.
        forward: Calls it on example inputs, as in ``lambda m: m(images)``. Two examples are
            enough, and one is too few for batch norm over single pixels.
        ignored_layers: Name patterns (``*`` and ``?``) of layers whose output channels stay.

    Returns:
        The groups; empty where nothing can be cut.

    Raises:
        ValueError: If the model raises on these inputs, or a name pattern matches no layer.
    """
    trace = _Trace(model)
    shapes = trace.run(forward)
    for glob in ignored_layers:
        trace.ignore(glob)
    groups = trace.groups()
    return _without_failures(model, forward, groups, shapes)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rules while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.state = TraceState()
        self.axes: dict[tuple[str, int], Array] = {}
        self.order: dict[str, int] = {}  # parameters by their first use
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._begin(name, tensor)

    def run(self, forward: Forward) -> list[list[torch.Size]]:
        """Run in both modes; returns the shapes of the outputs."""
        shapes = []
        for training in (False, True):
            with _undisturbed(self.model, training):
                try:
                    with self:
                        outputs = forward(self.model)
                except Exception as error:
                    raise ValueError(
                        f"{type(self.model).__name__} raised {type(error).__name__} on its example "
                        f"inputs in {'training' if training else 'evaluation'} mode: {error}. Its "
                        "channels cannot be found without running it; give one batch of at least "
                        "two examples as it takes them."
                    ) from error
            tensors = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
            for tensor in tensors:
                self.state.ties.pin_all(self.state.labels(tensor), "reaches the model's output")
            shapes.append([t.shape for t in tensors])
        return shapes

    def ignore(self, glob: str) -> None:
        """Pin what layers of that name make."""
        matched = [name for name in self.axes if fnmatchcase(name[0].rpartition(".")[0], glob)]
        if not matched:
            layers = sorted({name.rpartition(".")[0] for name, _ in self.axes})
            raise ValueError(
                f"ignored_layers holds the pattern {glob!r}, which matches none of the "
                f"{len(layers)} layers with parameters: {', '.join(layers[:8])} ..."
            )
        for key in matched:
            if self._role(key) != "in":
                self.state.ties.pin(self.axes[key], "matches ignored_layers")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and label its result."""
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        for tensor in tensors:
            name = self._names.get(id(tensor))
            if name is not None:
                self.order.setdefault(name, len(self.order))
        if not any(self.state.of(t).labels for t in tensors):
            return out
        self.state.operator = func._schema.name.split("::")[-1]
        self._apply(func, args, kwargs or {}, tensors, out)
        return out

    def _apply(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, tensors: list[Tensor], out: Any
    ) -> None:
        rule = rule_for(func)
        if rule is None or not tree_leaves(out):
            if rule is None:
                for tensor in tensors:
                    reason = f"is used by {func}, for which there is no rule"
                    self.state.ties.pin_all(self.state.labels(tensor), reason)
            return
        positional = [*args, *(v for v in kwargs.values() if isinstance(v, Tensor))]
        labels = rule(self.state, positional, out)
        first = out[0] if isinstance(out, (tuple, list)) else out
        if labels and isinstance(first, Tensor):
            views = len(tensors) == 1 and self.state.of(tensors[0]).is_weight
            is_view = views and func._schema.name.split("::")[-1] in _VIEWS
            self.state.see(first, Traced(labels, is_weight=is_view))

    def _begin(self, name: str, tensor: Tensor) -> None:
        if (
            isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
            or id(tensor) in self._names
        ):
            return
        self._names[id(tensor)] = name
        layer = self.model.get_submodule(name.rpartition(".")[0])
        convolution = isinstance(layer, nn.modules.conv._ConvNd)
        labels = []
        for dim, size in enumerate(tensor.shape):
            if size > 1 and not (convolution and dim > 1):
                atoms = self.state.ties.new(size)
                self.axes[name, dim] = atoms
                labels.append(atoms.reshape([-1 if d == dim else 1 for d in range(tensor.dim())]))
        self.state.see(tensor, Traced(tuple(labels), is_weight=True))

    # --- From ties to groups ----------------------------------------------------------------------

    def groups(self) -> ChannelGroups:
        """What the trace amounts to."""
        return _Grouping(self).result()

    def _role(self, key: tuple[str, int]) -> AxisRole | None:
        return self.state.roles.get(int(self.axes[key][0]))


_VIEWS = {"t", "transpose", "permute", "view", "reshape", "_unsafe_view", "expand", "unsqueeze",
          "squeeze", "detach", "alias", "_to_copy", "select", "slice"}  # fmt: skip


class _Grouping:
    """Sorts the classes of atoms into groups of channels."""

    def __init__(self, trace: _Trace) -> None:
        self.trace = trace
        self.ties = trace.state.ties
        used = [key for key in trace.axes if key[0] in trace.order and trace._role(key)]
        self.keys = sorted(used, key=lambda key: trace.order[key[0]])
        self.roots = {key: self.ties.roots(trace.axes[key]) for key in self.keys}

    def result(self) -> ChannelGroups:
        members = self._members()
        while True:
            members, blocks, failed = self._bonded(members)
            if not failed:
                break
            members = [m for m in members if not set(m) & failed]
        members.sort(key=self._first_use)
        groups: list[ChannelGroup] = []
        ids: dict[int, int] = {}
        names: set[str] = set()
        for classes in members:
            base = name = self._producers(classes[0])[0][0].rpartition(".")[0] or "(root)"
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
            role = self.trace._role(key)
            if role is not None and bool((channels >= 0).any()):
                axes.append(ChannelAxis(key[0], key[1], channels, role))
        return ChannelGroups(tuple(groups), tuple(axes), self._left_alone(ids))

    def _members(self) -> list[list[int]]:
        """Classes of atoms that are made by the same layers and can be cut, group by group."""
        makers: dict[int, list[tuple[str, int]]] = {}
        readers: set[int] = set()
        for key in self.keys:
            role = self.trace._role(key)
            for root in dict.fromkeys(self.roots[key].tolist()):
                if role == "out":
                    makers.setdefault(root, []).append(key)
                elif role == "in":
                    readers.add(root)
        self.makers = makers
        for atoms in self.trace.state.contracted:
            readers.update(self.ties.roots(atoms).tolist())
        for root in makers:
            if root not in readers:
                self.ties.pinned.setdefault(root, "is read by no layer")
        by_makers: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for root, keys in makers.items():
            if root not in self.ties.pinned:
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
                    self.ties.pinned.setdefault(root, reason)
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
                    self.ties.pinned.setdefault(root, "has blocks that contradict each other")
                failed |= own
                continue
            in_order = [root for block in partition for root in block] or classes
            blocks[in_order[0]] = max(1, len(partition))
            ordered.append(in_order)
        return (members if failed else ordered), blocks, failed

    def _producers(self, root: int) -> list[tuple[str, int]]:
        keys = self.makers[root]
        weights = [key for key in keys if not key[0].endswith("bias")]
        return weights or keys

    def _first_use(self, classes: list[int]) -> int:
        return min(self.trace.order[self._producers(root)[0][0]] for root in classes)

    def _left_alone(self, ids: dict[int, int]) -> tuple[LeftAlone, ...]:
        left: dict[str, str] = {}
        for key in self.keys:
            layer = key[0].rpartition(".")[0] or key[0]
            roots = self.roots[key].tolist()
            if self.trace._role(key) == "out" and not any(root in ids for root in roots):
                reasons = [self.ties.pinned[r] for r in roots if r in self.ties.pinned]
                left.setdefault(layer, reasons[0] if reasons else "is read by no layer")
        for name, parameter in self.trace.model.named_parameters():
            layer = name.rpartition(".")[0] or name
            if name not in self.trace.order and parameter.dim() > 1:
                left.setdefault(layer, "was not reached by the forward pass")
        return tuple(LeftAlone(layer, reason) for layer, reason in left.items())


def _finest(bonds: list[Array], own: set[int]) -> list[list[int]] | None:
    """The finest partition that bonds ask for; ``[]`` for none, ``None`` if they contradict."""
    finest: list[list[int]] = []
    for rows in sorted(bonds, key=len, reverse=True):
        blocks = list({tuple(dict.fromkeys(row)): None for row in rows.tolist()})
        members = [root for block in blocks for root in block]
        if len(members) != len(set(members)) or set(members) != own:
            return None
        if len({len(block) for block in blocks}) > 1:
            return None
        if not finest:
            finest = [list(block) for block in blocks]
        elif any(set(f) & set(b) and not set(f) <= set(b) for f in finest for b in blocks):
            return None
    return finest


# --- The trial ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """Cuts copies of a model and sees whether they still run."""

    model: nn.Module
    forward: Forward
    groups: ChannelGroups
    shapes: list[list[torch.Size]]

    def failure(self, names: Sequence[str]) -> str | None:
        """What goes wrong when these groups lose channels; ``None`` if nothing.

        Each loses another part, so that no two widths that the code takes for one stay equal by
        chance.
        """
        keep = torch.ones(self.groups.num_channels, dtype=torch.bool)
        for name in names:
            group = self.groups[name]
            block = group.num_channels // group.num_blocks
            number = self.groups.groups.index(group)
            stays = block - min(block - 1, 1 + 5 * number % max(1, block // 2))
            keep[self.groups.span(name)].view(group.num_blocks, block)[:, stays:] = False
        slim = copy.deepcopy(self.model)
        try:
            cut_channels(slim, self.groups, keep)
            for training, expected in zip((False, True), self.shapes, strict=True):
                with _undisturbed(slim, training):
                    outputs = self.forward(slim)
                found = [t.shape for t in tree_leaves(outputs) if isinstance(t, Tensor)]
                if found != expected:
                    return f"the model's output would have the shapes {found}"
        except Exception as error:  # whatever a model may raise
            return str(error).splitlines()[0] if str(error) else type(error).__name__
        return None

    def failures(self, names: Sequence[str]) -> dict[str, str]:
        """The groups that cannot be cut, by bisection, and why."""
        reason = self.failure(names)
        if reason is None:
            return {}
        if len(names) == 1:
            return {names[0]: reason}
        half = len(names) // 2
        return {**self.failures(names[:half]), **self.failures(names[half:])}


def _without_failures(
    model: nn.Module, forward: Forward, groups: ChannelGroups, shapes: list[list[torch.Size]]
) -> ChannelGroups:
    names = [group.name for group in groups.groups]
    failures = _Trial(model, forward, groups, shapes).failures(names) if names else {}
    if not failures:
        return groups
    return without_groups(
        groups,
        {n: f"the model does not run without some of them: {r}" for n, r in failures.items()},
    )


def without_groups(groups: ChannelGroups, reasons: dict[str, str]) -> ChannelGroups:
    """Leave groups alone.

    Args:
        groups: The groups.
        reasons: Why, by the name of each group that is to be left alone.
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
    return ChannelGroups(tuple(stays), axes, (*groups.left_alone, *left))


@contextmanager
def _undisturbed(model: nn.Module, training: bool) -> Iterator[None]:
    """Run a model in a mode, leaving modes, buffers and the random state as they were."""
    modes = {module: module.training for module in model.modules()}
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
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

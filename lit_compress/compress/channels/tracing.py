"""Find the coupled channels of a model by running it.

Below autograd, every operator that runs is looked at once, in evaluation and in training mode, and
the indices that have to stand or fall together are tied. So it does not matter how a model is
written: weights used without their module, frozen weights, heads, slices and concatenations along
any dimension are followed, and what reaches an operator without a rule, a tensor of fixed size or
the model's output is skipped, with the reason.

The idea of dependency groups is that of DepGraph (Fang et al. 2023, "Towards Any Structural
Pruning", section 3); following single indices of every dimension instead of modules and their
channels is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_compress.compress.channels.grouping import AxisKey, Evidence, group_channels
from lit_compress.compress.channels.groups import ChannelGroups
from lit_compress.compress.channels.heads import tie_heads
from lit_compress.compress.channels.rules import keeps_weights, rule_for
from lit_compress.compress.channels.ties import Array, Traced
from lit_compress.compress.channels.trace_state import TraceState
from lit_compress.compress.channels.trial import (
    Forward,
    Shapes,
    Trial,
    tensors_in,
    undisturbed,
)
from lit_compress.compress.layers import match_layers

__all__ = ["Forward", "find_channel_groups"]


def find_channel_groups(
    model: nn.Module, forward: Forward, ignored_layers: Sequence[str] = (), prefix: str = ""
) -> ChannelGroups:
    """Find out which channels of a model can be cut, and which only together.

    The model runs twice, in evaluation and in training mode, without gradients; its modes, buffers
    and the random state are restored. Then it is cut for a run in every group and must give outputs
    of the same shapes; groups without some of whose channels it does not are skipped.

    Args:
        model: Any module that runs.
        forward: Calls it on example inputs, as in ``lambda m: m(images)``. Two examples are
            enough, and one is too few for batch norm over single pixels.
        ignored_layers: Name patterns of layers whose output channels stay; see
            :func:`~lit_compress.compress.layers.match_layers`.
        prefix: Dotted name of the model in a LightningModule, which patterns may begin with.

    Returns:
        The groups; empty where nothing can be cut.

    Raises:
        ValueError: If the model raises on these inputs, or a name pattern matches no layer.
    """
    trace = _Trace(model)
    shapes = trace.run(forward, training=False), trace.run(forward, training=True)
    trace.ignore(ignored_layers, prefix)
    trial = Trial(model, forward, shapes)
    groups = group_channels(trace.evidence)
    if trial.failure(groups) is None:
        return groups
    with_heads = tie_heads(trace.evidence)
    if with_heads is None:
        return trial.passed(groups)
    tied = group_channels(with_heads)
    if trial.failure(tied) is None:
        return tied
    return max(trial.passed(groups), trial.passed(tied), key=lambda g: g.num_channels)


class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rules while the model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.state = TraceState()
        self.axes: dict[AxisKey, Array] = {}
        self.order: dict[str, int] = {}
        self._names: dict[int, str] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._begin(name, tensor)

    @property
    def evidence(self) -> Evidence:
        """What was found out so far."""
        return Evidence(self.model, self.state, self.axes, self.order)

    def run(self, forward: Forward, training: bool) -> Shapes:
        """Run in one mode; returns the shapes of the outputs as ``output_shapes`` does."""
        try:
            with undisturbed(self.model, training), self:
                outputs = forward(self.model)
        except Exception as error:
            raise ValueError(
                f"{type(self.model).__name__} raised {type(error).__name__} on its example "
                f"inputs in {'training' if training else 'evaluation'} mode: {error}. Its "
                "channels cannot be found without running it; give one batch of at least "
                "two examples as it takes them."
            ) from error
        tensors = tensors_in(outputs)
        for tensor in tensors:
            self.state.ties.pin_all(self.state.labels(tensor), "reaches the model's output")
        return [tensor.shape[1:] for tensor in tensors]

    def ignore(self, patterns: Sequence[str], prefix: str) -> None:
        """Pin what the layers make that are matched."""
        layer_of = {key: key[0].rpartition(".")[0] for key in self.axes}
        ignored = match_layers("ignored_layers", patterns, layer_of.values(), prefix)
        for key, layer in layer_of.items():
            if layer in ignored and self.evidence.role(key) != "in":
                self.state.ties.pin(self.axes[key], "matches ignored_layers")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and label its result."""
        if rule_for(func) is None and func._can_decompose():  # in inference mode they come whole
            with self:
                return func.decompose(*args, **(kwargs or {}))
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
        is_weight = keeps_weights(func) and all(self.state.of(t).is_weight for t in tensors)
        labels = rule(self.state, positional, out)
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if labels and isinstance(part, Tensor):
                self.state.see(part, Traced(labels, is_weight or self.state.of(part).is_weight))
                break

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

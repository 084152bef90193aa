"""Channels removed for real: smaller parameters, buffers, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lit_compress.compress.channel_groups import ChannelGroups, take

__all__ = ["KeptIndices", "cut_channels", "cut_optimizer_state", "cut_tensors", "match_attributes"]

KeptIndices: TypeAlias = Mapping[str, Mapping[int, Tensor]]
"""By tensor name and dimension: the indices that a cut leaves."""
Shapes: TypeAlias = Mapping[str, torch.Size]


@torch.no_grad()
def cut_channels(model: nn.Module, groups: ChannelGroups, keep: Tensor) -> ChannelGroups:
    """Remove channels from a model in place.

    Parameters keep their identity (``optimizer.param_groups``, tied weights and other references
    stay good), values that stay keep their bits, gradients are cut with their parameters, and
    ``out_channels``, ``num_features`` and the like follow.

    Args:
        model: The module that the groups were found in.
        groups: Its groups.
        keep: bool, shape ``[groups.num_channels]``; true where the channel stays.

    Returns:
        The groups of the model as it is now.

    Raises:
        ValueError: If the choice is none that a model could have, or the groups are of another
            model; the model is unchanged then.
    """
    kept = groups.kept_indices(keep)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for axis in groups.axes:
        size = tensors[axis.tensor].shape[axis.dim] if axis.tensor in tensors else None
        if size != axis.channels.numel():
            raise ValueError(
                f"the channel groups are of another model: {axis.tensor!r} has "
                f"{axis.channels.numel()} indices along dimension {axis.dim} there and {size} "
                "here. Find the groups of this model anew."
            )
    cut_tensors(tensors, kept)
    match_attributes(model, {name.rpartition(".")[0] for name in kept})
    return groups.after(keep)


@torch.no_grad()
def cut_tensors(tensors: Mapping[str, Tensor], kept: KeptIndices) -> None:
    """Cut tensors in place by name: a model's own, or those of an average of it.

    Args:
        tensors: Parameters and buffers by name.
        kept: What stays of each; names without a tensor are passed over.
    """
    for name, indices in kept.items():
        tensor = tensors.get(name)
        if tensor is None:
            continue
        gradient = tensor.grad
        tensor.grad = None
        tensor.data = take(tensor, indices)
        if gradient is not None:
            tensor.grad = take(gradient, indices)


@torch.no_grad()
def cut_optimizer_state(
    optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], kept: KeptIndices, old: Shapes
) -> None:
    """Cut momentum, Adam's moments and whatever else an optimizer keeps for each weight.

    Args:
        optimizer: The optimizer; its ``param_groups`` are not touched.
        parameters: The parameters by name, cut already.
        kept: What stays of each parameter.
        old: The shapes of the parameters before the cut, by name. State of that
            shape is cut, as are sums over a dimension of it; other state (step counts) stays.
    """
    for name, indices in kept.items():
        if name not in parameters or parameters[name] not in optimizer.state:
            continue
        state = optimizer.state[parameters[name]]
        for key, value in list(state.items()):
            if isinstance(value, Tensor) and value.dim() == len(old[name]) > 0:
                # Adafactor keeps sums over rows and columns: their dimension of size 1 stays.
                own = {d: i for d, i in indices.items() if value.shape[d] == old[name][d]}
                if all(d in own or value.shape[d] == 1 for d in indices):
                    state[key] = take(value, own)


def match_attributes(model: nn.Module, names: Iterable[str]) -> None:
    """Have layers say the sizes that their tensors have.

    Args:
        model: The module.
        names: The layers' names within it.
    """
    for name in names:
        layer = model.get_submodule(name)
        weight = getattr(layer, "weight", None)
        if isinstance(layer, _ConvNd):
            _match_convolution(layer)
        elif isinstance(layer, nn.Linear):
            layer.out_features, layer.in_features = layer.weight.shape
        elif isinstance(layer, nn.Bilinear):
            layer.out_features, layer.in1_features, layer.in2_features = layer.weight.shape
        elif isinstance(layer, _NormBase):
            vector = next(t for t in (weight, layer.running_mean) if t is not None)
            layer.num_features = vector.numel()
        elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
            layer.normalized_shape = tuple(weight.shape)
        elif isinstance(layer, nn.GroupNorm) and weight is not None:
            layer.num_channels = weight.numel()
        elif isinstance(layer, nn.PReLU):
            layer.num_parameters = layer.weight.numel()
        elif isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            layer.embedding_dim = layer.weight.shape[1]


def _match_convolution(layer: _ConvNd) -> None:
    first, second = layer.weight.shape[:2]
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels
    if depthwise and not layer.transposed:
        multiplier = layer.out_channels // layer.in_channels
        layer.groups = layer.in_channels = first // multiplier
        layer.out_channels = first
    elif layer.transposed:
        layer.in_channels, layer.out_channels = first, second * layer.groups
    else:
        layer.out_channels, layer.in_channels = first, second * layer.groups

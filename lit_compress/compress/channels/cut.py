"""Remove channels: smaller parameters, buffers, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lit_compress.compress.channels.groups import ChannelGroups, take

__all__ = [
    "KeptIndices",
    "begin_autograd_anew",
    "cut_channels",
    "cut_optimizer_state",
    "misfit",
]

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
    problem = misfit(model, groups)
    if problem is not None:
        raise ValueError(
            f"the channel groups are of another model: {problem}. Find the groups of this model "
            "again."
        )
    tensors = _tensors(model)
    _cut_named(model, tensors, kept)
    for width in groups.widths:
        size = tensors[width.tensor].shape[width.dim] // width.divisor
        setattr(model.get_submodule(width.module), width.attribute, size)
    return groups.after(keep)


def misfit(model: nn.Module, groups: ChannelGroups) -> str | None:
    """In what groups are not those of a model; ``None`` if they fit.

    Args:
        model: The module.
        groups: Groups of it as it is, or of another one.
    """
    tensors = _tensors(model)
    for axis in groups.axes:
        size = tensors[axis.tensor].shape[axis.dim] if axis.tensor in tensors else None
        if size != axis.channels.numel():
            return (
                f"{axis.tensor!r} has {axis.channels.numel()} indices along dimension {axis.dim} "
                f"there and {size} here"
            )
    return None


def begin_autograd_anew(parameters: Iterable[Tensor]) -> None:
    """Have autograd learn the shapes of parameters that were resized in place.

    As long as the graph of any earlier step is alive (a module may keep its last loss), autograd
    goes on using a parameter's gradient accumulator, which knows the old shape, and the next
    backward fails. Only data of another type makes it begin again. ``DistributedDataParallel``
    listens to the accumulators, so the model has to be wrapped again afterwards.

    Args:
        parameters: The parameters (of others nothing is to be learnt); their values, gradients
            and hooks stay.
    """
    for parameter in parameters:
        if parameter.requires_grad:
            data, gradient = parameter.data, parameter.grad
            other = torch.float32 if data.dtype == torch.float64 else torch.float64
            parameter.grad = None
            parameter.data = torch.empty(0, dtype=other, device=data.device)
            parameter.data, parameter.grad = data, gradient


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


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _match_attributes(layer: nn.Module) -> None:
    """Have a layer say the sizes that its tensors have."""
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
    elif isinstance(layer, nn.MultiheadAttention):
        _match_attention(layer)
    elif isinstance(layer, nn.RNNBase):
        layer.input_size = layer.get_parameter("weight_ih_l0").shape[1]


def _match_convolution(layer: _ConvNd) -> None:
    first, second = layer.weight.shape[:2]
    depthwise = layer.groups > 1 and layer.groups == layer.in_channels
    if depthwise and layer.transposed:
        layer.groups = layer.in_channels = first
        layer.out_channels = first * second
    elif depthwise:
        multiplier = layer.out_channels // layer.in_channels
        layer.groups = layer.in_channels = first // multiplier
        layer.out_channels = first
    elif layer.transposed:
        layer.in_channels, layer.out_channels = first, second * layer.groups
    else:
        layer.out_channels, layer.in_channels = first, second * layer.groups


def _match_attention(layer: nn.MultiheadAttention) -> None:
    layer.embed_dim = layer.out_proj.weight.shape[0]
    layer.head_dim = layer.embed_dim // layer.num_heads
    if layer._qkv_same_embed_dim:
        layer.kdim = layer.vdim = layer.embed_dim
    else:
        layer.kdim, layer.vdim = layer.k_proj_weight.shape[1], layer.v_proj_weight.shape[1]


@torch.no_grad()
def _cut_named(model: nn.Module, tensors: Mapping[str, Tensor], kept: KeptIndices) -> None:
    """Cut tensors in place by name, and have the layers say the sizes that are left."""
    for name, indices in kept.items():
        tensor = tensors[name]
        gradient = tensor.grad
        tensor.grad = None
        tensor.data = take(tensor, indices)
        if gradient is not None:
            tensor.grad = take(gradient, indices)
    cut = {id(tensors[name]) for name in kept}
    for layer in model.modules():
        # A tied weight is cut once and known to several layers.
        if any(id(tensor) in cut for tensor in (*layer.parameters(False), *layer.buffers(False))):
            _match_attributes(layer)

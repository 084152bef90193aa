"""Measure gradients and activations of each channel on calibration batches.

The results are one number a channel, so that ranks of a distributed run can average them and then
all decide alike. :func:`~lit_compress.compress.channels.importance.channel_importance` takes them
as ``measured``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lit_compress.compress.calibration import Forward, evaluation_mode
from lit_compress.compress.channels.groups import ChannelAxis, ChannelGroups

__all__ = [
    "ActivationStatistic",
    "channel_parameters",
    "first_order",
    "measure_activations",
    "measure_taylor",
    "sum_by_channel",
]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


ActivationStatistic: TypeAlias = Literal["nonzero", "magnitude", "contribution"]


def channel_parameters(
    model: nn.Module, groups: ChannelGroups
) -> list[tuple[ChannelAxis, nn.Parameter]]:
    """The parameters that make or scale channels, in the order of ``groups.axes``.

    Args:
        model: The module that was traced.
        groups: Its channels.

    Returns:
        Pairs of an axis with role ``"out"`` or ``"scale"`` and its parameter. Buffers are left out.

    Raises:
        ValueError: If the groups do not fit the model, or a parameter holds NaN or infinity.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    found = []
    for axis in groups.axes:
        if axis.role == "in" or axis.tensor in buffers:
            continue
        parameter = parameters.get(axis.tensor)
        if parameter is None:
            raise ValueError(
                f"the groups hold {axis.tensor!r}, which {type(model).__name__} does not have; "
                "find the groups of this model again."
            )
        if axis.dim >= parameter.dim() or parameter.shape[axis.dim] != axis.channels.numel():
            raise ValueError(
                f"{axis.tensor!r} has shape {tuple(parameter.shape)}, but the groups expect "
                f"{axis.channels.numel()} indices along dimension {axis.dim}; find the groups of "
                "this model again."
            )
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(
                f"{axis.tensor!r} holds NaN or infinity, so its channels cannot be ranked; prune "
                "before training diverges."
            )
        found.append((axis, parameter))
    return found


def sum_by_channel(values: Tensor, axis: ChannelAxis, num_channels: int) -> Tensor:
    """Add up what the indices of one axis hold for each channel.

    Args:
        values: Shape ``[axis.channels.numel()]``, on any device.
        axis: Which channel each index belongs to.
        num_channels: Channels of all groups.

    Returns:
        float32 on the CPU, shape ``[num_channels]``; NaN where no index belongs to the channel.
    """
    held = axis.channels >= 0
    channels = axis.channels[held]
    total = torch.full((num_channels,), torch.nan)
    total[channels] = 0.0
    return total.index_add_(0, channels, values.detach().to("cpu", torch.float32)[held])


def sum_other_dims(values: Tensor, dim: int) -> Tensor:
    """The sum over all dimensions but one, shape ``[values.shape[dim]]``."""
    others = [d for d in range(values.dim()) if d != dim]
    return values.sum(others) if others else values


# --- Gradients ------------------------------------------------------------------------------------


def first_order(
    model: nn.Module, groups: ChannelGroups, gradients: Mapping[str, Tensor | None]
) -> Tensor:
    """How much the loss would change, to first order, if a channel's parameters went to zero.

    Args:
        model: The module that was traced.
        groups: Its channels.
        gradients: Gradients of the loss by parameter name, shaped as the parameters; a missing one,
            or ``None``, counts as zero.

    Returns:
        The sum of ``w * gradient`` over all parameters (weights, biases, norms) that make or scale
        the channel in any layer; signed, float32 on the CPU, shape ``[num_channels]``. NaN where no
        parameter does.

    Raises:
        ValueError: As :func:`channel_parameters`, or if a gradient holds NaN or infinity.
    """
    total = torch.full((groups.num_channels,), torch.nan)
    for axis, parameter in channel_parameters(model, groups):
        gradient = gradients.get(axis.tensor)
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        if not bool(torch.isfinite(gradient).all()):
            raise ValueError(
                f"the gradient of {axis.tensor!r} holds NaN or infinity; lower the loss scale or "
                "look at the calibration batches."
            )
        products = parameter.detach().float() * gradient.float()
        part = sum_by_channel(sum_other_dims(products, axis.dim), axis, groups.num_channels)
        total = torch.where(total.isnan(), part, total + part.nan_to_num())
    return total


def measure_taylor(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor],
) -> Tensor:
    """The mean over batches of the squared first-order change of the loss.

    The model is in evaluation mode, so that neither batch norm statistics nor random numbers are
    touched; nor is any ``.grad``. Frozen parameters count as the others do.

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", equation 8,
    the sum taken over all parameters that go with the channel, as section 3.2 does for gates.

    Args:
        model: The module that was traced.
        groups: Its channels.
        batches: Calibration batches, at least one.
        loss_fn: Gives the scalar loss of ``model`` on one batch.

    Returns:
        float32 on the CPU, shape ``[num_channels]``, at least 0; NaN where no parameter makes or
        scales the channel.

    Raises:
        ValueError: As :func:`first_order`; if ``batches`` is empty or the loss is no scalar that
            depends on the model.
    """
    parameters = {axis.tensor: p for axis, p in channel_parameters(model, groups)}
    total = torch.zeros(groups.num_channels)
    num_batches = 0
    with evaluation_mode(model), _trainable(parameters.values()), torch.inference_mode(False):
        for batch in batches:
            with torch.enable_grad():
                loss = loss_fn(batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                    raise ValueError(
                        "loss_fn gave no scalar tensor that depends on the model's parameters, "
                        f"but {type(loss).__name__}; return the loss itself, not detached."
                    )
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            by_name = dict(zip(parameters, gradients, strict=True))
            total += first_order(model, groups, by_name).square()
            num_batches += 1
    if num_batches == 0:
        raise ValueError("batches is empty; give at least one calibration batch.")
    return total / num_batches


@contextmanager
def _trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    frozen = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


# --- Activations ----------------------------------------------------------------------------------


def measure_activations(
    model: nn.Module,
    groups: ChannelGroups,
    batches: Iterable[Any],
    forward: Forward,
    statistic: ActivationStatistic,
) -> Tensor:
    """What the layers that read a channel see of it.

    The inputs of convolutions, linear and attention layers are looked at, which is after whatever
    activation stands before them. A channel that several layers read has the mean over them.

    Source: Hu et al. 2016, "Network Trimming", equation 1, for the share of zeros. He et al. 2017,
    "Channel Pruning for Accelerating Very Deep Neural Networks", equation 1, for the contribution:
    what is lost where the channel goes, were the channels uncorrelated and the mean made up for.

    Args:
        model: The module that was traced; put into evaluation mode meanwhile.
        groups: Its channels.
        batches: Calibration batches, at least one.
        forward: Runs the model on one batch.
        statistic: ``"nonzero"``: the share of values that are not zero, in [0, 1].
            ``"magnitude"``: the mean absolute value. ``"contribution"``: the share of the reading
            layer's output variance that comes from the channel, in [0, 1]: the variance of its
            values times the squared norm of the weights that read it.

    Returns:
        float32 on the CPU, shape ``[num_channels]``; NaN where no such layer reads the channel.

    Raises:
        ValueError: If ``statistic`` is unknown, ``batches`` is empty or an activation holds NaN or
            infinity.
    """
    if statistic not in _MOMENTS:
        raise ValueError(f"statistic is {statistic!r}, expected one of {', '.join(_MOMENTS)}.")
    modules = dict(model.named_modules(remove_duplicate=False))
    readers: dict[str, tuple[ChannelAxis, nn.Module]] = {}
    for axis in groups.axes:
        layer = axis.tensor.rpartition(".")[0]
        if axis.role == "in" and _channel_dim(modules.get(layer)) is not None:
            readers.setdefault(layer, (axis, modules[layer]))
    seen: dict[str, tuple[Tensor, int]] = {}
    num_batches = 0
    with evaluation_mode(model), torch.no_grad(), ExitStack() as hooks:
        for layer, (axis, module) in readers.items():
            hook = _reading_hook(layer, axis, statistic, seen)
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        for batch in batches:
            forward(model, batch)
            num_batches += 1
    if num_batches == 0:
        raise ValueError("batches is empty; give at least one calibration batch.")
    rows = [torch.full((groups.num_channels,), torch.nan)]
    for layer, (sums, count) in seen.items():
        axis, module = readers[layer]
        mean = sums / count
        if statistic == "contribution":
            weight = module.get_parameter(axis.tensor.rpartition(".")[2]).detach().float()
            reads = sum_other_dims(weight.square(), axis.dim).cpu()
            parts = (mean[1] - mean[0].square()).clamp(min=0) * reads
            shares = parts / parts.sum().clamp(min=torch.finfo(parts.dtype).tiny)
            rows.append(sum_by_channel(shares, axis, groups.num_channels))
            rows[-1][_absent(axis, groups)] = torch.nan
        else:
            indices = sum_by_channel(torch.ones(axis.channels.numel()), axis, groups.num_channels)
            rows.append(sum_by_channel(mean[0], axis, groups.num_channels) / indices)
    return torch.stack(rows).nanmean(0)


_MOMENTS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "nonzero": (lambda values: values.ne(0),),
    "magnitude": (torch.abs,),
    "contribution": (lambda values: values, torch.square),
}
"""What is summed up of the values, for each statistic."""


def _absent(axis: ChannelAxis, groups: ChannelGroups) -> Tensor:
    """Which channels an axis does not hold: bool, shape ``[num_channels]``."""
    absent = torch.ones(groups.num_channels, dtype=torch.bool)
    absent[axis.channels[axis.channels >= 0]] = False
    return absent


def _channel_dim(module: nn.Module | None) -> int | None:
    """The dimension of a layer's input that holds channels, from the end; None for other layers."""
    if isinstance(module, (*_CONV, *_CONV_TRANSPOSE)):
        return -len(module.kernel_size) - 1
    if isinstance(module, (nn.Linear, nn.MultiheadAttention)):
        return -1
    return None


def _reading_hook(
    layer: str, axis: ChannelAxis, statistic: str, seen: dict[str, tuple[Tensor, int]]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A forward pre-hook that adds what a layer reads to ``seen[layer]``: sums and their count."""

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        dim = _channel_dim(module)
        # A grouped convolution's axis has fewer indices than its input has channels.
        if dim is None or inputs.shape[dim] != axis.channels.numel():
            return
        values = inputs.detach().float()
        moments = [moment(values).float() for moment in _MOMENTS[statistic]]
        by_channel = [sum_other_dims(moment, dim % inputs.dim()) for moment in moments]
        sums = torch.stack(by_channel).cpu().double()
        if not bool(torch.isfinite(inputs).all()):
            raise ValueError(
                f"the input of {layer!r} holds NaN or infinity on a calibration batch; look at the "
                "batch or the weights before it."
            )
        total, count = seen.get(layer, (torch.zeros_like(sums), 0))
        seen[layer] = (total + sums, count + inputs.numel() // inputs.shape[dim])

    return look

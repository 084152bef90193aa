"""Biases as int32, in multiples of input scale times weight scale; batch norms folded in."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["bias_on_product_grid", "fold_batch_norm", "integer_bias"]

_MAX_STEPS = 2.0**30


def bias_on_product_grid(bias: Tensor, step: Tensor) -> Tensor:
    """A bias rounded to int32 multiples of a step (Jacob et al. 2018, section 2.4).

    Args:
        bias: Float, ``[channels]``.
        step: Scale of the input times scale of the weight, ``[channels]``.

    Returns:
        Of the shape and dtype of ``bias``; as it is where a step is 0 or too small for int32.
    """
    steps = torch.round(bias / step)
    fits = (step > 0) & (steps.abs() <= _MAX_STEPS)
    return torch.where(fits, steps * step, bias)


def fold_batch_norm(norm: nn.Module, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factor of a batch norm in evaluation mode, and the bias of layer and norm together.

    Args:
        norm: With running statistics, behind the layer.
        bias: Of the layer, ``[channels]``.

    Returns:
        Both ``[channels]``, float32.
    """
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    wide = torch.float32 if norm.running_mean.device.type == "mps" else torch.float64
    mean, factor = norm.running_mean.to(wide), torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.to(wide)
    shift = ((bias.to(wide) if bias is not None else 0.0) - mean) * factor
    if norm.bias is not None:
        shift = shift + norm.bias.to(wide)
    return factor.float(), shift.float()


def integer_bias(
    bias: Tensor | None, step: Tensor, norm: nn.Module | None, dtype: torch.dtype
) -> Tensor | None:
    """The bias with which a layer, and the batch norm behind it, give what an integer kernel gives.

    Args:
        bias: Of the layer, ``[channels]``; the gradient passes as if it were not rounded.
        step: Scale of the input times scale of the weight, ``[]`` or ``[channels]``, float32.
        norm: The batch norm that is fused into the layer, in evaluation mode.
        dtype: Of the weight that goes with it.

    Returns:
        ``[channels]`` in ``dtype``; ``None`` where the layer has no bias and needs none.
    """
    if norm is None and bias is None:
        return None
    with torch.no_grad():
        if norm is None:
            assert bias is not None
            change = bias_on_product_grid(bias.float(), step) - bias.float()
        else:
            factor, folded = fold_batch_norm(norm, bias)
            error = bias_on_product_grid(folded, step * factor.abs()) - folded
            change = torch.where(factor != 0, error / factor, 0.0)
        change = change.to(dtype)
    return change if bias is None else bias.to(dtype) + change

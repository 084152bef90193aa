"""Sample random output positions of a layer, with the inputs that it reads there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Layer", "channels_at_end", "input_patches", "sample_positions"]

Layer: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear
"""The layers whose outputs are linear in a patch of their inputs."""


def channels_at_end(module: Layer, y: Tensor) -> Tensor:
    """A layer's output or input as ``[images, *positions, channels]``."""
    if isinstance(module, nn.Linear):
        return y if y.dim() > 1 else y.unsqueeze(0)
    batched = y if y.dim() == len(module.kernel_size) + 2 else y.unsqueeze(0)
    return batched.movedim(1, -1)


def sample_positions(shape: Sequence[int], num_points: int, generator: torch.Generator) -> Tensor:
    """Random positions in each image, none twice: int64, ``[1 + spatial dims, samples]``."""
    images, spatial = shape[0], list(shape[1:-1])
    size = math.prod(spatial)
    if size <= num_points:
        flat = torch.arange(size).expand(images, size)
    else:
        flat = torch.rand(images, size, generator=generator).topk(num_points).indices
    image = torch.arange(images).repeat_interleave(flat.shape[1])
    if not spatial:
        return image.unsqueeze(0)
    return torch.stack([image, *torch.unravel_index(flat.flatten(), spatial)])


def input_patches(module: Layer, x: Tensor, positions: Tensor) -> Tensor:
    """What the layer reads at some positions of its output: ``[samples, weight.flatten(1) dim]``.

    Only those patches are copied, never the unfolded map.
    """
    x = channels_at_end(module, x)
    if isinstance(module, nn.Linear):
        return x[tuple(positions)]
    x = x.movedim(-1, 1)
    padding = _padding(module)
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, padding, mode)
    num_dims = len(module.kernel_size)
    index: list[Any] = [positions[0].view(-1, *[1] * num_dims), slice(None)]
    for dim in range(num_dims):
        taps = torch.arange(module.kernel_size[dim], device=x.device) * module.dilation[dim]
        places = (positions[1 + dim] * module.stride[dim]).unsqueeze(1) + taps
        shape = [1] * num_dims
        shape[dim] = -1
        index.append(places.view(len(places), *shape))
    gathered = x[tuple(index)]  # [samples, *kernel, channels]: the indexed dimensions come first
    return gathered.movedim(-1, 1).flatten(1)


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """The padding as ``nn.functional.pad`` takes it: the last dimension first, two numbers each."""
    pairs: list[tuple[int, int]] = []
    for dim, kernel in enumerate(module.kernel_size):
        if module.padding == "same":
            total = module.dilation[dim] * (kernel - 1)
            pairs.append((total // 2, total - total // 2))
        elif module.padding == "valid":
            pairs.append((0, 0))
        else:
            pairs.append((int(module.padding[dim]), int(module.padding[dim])))
    return [size for pair in reversed(pairs) for size in pair]

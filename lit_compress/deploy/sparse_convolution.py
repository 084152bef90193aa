"""1 x 1 convolutions that compute with the non-zero weights only.

A 1 x 1 convolution is a matrix product of weights and pixels. With the weights in compressed sparse
rows, MKL's product of a sparse and a dense matrix takes time by the number of non-zero weights; a
dense kernel is faster as long as there are many. On a CPU with AVX-512, one thread, both meet near
75 % zeros.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn

__all__ = ["SparsePointwiseConv2d", "use_sparse_kernels"]


class SparsePointwiseConv2d(nn.Module):
    """A 1 x 1 convolution with its weight in compressed sparse rows; for evaluation.

    Args:
        layer: The dense layer: kernel 1 x 1, one group, no padding, on the CPU.

    Attributes:
        weight: ``[out, in]``, sparse CSR, a buffer.
        bias: ``[out]`` or ``None``, a buffer.
        stride: Step along height and width.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        weight = layer.weight.detach().flatten(1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self.register_buffer("weight", weight.to_sparse_csr())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.stride = (layer.stride[0], layer.stride[1])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, in, h, w)`` to ``(batch, out, h / stride, w / stride)``."""
        down, across = self.stride
        if (down, across) != (1, 1):
            x = x[:, :, ::down, ::across]
        height, width = x.shape[2:]
        pixels = x.flatten(2)
        # One product an image: its pixels lie side by side in memory as they are.
        products = torch.stack([torch.mm(self.weight, image) for image in pixels])
        if self.bias is not None:
            products += self.bias[:, None]
        return products.reshape(*products.shape[:2], height, width)

    def extra_repr(self) -> str:
        """Sizes and zeros."""
        out, channels = self.weight.shape
        zeros = 1 - self.weight.values().numel() / (out * channels)
        return f"{channels}, {out}, stride={self.stride}, sparsity={zeros:.3f}"


def use_sparse_kernels(
    network: nn.Module, threshold: float = 0.75
) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of a network whose sparse 1 x 1 convolutions run on a sparse kernel.

    For evaluation on the CPU: the layers replaced have no parameters to train.

    Args:
        network: A network of float32; unchanged.
        threshold: Least share of zeros among a layer's weights, in [0, 1).

    Returns:
        The copy, and the names of the layers replaced, in its order.

    Raises:
        ValueError: If the threshold is out of range, or a weight is not on the CPU.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise ValueError(f"threshold={threshold!r}; expected a number in [0, 1).")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold}; expected a number in [0, 1).")
    sparse = copy.deepcopy(network)
    replaced = []
    for name, layer in network.named_modules():
        if not name or not _is_pointwise(layer):
            continue
        if layer.weight.device.type != "cpu":
            raise ValueError(
                f"the weight of {name!r} is on {layer.weight.device}; the sparse kernels run on "
                "the CPU. Move the network there first."
            )
        if _zeros(layer.weight) < threshold:
            continue
        sparse.set_submodule(name, SparsePointwiseConv2d(layer).train(layer.training))
        replaced.append(name)
    return sparse, tuple(replaced)


def _is_pointwise(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (1, 1)
        and layer.groups == 1
        and layer.padding in ((0, 0), "valid")
        and layer.weight.dtype == torch.float32
    )


def _zeros(weight: Tensor) -> float:
    return 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)

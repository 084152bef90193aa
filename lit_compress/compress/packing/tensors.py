"""The encodings of a packed file (raw, clustered, sparse, integers) and packing of bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Clustered",
    "Integers",
    "PackedTensor",
    "Raw",
    "Sparse",
    "num_index_bits",
    "pack_bits",
    "packed_form",
    "unpack_bits",
]

_MAX_VALUES = 256
_NUM_SAMPLED = 4096


@dataclass(frozen=True)
class Raw:
    """A tensor stored as it is.

    Attributes:
        values: Any shape; floating point, complex, integer or bool.
    """

    values: Tensor


@dataclass(frozen=True)
class Clustered:
    """A tensor of few distinct values, stored as those and which of them each element is.

    Attributes:
        centroids: Shape ``[k]``, k in [1, 256].
        indices: uint8, any shape.

    Raises:
        ValueError: If an index has no centroid, or a shape or dtype is another one.
    """

    centroids: Tensor
    indices: Tensor

    def __post_init__(self) -> None:
        if self.centroids.dim() != 1 or not 1 <= len(self.centroids) <= _MAX_VALUES:
            raise ValueError(
                f"centroids have shape {tuple(self.centroids.shape)}, expected [k] with k from 1 "
                f"to {_MAX_VALUES}."
            )
        if self.indices.dtype != torch.uint8:
            raise ValueError(f"indices are {self.indices.dtype}, expected torch.uint8.")
        if self.indices.numel() and int(self.indices.max()) >= len(self.centroids):
            raise ValueError(
                f"an index is {int(self.indices.max())}, expected less than the number of "
                f"centroids, {len(self.centroids)}."
            )

    @property
    def values(self) -> Tensor:
        """The tensor: the shape of ``indices``, the dtype of ``centroids``."""
        return self.centroids[self.indices.int()]


@dataclass(frozen=True)
class Sparse:
    """A tensor stored as where it is not zero, and what it is there.

    Attributes:
        mask: bool, any shape; true where it is not zero.
        nonzeros: Shape ``[n]``, one for each true element of the mask.

    Raises:
        ValueError: If ``mask`` is not bool, or the numbers differ.
    """

    mask: Tensor
    nonzeros: Tensor

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise ValueError(f"the mask is {self.mask.dtype}, expected torch.bool.")
        num = int(self.mask.count_nonzero())
        if self.nonzeros.shape != (num,):
            raise ValueError(
                f"nonzeros have shape {tuple(self.nonzeros.shape)}, expected [{num}] as the mask "
                "says."
            )

    @property
    def values(self) -> Tensor:
        """The tensor: the shape of ``mask``, the dtype of ``nonzeros``."""
        zeros = torch.zeros(self.mask.shape, dtype=self.nonzeros.dtype, device=self.mask.device)
        return zeros.masked_scatter_(self.mask, self.nonzeros)


@dataclass(frozen=True)
class Integers:
    """A tensor of small integers, such as the weights of a quantized layer.

    Their scales are tensors of their own, under names of their own.

    Attributes:
        values: int8, any shape, in [-2^(bits-1), 2^(bits-1) - 1].
        bits: Bits of each, 2 to 8.

    Raises:
        ValueError: If the dtype or ``bits`` is another one, or a value needs more bits.
    """

    values: Tensor
    bits: int

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits!r}, expected a whole number from 2 to 8.")
        if self.values.dtype != torch.int8:
            raise ValueError(f"integers are {self.values.dtype}, expected torch.int8.")
        if self.values.numel() == 0:
            return
        least, largest, half = int(self.values.min()), int(self.values.max()), self.half
        if least < -half or largest >= half:
            raise ValueError(
                f"the integers reach from {least} to {largest}, expected {-half} to {half - 1} "
                f"for {self.bits} bits."
            )

    @property
    def half(self) -> int:
        """Half as many integers as there are of these bits."""
        return 1 << (self.bits - 1)


PackedTensor: TypeAlias = Raw | Clustered | Sparse | Integers


@torch.no_grad()
def packed_form(values: Tensor) -> Raw | Clustered | Sparse:
    """A tensor in a form that takes less room where there is one; equal to it bit by bit.

    `Clustered` where it has few distinct values, else `Sparse` where it has enough zeros. Values
    are told apart by their bits, so that -0 (which is none of the zeros) and NaN come back as they
    were.

    Args:
        values: Any shape. Only floating point of 16 and 32 bits is looked at; all else is `Raw`.
    """
    same_size = {4: torch.int32, 2: torch.int16}.get(values.element_size())
    if not values.is_floating_point() or same_size is None or values.numel() == 0:
        return Raw(values)
    flat = values.detach().flatten()
    bits = flat.view(same_size)
    sample = bits[:: max(1, len(bits) // _NUM_SAMPLED)]
    if len(torch.unique(sample)) <= _MAX_VALUES:
        found, indices = torch.unique(bits, return_inverse=True)
        num_bytes = found.nbytes + len(bits) * num_index_bits(len(found)) / 8
        if len(found) <= _MAX_VALUES and num_bytes < values.nbytes:
            indices = indices.to(torch.uint8).view(values.shape)
            return Clustered(found.view(values.dtype), indices)
    mask = bits != 0
    nonzeros = flat[mask]
    if nonzeros.nbytes + len(bits) / 8 < values.nbytes:
        return Sparse(mask.view(values.shape), nonzeros)
    return Raw(values)


def num_index_bits(num_values: int) -> int:
    """Bits that tell one of ``num_values`` from the others: ``ceil(log2(num_values))``.

    Examples:
        >>> [num_index_bits(k) for k in (1, 2, 3, 16, 17, 256)]
        [0, 1, 2, 4, 5, 8]
    """
    return (num_values - 1).bit_length()


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Small numbers one after the other, ``bits`` bits each, the lowest bit first.

    Args:
        values: uint8, any shape, n elements below ``2**bits``, on any device.
        bits: 0 to 8.

    Returns:
        uint8 on the CPU, shape ``[ceil(n * bits / 8)]``, padded with zeros at the end.

    Examples:
        >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 3)
        tensor([209,   0], dtype=torch.uint8)
    """
    flat = values.detach().to("cpu").flatten()
    places = torch.arange(8, dtype=torch.uint8)
    planes = ((flat.unsqueeze(1) >> places[:bits]) & 1).flatten()
    planes = torch.nn.functional.pad(planes, (0, -len(planes) % 8)).view(-1, 8)
    return (planes << places).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, num: int) -> Tensor:
    """The way back from :func:`pack_bits`.

    Args:
        packed: uint8, shape ``[ceil(num * bits / 8)]``.
        bits: 0 to 8.
        num: How many numbers there are.

    Returns:
        uint8, shape ``[num]``, on the device of ``packed``.

    Raises:
        ValueError: If the number of bytes is another one.
    """
    expected = (num * bits + 7) // 8
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"{num} numbers of {bits} bits are {expected} bytes of uint8; came "
            f"{tuple(packed.shape)} of {packed.dtype}."
        )
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    planes = ((packed.unsqueeze(1) >> places) & 1).flatten()[: num * bits].view(num, bits)
    return (planes << places[:bits]).sum(1, dtype=torch.uint8)

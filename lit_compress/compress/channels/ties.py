"""Union-find over channel atoms: which indices of which tensors are removed only together.

Every index of every axis of every parameter begins as an *atom* of its own. Running the model ties
atoms together (a sum ties the channels of its operands), pins some down (what reaches the output
must stay) and adds bonds (the blocks of a grouped convolution must stay equally large).

Tensors on their way through the model carry *labels*: a tuple of integer arrays, each with one
dimension for each of the tensor's, of size 1 where the array says nothing. A weight of shape
``(out, in, 3, 3)`` has the labels ``[out, 1, 1, 1]`` and ``[1, in, 1, 1]``; a tensor that was split
into heads, ``(batch, heads, length, size)``, has one array ``[1, heads, 1, size]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Labels", "Ties", "Traced", "broadcast", "one_dimension", "reshape", "support"]

Array: TypeAlias = npt.NDArray[np.int64]
Labels: TypeAlias = tuple[Array, ...]


@dataclass(frozen=True)
class Traced:
    """What is known of a tensor.

    Attributes:
        labels: Arrays of atoms with disjoint supports.
        is_weight: Whether it is a parameter or buffer, or a mere view of one.
    """

    labels: Labels
    is_weight: bool = False


class Ties:
    """Atoms, and what is known of them."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, dtype=np.int64)
        self._size = 0
        self.pinned: dict[int, str] = {}  # root -> why its channel has to stay
        self.bonds: list[Array] = []  # atoms [rows, n]; each row must lose as many as the others

    def new(self, count: int) -> Array:
        """That many fresh atoms, int64, shape ``[count]``."""
        if self._size + count > self._parent.size:
            grown = np.arange(max(1024, 2 * (self._size + count)), dtype=np.int64)
            grown[: self._size] = self._parent[: self._size]
            self._parent = grown
        atoms = np.arange(self._size, self._size + count, dtype=np.int64)
        self._size += count
        return atoms

    def roots(self, atoms: Array) -> Array:
        """The representative of each atom's class, in the shape of ``atoms``."""
        roots = self._parent[atoms]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                return roots
            roots = above

    def tie(self, left: Array, right: Array) -> None:
        """Each atom on the left belongs together with the one on the right; equal shapes."""
        first, second = self.roots(left).ravel(), self.roots(right).ravel()
        apart = first != second
        first, second = first[apart], second[apart]
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self._root(a), self._root(b)))
            if low != high:
                self._parent[high] = low
                reason = self.pinned.pop(high, None)
                if reason is not None:
                    self.pinned.setdefault(low, reason)
        self._parent[first] = self.roots(first)
        self._parent[second] = self.roots(second)

    def pin(self, atoms: Array, reason: str) -> None:
        """These channels have to stay."""
        for root in np.unique(self.roots(atoms)).tolist():
            self.pinned.setdefault(root, reason)

    def pin_all(self, labels: Labels, reason: str) -> None:
        """All channels that a tensor carries have to stay."""
        for array in labels:
            self.pin(array, reason)

    def bond(self, rows: Array) -> None:
        """Each row of atoms, shape ``[rows, n]``, must lose as many channels as the others."""
        if rows.shape[0] > 1:
            self.bonds.append(rows.copy())

    def match(self, left: Labels, right: Labels, shapes: Sequence[Any], why: str) -> None:
        """Two tensors meet index by index, after broadcasting.

        Where both say which channel an index is, the channels are tied. Where one of them does not
        say, although it has as many indices, the other's channels are pinned.

        Args:
            left: Labels of the one, with as many dimensions as those of the other.
            right: Labels of the other.
            shapes: The shapes of both.
            why: The operation, for the reason.
        """
        for ours, theirs, shape in ((left, right, shapes[1]), (right, left, shapes[0])):
            for array in ours:
                dims = support(array)
                met = [other for other in theirs if set(support(other)) & set(dims)]
                if any(support(other) != dims for other in met):
                    self.pin_all((array, *met), f"its channels are mixed with others in {why}")
                elif met:
                    self.tie(array, met[0])
                elif dims and shape[dims[-1]] > 1:  # before it are rows, whose number stays
                    self.pin(array, f"meets a tensor of fixed size in {why}")

    def _root(self, atom: int) -> int:
        while self._parent[atom] != atom:
            atom = int(self._parent[atom])
        return atom


def support(array: Array) -> tuple[int, ...]:
    """The dimensions along which an array of labels says something."""
    return tuple(d for d, size in enumerate(array.shape) if size > 1)


def one_dimension(ndim: int, dim: int) -> list[int]:
    """The shape that lays a vector along one of ``ndim`` dimensions."""
    return [-1 if d == dim else 1 for d in range(ndim)]


def broadcast(labels: Labels, ndim: int) -> Labels:
    """Labels with as many leading dimensions of size 1 as are missing."""
    return tuple(a.reshape((1,) * (ndim - a.ndim) + a.shape) for a in labels)


def reshape(labels: Labels, old: Sequence[int], new: Sequence[int], ties: Ties) -> Labels:
    """Labels of a tensor that is viewed in another shape.

    Splitting a dimension of channels bonds the rows that come of it. Channels are pinned where two
    kinds of them end up in one dimension.

    Args:
        labels: Labels of the tensor.
        old: Its shape.
        new: Its new shape.
        ties: Takes bonds and pins.
    """
    segments = _segments(old, new)
    moved: list[Array] = []
    for array in labels:
        full: list[int] = []  # the array's shape, spread out where its segment is tracked
        target: list[int] = []
        for old_dims, new_dims in segments:
            tracked = any(array.shape[d] > 1 for d in old_dims)
            full += [old[d] if tracked else 1 for d in old_dims]
            target += [new[d] if tracked else 1 for d in new_dims]
        spread = np.broadcast_to(array, full).reshape(target)
        for dim in support(spread):
            if bool((spread == spread.take([0], dim)).all()):
                spread = spread.take([0], dim)
        dims = support(spread)
        if len(dims) > max(1, len(support(array))):
            ties.bond(np.moveaxis(spread, dims[-1], -1).reshape(-1, spread.shape[dims[-1]]))
        moved.append(spread)
    for i, array in enumerate(moved):
        for other in moved[:i]:
            if set(support(array)) & set(support(other)):
                ties.pin_all((array, other), "its channels are mixed with others in a reshape")
                moved = [a for a in moved if a is not array and a is not other]
    return tuple(moved)


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest runs of dimensions with equal products, in order."""
    segments: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        if i < len(old):
            left, a, i = [i], old[i], i + 1
        if j < len(new) and (a != 1 or not left):
            right, b, j = [j], new[j], j + 1
        while a != b:
            if a < b:
                left.append(i)
                a, i = a * old[i], i + 1
            else:
                right.append(j)
                b, j = b * new[j], j + 1
        segments.append((left, right))
    return segments

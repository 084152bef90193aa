"""Sparsity patterns: single weights, n:m and blocks, as units that are removed together.

A pattern turns a weight into *units* with a score each. The selection of units is the same for all
patterns (the smallest scores go); the pattern then expands the kept units to a mask over weights.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Block", "NofM", "SparsityPattern", "Unstructured", "parse_pattern"]


class SparsityPattern(ABC):
    """How the weights of one tensor are grouped into units that live or die together."""

    @property
    def max_sparsity(self) -> float:
        """The largest share of zeros that the pattern allows."""
        return 1.0

    @abstractmethod
    def misfit(self, shape: torch.Size) -> str | None:
        """Why a weight of this shape cannot carry the pattern, or ``None`` if it can."""

    @abstractmethod
    def num_units(self, shape: torch.Size) -> int:
        """How many units a weight of this shape has."""

    @abstractmethod
    def scores(self, weight: Tensor) -> Tensor:
        """A non-negative score for each unit, shape ``(num_units,)``; ``inf`` must stay."""

    @abstractmethod
    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """From kept units, bool ``(num_units,)``, to a mask over weights, bool ``shape``."""


@dataclass(frozen=True)
class Unstructured(SparsityPattern):
    """Each weight on its own."""

    def misfit(self, shape: torch.Size) -> str | None:
        """Every shape fits."""
        return None

    def num_units(self, shape: torch.Size) -> int:
        """The number of weights."""
        return shape.numel()

    def scores(self, weight: Tensor) -> Tensor:
        """The magnitudes, in memory order of the logical shape."""
        return weight.detach().abs().reshape(-1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """The kept weights in the weight's shape."""
        return kept.view(shape)

    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NofM(SparsityPattern):
    """At most ``n`` of each ``m`` consecutive input channels are non-zero, as in 2:4.

    The groups run along dimension 1 (input features or channels) at one output and kernel
    position, as sparse tensor cores read them (Mishra et al. 2021, section 3). While a schedule
    ramps up, the zeros are a subset of what the full pattern removes, so that the count is exact
    at every moment and the pattern complete at ``1 - n / m``.

    Attributes:
        n: Weights kept in each group, at least 1.
        m: The size of a group, larger than ``n``.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(
                f"pattern {self.n}:{self.m} keeps {self.n} of {self.m}; expected at least 1 "
                "and fewer than all, as in '2:4'."
            )

    @property
    def max_sparsity(self) -> float:
        """``1 - n / m``."""
        return 1.0 - self.n / self.m

    def misfit(self, shape: torch.Size) -> str | None:
        """Dimension 1 must be a multiple of ``m``."""
        if len(shape) < 2 or shape[1] % self.m:
            size = shape[1] if len(shape) > 1 else 1
            return f"{size} input channels are not a multiple of {self.m} (pattern {self})"
        return None

    def num_units(self, shape: torch.Size) -> int:
        """The number of weights."""
        return shape.numel()

    def scores(self, weight: Tensor) -> Tensor:
        """The magnitudes, with ``inf`` for the ``n`` largest of each group (the last in a tie)."""
        scores = weight.detach().abs().movedim(1, -1).contiguous()
        groups = scores.view(-1, self.m)
        largest = groups.argsort(dim=1, stable=True)[:, self.m - self.n :]
        groups.scatter_(1, largest, torch.inf)
        return scores.movedim(-1, 1).reshape(-1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """The kept weights in the weight's shape."""
        return kept.view(shape)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block(SparsityPattern):
    """Blocks of ``rows`` output channels by ``cols`` input channels at one kernel position.

    ``4x1`` is the pattern of JCW (blocks of four consecutive output channels), for which fast
    kernels exist on phones. A block's score is its mean magnitude.

    Attributes:
        rows: Consecutive output channels (dimension 0) in a block, at least 1.
        cols: Consecutive input channels (dimension 1) in a block, at least 1.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.rows * self.cols == 1:
            raise ValueError(
                f"pattern {self.rows}x{self.cols} is no block; expected two weights or more, as in "
                "'4x1' (4 output channels, 1 input channel)."
            )

    def misfit(self, shape: torch.Size) -> str | None:
        """Dimensions 0 and 1 must be multiples of the block's sides."""
        if len(shape) < 2 or shape[0] % self.rows or shape[1] % self.cols:
            return f"shape {tuple(shape)} cannot be cut into blocks of {self}"
        return None

    def num_units(self, shape: torch.Size) -> int:
        """The number of blocks."""
        return shape.numel() // (self.rows * self.cols)

    def scores(self, weight: Tensor) -> Tensor:
        """The mean magnitude of each block."""
        return self._blocks(weight.detach().abs()).mean(dim=(1, 3)).reshape(-1)

    def expand(self, kept: Tensor, shape: torch.Size) -> Tensor:
        """Each kept block as a patch of ones."""
        outputs, inputs, *kernel = shape
        grid = kept.view(outputs // self.rows, 1, inputs // self.cols, 1, *kernel)
        full = grid.expand(outputs // self.rows, self.rows, inputs // self.cols, self.cols, *kernel)
        return full.reshape(shape)

    def _blocks(self, weight: Tensor) -> Tensor:
        """``(out, in, *kernel)`` to ``(out / rows, rows, in / cols, cols, *kernel)``."""
        outputs, inputs, *kernel = weight.shape
        return weight.reshape(
            outputs // self.rows, self.rows, inputs // self.cols, self.cols, *kernel
        )

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}"


def parse_pattern(text: str) -> SparsityPattern:
    """A pattern from its name.

    Args:
        text: ``"unstructured"``; ``"n:m"`` as in ``"2:4"`` (at most 2 of 4 input channels are
            kept); or ``"rxc"`` as in ``"4x1"`` (blocks of 4 output channels by 1 input channel).

    Raises:
        ValueError: If the name is none of these.

    Examples:
        >>> parse_pattern("2:4").max_sparsity
        0.5
    """
    if text == "unstructured":
        return Unstructured()
    if match := re.fullmatch(r"(\d+):(\d+)", str(text)):
        return NofM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+)x(\d+)", str(text)):
        return Block(int(match[1]), int(match[2]))
    hint = (
        " YAML reads 2:4 without quotes as the number 124: write pattern: '2:4'."
        if re.fullmatch(r"\d+", str(text))
        else ""
    )
    raise ValueError(
        f"pattern is {text!r}, expected 'unstructured', 'n:m' such as '2:4', or a block 'rxc' such "
        f"as '4x1'.{hint}"
    )

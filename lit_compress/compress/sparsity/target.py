"""SparsityTarget: initial and final sparsity, and how much is due at each moment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lit_compress.compress.schedules import Ramp
from lit_compress.compress.sparsity.magnitude import allocate_zeros, check_sparsity
from lit_compress.compress.sparsity.patterns import NofM, SparsityPattern, Unstructured

__all__ = ["Allocation", "FinalSparsity", "SparsityTarget"]

Allocation: TypeAlias = Literal["uniform", "global", "heuristic"]
FinalSparsity: TypeAlias = float | dict[str, float] | Literal["searched"]
"""Of all layers, of each by name pattern, or what a search is to find."""


@dataclass(frozen=True)
class SparsityTarget:
    """The sparsity at the start and at the end of a schedule, and how layers share it.

    Attributes:
        final: Zeros / weights at the end, in [0, 1); or a mapping from name patterns of layers to
            the sparsity of each, of which the first that matches a layer counts; or ``"searched"``
            where a search is to find them: then a mapping has to take its place before
            :meth:`scheduled`.
        initial: Zeros / weights at the start, in [0, final].
        allocation: How a single ``final`` is shared among layers; see
            :func:`~lit_compress.compress.sparsity.magnitude.allocate_zeros`.
        pattern: What is removed together.

    Raises:
        ValueError: If a value is out of range, or two of them disagree.
    """

    final: float | Mapping[str, float] | Literal["searched"]
    initial: float = 0.0
    allocation: Allocation = "uniform"
    pattern: SparsityPattern = field(default_factory=Unstructured)

    def __post_init__(self) -> None:
        if self.allocation not in ("uniform", "global", "heuristic"):
            raise ValueError(
                f"allocation is {self.allocation!r}, expected 'uniform', 'global' or 'heuristic'."
            )
        check_sparsity("initial_sparsity", self.initial)
        if isinstance(self.final, str):
            self._check_searched()
        if isinstance(self.final, Mapping):
            self._check_mapping(self.final)
        for name, final in self._finals():
            check_sparsity(name, final)
            if final < self.initial:
                raise ValueError(
                    f"{name} is {final}, below initial_sparsity={self.initial}; sparsity cannot "
                    "fall during a run. Give a smaller initial_sparsity."
                )
        if isinstance(self.pattern, NofM):
            self._check_completes(self.pattern)

    @property
    def layers(self) -> list[str] | None:
        """The name patterns that a mapping holds; ``None`` for a single number."""
        return list(self.final) if isinstance(self.final, Mapping) else None

    @property
    def waits_for_search(self) -> bool:
        """Whether the sparsities are still to be found."""
        return self.final == "searched"

    def scheduled(
        self,
        ramp: Ramp,
        point: int,
        weights: Mapping[str, int],
        taken_by: Mapping[str, str] | None = None,
    ) -> Scheduled:
        """What is due at one moment.

        Args:
            ramp: The schedule.
            point: The moment, in the ramp's unit.
            weights: Units of the pattern in each weight, by qualified parameter name.
            taken_by: For each of these names the key of a mapping that it belongs to; see
                :class:`~lit_compress.compress.layers.Selection`.

        Returns:
            The sparsity that is due and the zeros that make it.
        """
        assert not isinstance(self.final, str), "a mapping takes the place of 'searched' before"
        sparsity: float | dict[str, float]
        if isinstance(self.final, Mapping):
            assert taken_by is not None, "a mapping needs to know which of its patterns counts"
            sparsity = {
                name: ramp.value(point, self.initial, self.final[taken_by[name]])
                for name in weights
            }
        else:
            sparsity = ramp.value(point, self.initial, self.final)
        return Scheduled(sparsity, allocate_zeros(weights, sparsity, self.allocation))

    def _finals(self) -> list[tuple[str, float]]:
        if isinstance(self.final, Mapping):
            return [(f"final_sparsity[{glob!r}]", value) for glob, value in self.final.items()]
        return [] if isinstance(self.final, str) else [("final_sparsity", self.final)]

    def _check_searched(self) -> None:
        if self.final != "searched":
            raise ValueError(
                f"final_sparsity is {self.final!r}, expected a number in [0, 1), a mapping from "
                "name patterns of layers to such numbers, or 'searched'."
            )
        if self.allocation != "uniform" or not isinstance(self.pattern, Unstructured):
            raise ValueError(
                "final_sparsity is 'searched', which finds single weights for each layer, and "
                f"allocation={self.allocation!r} and the pattern {self.pattern} are given; leave "
                "both out."
            )

    def _check_mapping(self, final: Mapping[str, float]) -> None:
        if not final:
            raise ValueError(
                "final_sparsity is an empty mapping; give at least one name pattern, as in "
                "{'*.conv?': 0.8}, or a single number."
            )
        if self.allocation != "uniform":
            raise ValueError(
                "final_sparsity is a mapping, which fixes every layer, and "
                f"allocation={self.allocation!r} is given too; leave allocation out or give a "
                "single final_sparsity."
            )

    def _check_completes(self, pattern: NofM) -> None:
        for name, final in self._finals():
            if not math.isclose(final, pattern.max_sparsity, abs_tol=1e-6):
                raise ValueError(
                    f"{name} is {final}, but the pattern {pattern} is complete at exactly "
                    f"{pattern.max_sparsity:g} and of no use before; write "
                    f"final_sparsity={pattern.max_sparsity:g}."
                )
        if self.allocation == "heuristic":
            raise ValueError(
                f"the pattern {pattern} fixes the sparsity of every layer, allocation='heuristic' "
                "would vary it; use allocation='uniform'."
            )


@dataclass(frozen=True)
class Scheduled:
    """What a target asks for at one moment.

    Attributes:
        sparsity: In all layers together, or in each weight where the target is a mapping.
        num_zeros: Units in each weight, or one number for all of them (global allocation).
    """

    sparsity: float | dict[str, float]
    num_zeros: dict[str, int] | int

"""The state of a trace that operator rules read and write, and the registry of the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lit_compress.compress.channels.groups import AxisRole
from lit_compress.compress.channels.ties import Array, Labels, Ties, Traced, support

__all__ = ["Rule", "TraceState", "registering"]


class TraceState:
    """What rules read and write while a model runs.

    Attributes:
        ties: The union-find.
        roles: For an atom that began on an axis of a parameter: how that axis is used.
        contracted: Atoms over which two activations were multiplied and summed (attention).
        operator: The name of the operator at work, for reasons.
    """

    def __init__(self) -> None:
        self.ties = Ties()
        self.roles: dict[int, AxisRole] = {}
        self.contracted: list[Array] = []
        self.operator = ""
        self._traced: dict[int, tuple[Tensor, Traced]] = {}

    def see(self, tensor: Tensor, traced: Traced) -> None:
        """Remember a tensor; it is kept alive, so that its identity is not reused."""
        self._traced[id(tensor)] = (tensor, traced)

    def of(self, tensor: Any) -> Traced:
        """What is known of a tensor, or of anything else: nothing."""
        held = self._traced.get(id(tensor))
        return held[1] if held is not None else Traced(())

    def labels(self, tensor: Any) -> Labels:
        """The labels of a tensor."""
        return self.of(tensor).labels

    def along(self, tensor: Tensor, dim: int) -> Array | None:
        """The atoms along one dimension, shape ``[size]``, where it stands for itself."""
        for array in self.labels(tensor):
            if support(array) == (dim % tensor.dim(),):
                return array.ravel()
        return None

    def use(self, tensor: Any, dim: int, role: AxisRole) -> None:
        """Note the role of a weight's axis; ``"out"`` and ``"in"`` prevail over ``"scale"``."""
        if not isinstance(tensor, Tensor) or not self.of(tensor).is_weight:
            return
        atoms = self.along(tensor, dim)
        if atoms is not None:
            for atom in atoms.tolist():
                if self.roles.get(atom, "scale") == "scale":
                    self.roles[atom] = role

    def pin_others(self, tensor: Tensor, dims: Sequence[int], why: str) -> None:
        """Pin every channel of a tensor that does not lie along one of ``dims`` alone."""
        allowed = {(d % tensor.dim(),) for d in dims}
        for array in self.labels(tensor):
            if support(array) not in allowed:
                self.ties.pin(array, why)


Rule: TypeAlias = Callable[[TraceState, Sequence[Any], Any], Labels]


def registering(rules: dict[str, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """Make a decorator that puts rules into a table, under the names of their operators.

    Args:
        rules: The table.
    """

    def named(*names: str) -> Callable[[Rule], Rule]:
        def register(rule: Rule) -> Rule:
            rules.update(dict.fromkeys(names, rule))
            return rule

        return register

    return named

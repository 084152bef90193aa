"""StructureRecord: what cuts changed in a model, as plain data stored beside its weights.

Weights of a cut model fit no freshly built one: its layers are wider. A :class:`StructureRecord`
holds what each cut changed, old and new: the sizes of parameters and buffers, and the numbers that
layers keep about themselves (``out_channels`` and the like). It is data, not code: JSON can hold
it, and ``torch.load`` reads it with ``weights_only=True``. :func:`~.structure.replay` gives a model
the structure that a record says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch

__all__ = ["STRUCTURE_KEY", "StructureChange", "StructureRecord", "Value"]

STRUCTURE_KEY = "lit_compress_structure"
"""Where the record lies in a checkpoint, as :meth:`StructureRecord.to_plain` has it."""

Value: TypeAlias = int | float | bool | tuple[int, ...] | None
"""An attribute's value, or the shape of a parameter or buffer."""

SEQUENCES = (tuple, list, torch.Size)


@dataclass(frozen=True)
class StructureChange:
    """What one cut changed.

    Attributes:
        values: By qualified name (``model.conv.out_channels``, ``model.conv.weight``), the value
            before and after: an attribute's own, or a tensor's shape. In the model's order.
    """

    values: Mapping[str, tuple[Value, Value]]


@dataclass(frozen=True)
class StructureRecord:
    """All that cuts changed in a model, in their order. Without changes, a dense model.

    Attributes:
        changes: One for each cut, the first on the dense model.
    """

    changes: tuple[StructureChange, ...] = ()

    def __len__(self) -> int:
        """The number of cuts."""
        return len(self.changes)

    @property
    def size_bytes(self) -> int:
        """Bytes that the record takes as JSON."""
        return len(json.dumps(self.to_plain()))

    def append(self, change: StructureChange) -> StructureRecord:
        """The record with one more cut; itself if the cut changed nothing.

        Raises:
            ValueError: If the change begins with other values than the record ends with.
        """
        last = self.values()
        for name, (old, _) in change.values.items():
            if name in last and not same_value(last[name][1], old):
                raise ValueError(
                    f"the change takes {name!r} from {old}, but the record ends with it at "
                    f"{last[name][1]}. Append changes in the order in which the cuts were made."
                )
        return StructureRecord((*self.changes, change)) if change.values else self

    def squashed(self) -> StructureRecord:
        """The same from the first to the last value, as a single cut."""
        values = {name: v for name, v in self.values().items() if not same_value(*v)}
        return StructureRecord((StructureChange(values),) if values else ())

    def under(self, prefix: str) -> StructureRecord:
        """The part for a model inside of the one that was cut.

        Args:
            prefix: What names inside begin with, as in ``"model."``; it is stripped.
        """
        record = StructureRecord()
        for change in self.changes:
            inside = {n: v for n, v in change.values.items() if n.startswith(prefix)}
            record = record.append(
                StructureChange({name[len(prefix) :]: v for name, v in inside.items()})
            )
        return record

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries, lists and numbers, for JSON or a checkpoint.

        Returns:
            ``{"changes": [{"model.conv": {"out_channels": [16, 8], ...}, ...}, ...]}``: one entry
            for each cut, and in it by module and name the value before and after.
        """
        changes = []
        for change in self.changes:
            modules: dict[str, dict[str, Any]] = {}
            for name, pair in change.values.items():
                module, _, leaf = name.rpartition(".")
                modules.setdefault(module, {})[leaf] = [as_plain(value) for value in pair]
            changes.append(modules)
        return {"changes": changes}

    @classmethod
    def from_plain(cls, plain: Any) -> StructureRecord:
        """What :meth:`to_plain` gave, also after a turn through JSON.

        Raises:
            ValueError: If it is anything else.
        """
        record = cls()
        try:
            for modules in plain["changes"]:
                values = {
                    f"{module}.{leaf}" if module else leaf: (as_value(old), as_value(new))
                    for module, leaves in modules.items()
                    for leaf, (old, new) in leaves.items()
                }
                record = record.append(StructureChange(values))
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{str(plain)[:200]!r} is no structure record ({error}); expected "
                "{'changes': [{module: {name: [old, new]}}]} as StructureRecord.to_plain has it."
            ) from error
        return record

    @classmethod
    def in_checkpoint(cls, checkpoint: Mapping[str, Any]) -> StructureRecord | None:
        """The record that lies in a checkpoint, or ``None``.

        Raises:
            ValueError: If what lies there is no record.
        """
        return cls.from_plain(checkpoint[STRUCTURE_KEY]) if STRUCTURE_KEY in checkpoint else None

    def values(self) -> dict[str, tuple[Value, Value]]:
        """By qualified name, the dense and the last value of everything that ever changed."""
        values: dict[str, tuple[Value, Value]] = {}
        for change in self.changes:
            for name, (old, new) in change.values.items():
                values[name] = (values[name][0] if name in values else old, new)
        return values


def is_value(value: object) -> bool:
    """Whether it is a number or a sequence of ints that a record can hold."""
    if type(value) in SEQUENCES:
        return all(type(item) is int for item in value)  # type: ignore[attr-defined]
    return (
        value is None
        or type(value) in (int, bool)
        or (type(value) is float and math.isfinite(value))
    )


def as_value(value: Any) -> Value:
    """A number as it is and any sequence as a tuple.

    Raises:
        ValueError: If it is nothing that a record can hold.
    """
    if not is_value(value):
        raise ValueError(f"{value!r} is no number, None or sequence of ints")
    value = tuple(value) if isinstance(value, SEQUENCES) else value
    return cast(Value, value)


def as_plain(value: Value) -> Any:
    """The value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def same_value(a: Value, b: Value) -> bool:
    """Whether two values are equal and of one type, so that ``True`` is not 1."""
    return type(a) is type(b) and a == b

"""Describe and compare the structure of a model, and apply a recorded structure to another.

Each module that was cut keeps the history of its own values (:func:`note_change`), as plain data in
its ``__dict__``. So a model and every part and copy of it know how they became what they are and
can go back, and a module that is built again is dense. No cut, no trace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_compress.compress.channels.cut import begin_autograd_anew
from lit_compress.compress.layers import plain_name
from lit_compress.compress.structure_record import (
    SEQUENCES,
    StructureChange,
    StructureRecord,
    Value,
    as_plain,
    as_value,
    is_value,
    same_value,
)

__all__ = ["describe", "difference", "note_change", "record_of", "replay", "values_after"]

_HISTORY = "_structure_history"
"""Attribute of a module that was cut: by leaf name, ``[number of the cut, value before it]``."""


def describe(model: nn.Module) -> dict[str, Value]:
    """The numbers that make a model's structure.

    Args:
        model: Any module, also with parts that ``torch.compile`` wrapped.

    Returns:
        By qualified name as it was before compiling: the shape of each parameter and buffer that
        is initialised, and each public attribute of a module that is an int, bool, finite float,
        None or a sequence of ints, except for ``training``.
    """
    return {name: value for name, (_, _, value) in _located(model).items()}


def difference(before: Mapping[str, Value], after: Mapping[str, Value]) -> StructureChange:
    """What changed between two descriptions of a model.

    Args:
        before: What :func:`describe` said before a cut.
        after: What it says now.

    Raises:
        ValueError: If something came or went; a cut only changes values.
    """
    for name in [*before, *after]:
        if name not in before or name not in after:
            raise ValueError(
                f"{name!r} is {'new' if name in after else 'gone'}; a cut may change the values of "
                "attributes and the sizes of tensors, but not which there are."
            )
    pairs = {name: (old, after[name]) for name, old in before.items()}
    return StructureChange({n: pair for n, pair in pairs.items() if not same_value(*pair)})


def note_change(model: nn.Module, before: Mapping[str, Value]) -> StructureChange:
    """Have a model remember a cut that was just made.

    Args:
        model: The model after the cut.
        before: What :func:`describe` said of it before.

    Returns:
        What the cut changed; nothing is noted where that is nothing.

    Raises:
        ValueError: As :func:`difference`.
    """
    located = _located(model)
    change = difference(before, {name: value for name, (_, _, value) in located.items()})
    cut = 1 + max((cut for _, history in _histories(model) for cut, _ in history), default=0)
    noted: set[tuple[int, str]] = set()  # a module may be there under several names
    for name, (old, _) in change.values.items():
        module, leaf, _ = located[name]
        if (id(module), leaf) not in noted:
            noted.add((id(module), leaf))
            vars(module).setdefault(_HISTORY, {}).setdefault(leaf, []).append([cut, as_plain(old)])
    return change


def record_of(model: nn.Module) -> StructureRecord:
    """All that cuts changed in a model since it was dense, names relative to it."""
    now = describe(model)
    changes: dict[int, dict[str, tuple[Value, Value]]] = {}
    for name, history in _histories(model):
        values = [*(as_value(old) for _, old in history), now[name]]
        for (cut, _), old, new in zip(history, values, values[1:], strict=False):
            changes.setdefault(cut, {})[name] = (old, new)
    return StructureRecord(tuple(StructureChange(changes[cut]) for cut in sorted(changes)))


def values_after(
    model: nn.Module, record: StructureRecord, source: str = "the structure record"
) -> dict[str, Value]:
    """What :func:`replay` would set; it makes sure of all of it and changes nothing.

    Args:
        model: A model that is dense or was cut in any way.
        record: The structure that it is to have.
        source: Where the record came from, for the message.

    Returns:
        By qualified name, every value that differs from the dense model's now or then.

    Raises:
        ValueError: If the record begins with other values than the dense model has; the first of
            them is named. A model of exactly the final structure is accepted, too.
    """
    located = _located(model)
    now = {name: value for name, (_, _, value) in located.items()}
    dense = {name: as_value(history[0][1]) for name, history in _histories(model)}
    wanted = record.values()
    first = {name: old for name, (old, _) in wanted.items()}
    final = {name: new for name, (_, new) in wanted.items()}
    misfit = _first_misfit(now | dense, first)
    if misfit is not None and _first_misfit(now, final) is not None:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: {misfit}. Build the model with the "
            "arguments that it had in the run that made the record."
        )
    for name in final:
        is_tensor = _tensor(*located[name][:2]) is not None
        if is_tensor and not _is_shape_like(first[name], final[name]):
            raise ValueError(
                f"{source} is damaged: it gives the tensor {name!r} the shape {final[name]}, "
                f"expected one such as {first[name]}."
            )
    return dense | final


def replay(model: nn.Module, record: StructureRecord, source: str = "the structure record") -> None:
    """Give a model the structure that a record says, whatever its own cuts were.

    The model goes back to dense, then the record's way. Parameters stay the same objects, so that
    ties, ``requires_grad``, devices and memory formats last. Of a tensor that is resized the
    leading block keeps its values, the rest is zero, and the gradient is dropped: load the
    weights afterwards. An empty record gives the dense model.

    Args:
        model: A model built as the one that the record is of was built, before or after cuts.
        record: The structure that it is to have.
        source: Where the record came from, for the message.

    Raises:
        ValueError: If the record does not fit; the first mismatch is named and the model is as it
            was.
    """
    values = values_after(model, record, source)
    located = _located(model)
    for name, value in values.items():
        module, leaf, _ = located[name]
        vars(module).get(_HISTORY, {}).pop(leaf, None)
        tensor = _tensor(module, leaf)
        if tensor is None:
            found = vars(module)[leaf]
            is_sequence = isinstance(found, SEQUENCES) and isinstance(value, tuple)
            vars(module)[leaf] = type(found)(value) if is_sequence else value
        elif tensor.shape != value:
            _resize(tensor, cast("tuple[int, ...]", value))
    for name, history in _as_histories(record).items():
        module, leaf, _ = located[name]
        vars(module).setdefault(_HISTORY, {})[leaf] = history
    for module in model.modules():
        if vars(module).get(_HISTORY) == {}:
            del vars(module)[_HISTORY]


# --- Inside ---------------------------------------------------------------------------------------


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under all of its names, each ending in a dot, compiled shells left out."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, torch._dynamo.OptimizedModule):
            yield plain_name(f"{name}." if name else ""), module


def _located(model: nn.Module) -> dict[str, tuple[nn.Module, str, Value]]:
    """Each value by its qualified name: whose it is, under what name, and the value."""
    located: dict[str, tuple[nn.Module, str, Value]] = {}
    for prefix, module in _named_modules(model):
        for leaf, value in vars(module).items():
            if not leaf.startswith("_") and leaf != "training" and is_value(value):
                located[prefix + leaf] = (module, leaf, as_value(value))
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not nn.parameter.is_lazy(tensor):
                located[prefix + leaf] = (module, leaf, tuple(tensor.shape))
    return located


def _tensor(module: nn.Module, leaf: str) -> Tensor | None:
    return module._parameters.get(leaf, module._buffers.get(leaf))


def _histories(model: nn.Module) -> Iterator[tuple[str, list[list[Any]]]]:
    for prefix, module in _named_modules(model):
        for leaf, history in vars(module).get(_HISTORY, {}).items():
            yield prefix + leaf, history


def _as_histories(record: StructureRecord) -> dict[str, list[list[Any]]]:
    histories: dict[str, list[list[Any]]] = {}
    for cut, change in enumerate(record.changes, start=1):
        for name, (old, _) in change.values.items():
            histories.setdefault(name, []).append([cut, as_plain(old)])
    return histories


def _first_misfit(found: Mapping[str, Value], expected: Mapping[str, Value]) -> str | None:
    for name, value in expected.items():
        module, _, leaf = name.rpartition(".")
        where = f"module {module!r}" if module else "the model itself"
        if name not in found:
            return f"{leaf!r} of {where} is missing, expected {value}"
        if not same_value(found[name], value):
            return f"{leaf!r} of {where} is {found[name]}, expected {value}"
    return None


def _resize(tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Give a tensor another shape in place, its dimensions in the same order in memory."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    places = [order.index(dim) for dim in range(tensor.dim())]
    resized = tensor.detach().new_zeros([shape[dim] for dim in order]).permute(places)
    block = tuple(slice(min(old, new)) for old, new in zip(tensor.shape, shape, strict=True))
    resized[block] = tensor.detach()[block]
    tensor.grad = None
    tensor.data = resized
    begin_autograd_anew([tensor])


def _is_shape_like(old: Value, new: Value) -> bool:
    return (
        isinstance(old, tuple)
        and isinstance(new, tuple)
        and len(old) == len(new)
        and all(size >= 0 for size in new)
    )

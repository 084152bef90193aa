"""Frozen dataclasses to plain data and back, checked on the way in."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

_T = TypeVar("_T")


def to_plain(value: Any) -> Any:
    """Turn dataclasses, tuples and mappings into what JSON can hold.

    Floats that JSON has no word for become the strings ``"nan"``, ``"inf"`` and ``"-inf"``.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_plain(kind: type[_T], data: Any, where: str) -> _T:
    """Rebuild a dataclass of type ``kind`` from plain data.

    Args:
        kind: A dataclass whose fields are bools, ints, floats, strings, literal strings, None,
            tuples of one type or of a type for each place, mappings from strings, or such
            dataclasses.
        data: What `to_plain` gave.
        where: Name of the data for error messages.

    Raises:
        ValueError: If a key is missing or unknown or a value has the wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {_shown(data)}; expected an object with named fields.")
    types_by_name = get_type_hints(kind)
    hints = {field.name: types_by_name[field.name] for field in fields(kind)}  # type: ignore[arg-type]
    missing, unknown = hints.keys() - data.keys(), data.keys() - hints.keys()
    if missing or unknown:
        raise ValueError(
            f"{where} lacks {sorted(missing) or 'nothing'} and has unknown "
            f"{sorted(unknown) or 'nothing'}; expected exactly {sorted(hints)}. "
            "Was it written by another program or version?"
        )
    return kind(**{key: _value(hint, data[key], f"{where}.{key}") for key, hint in hints.items()})


def _value(hint: Any, data: Any, where: str) -> Any:
    if get_origin(hint) in (types.UnionType, Union):  # only X | None is used
        (hint,) = (option for option in get_args(hint) if option is not type(None))
        return None if data is None else _value(hint, data, where)
    if is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, data, where)
    if get_origin(hint) is tuple and isinstance(data, list):
        hints = get_args(hint)
        if hints[-1] is Ellipsis:
            hints = hints[:1] * len(data)
        if len(hints) != len(data):
            raise ValueError(f"{where} is {_shown(data)}; expected {len(hints)} items.")
        pairs = enumerate(zip(hints, data, strict=True))
        return tuple(_value(item_hint, item, f"{where}[{i}]") for i, (item_hint, item) in pairs)
    if get_origin(hint) is Mapping and isinstance(data, dict):
        item_hint = get_args(hint)[1]
        return {key: _value(item_hint, item, f"{where}.{key}") for key, item in data.items()}
    if hint is float and (data in ("nan", "inf", "-inf") or type(data) in (int, float)):
        return float(data)
    if hint in (bool, int, str) and type(data) is hint:
        return data
    if get_origin(hint) is Literal and isinstance(data, str):
        if data in get_args(hint):
            return data
        raise ValueError(f"{where} is {data!r}; expected {' or '.join(map(repr, get_args(hint)))}.")
    raise ValueError(f"{where} is {_shown(data)}; expected {getattr(hint, '__name__', hint)}.")


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else f"{text[:57]}..."

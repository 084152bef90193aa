"""Frozen dataclasses as plain data and as JSON files, checked when they are read."""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lit_compress.files import write_text

__all__ = ["SavedAsJSON", "from_plain", "to_plain"]

_T = TypeVar("_T")
_Self = TypeVar("_Self", bound="SavedAsJSON")


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


class SavedAsJSON:
    """What a result that is a dataclass inherits, to be saved and loaded.

    The fields are those that :func:`from_plain` knows. The file says what it is, so that another
    one is refused.
    """

    json_format: ClassVar[str]
    """What the file is, with the number of its version; its entry ``"format"``."""
    json_name: ClassVar[str]
    """The same for messages: ``"the result of a search"``."""
    json_computed: ClassVar[tuple[str, ...]] = ()
    """Properties to be written for other readers; here they are computed again."""

    def to_json(self) -> str:
        """The result as strict JSON; :meth:`from_json` gives an equal result back."""
        computed = {name: to_plain(getattr(self, name)) for name in self.json_computed}
        data = {"format": self.json_format, **to_plain(self), **computed}
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls: type[_Self], text: str) -> _Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: If the text is no JSON (cut off, perhaps), is something else, contradicts
                itself, or a field is missing, unknown or of the wrong type.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"the text is no JSON ({error}); expected {cls.json_name}. Was the file cut off?"
            ) from error
        found = data.get("format") if isinstance(data, dict) else None
        if found != cls.json_format:
            raise ValueError(
                f"the JSON has format {found!r}; expected {cls.json_format!r}, as "
                f"{cls.__name__}.save writes it."
            )
        left_out = ("format", *cls.json_computed)
        fields = {key: value for key, value in data.items() if key not in left_out}
        return from_plain(cls, fields, cls.__name__)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write :meth:`to_json` to a file, whole or not at all; folders are made.

        Returns:
            The file.
        """
        return write_text(path, self.to_json())

    @classmethod
    def load(cls: type[_Self], path: str | os.PathLike[str]) -> _Self:
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds something else; as :meth:`from_json`.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # UnicodeDecodeError is one too
            raise ValueError(
                f"{os.fspath(path)!r} cannot be read as {cls.json_name}: {error}"
            ) from error


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

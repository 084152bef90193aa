"""Arguments as plain data: what a checkpoint keeps of them, and how they differ from those now."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

__all__ = ["differences", "plain_arguments"]


def plain_arguments(value: Any) -> Any:
    """Arguments as numbers, strings, lists and dicts, which any checkpoint can hold.

    Dataclasses and mappings become dicts, tuples and lists become lists, paths become strings. A
    function becomes its qualified name, with a digest of its code where it is a lambda or local;
    another object its type with its attributes.

    Args:
        value: An argument, or a mapping of several by name.

    Examples:
        >>> plain_arguments({"ratio": 0.5, "folder": Path("runs"), "layers": ("conv1", "fc")})
        {'ratio': 0.5, 'folder': 'runs', 'layers': ['conv1', 'fc']}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain_arguments(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [plain_arguments(item) for item in items]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_arguments(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, functools.partial):
        return ["partial", *map(plain_arguments, (value.func, value.args, value.keywords))]
    if inspect.isroutine(value) or isinstance(value, type):
        return _function_name(value)
    return {"type": _name(type(value)), **plain_arguments(getattr(value, "__dict__", {}))}


def differences(
    saved: Any, now: Mapping[str, Any] | Any, defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """How arguments differ from those that a checkpoint keeps.

    What the checkpoint lacks is an argument that is newer than it: it differs only if it is not the
    default, so that a new argument does not make old checkpoints those of another run.

    Args:
        saved: What :func:`plain_arguments` gave.
        now: The arguments now: a mapping from names, or a dataclass.
        defaults: What arguments of the mapping are where nobody gives them; a dataclass says so
            itself.

    Returns:
        One phrase for each difference, ``"round_to is 8, was 4"``; empty if there is none.

    Examples:
        >>> differences({"ratio": 0.5}, {"ratio": 0.9})
        ['ratio is 0.9, was 0.5']
        >>> differences({}, {"ratio": 0.9}, {"ratio": 0.9})
        []
    """
    return _differences(saved, now, "", MISSING, defaults or {})


def _differences(
    saved: Any, now: Any, name: str, default: Any, defaults: Mapping[str, Any]
) -> list[str]:
    if saved is MISSING:
        same = default is not MISSING and plain_arguments(now) == plain_arguments(default)
        return [] if same else [f"{name} is {_shown(now)}, was not there"]
    if not isinstance(saved, dict) or not (is_dataclass(now) or isinstance(now, Mapping)):
        same = plain_arguments(now) == saved and isinstance(now, bool) == isinstance(saved, bool)
        return [] if same else [f"{name} is {_shown(now)}, was {_shown(saved)}"]
    if is_dataclass(now):
        items = {f.name: (getattr(now, f.name), _default(f)) for f in fields(now)}
    else:
        items = {str(key): (item, defaults.get(key, MISSING)) for key, item in now.items()}
    prefix = f"{name}." if name else ""
    found = [
        phrase
        for key, (item, usual) in items.items()
        for phrase in _differences(saved.get(key, MISSING), item, prefix + key, usual, {})
    ]
    gone = [f"{prefix}{key} is not there, was {_shown(saved[key])}" for key in saved.keys() - items]
    return found + sorted(gone)


def _default(field: Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _name(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _function_name(function: Any) -> str:
    """The name, and for functions that share their name with others what they do."""
    name = _name(function)
    code = getattr(function, "__code__", None)
    if "<" not in name or code is None:
        return name
    constants = [str(c) for c in code.co_consts if not inspect.iscode(c)]
    content = code.co_code + repr((code.co_names, constants)).encode()
    return f"{name}#{hashlib.sha256(content).hexdigest()[:8]}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

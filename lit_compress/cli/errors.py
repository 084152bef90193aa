"""Turn errors about bad input into one readable line.

jsonargparse reports a typo as a tree: every type of a union that did not fit, each with its own
reasons. :func:`explain` picks the branch that the user meant.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer import connectors

__all__ = ["as_complaint", "explain", "mark", "nearest"]

# Where errors are raised on purpose, about input: this package and the Trainer's connectors.
_REFUSING = (Path(__file__).resolve().parents[1], Path(connectors.__path__[0]).resolve())

# What the parser of a nested class has explained already; the outer parser only adds where.
_MARK = "complaint: "
_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[\w.]+)' does not accept option|does not accept option|Option) "
    r"'(?P<key>[\w.]+)'|[Uu]nrecognized arguments: (?P<flag>\S+)"
)
_REQUIRED = re.compile(r"arguments? (?:is|are) required: (?P<keys>.+)")
_CLASS = re.compile(
    r"Expected a dot import path string: (?P<name>[\w.]+)"
    r"|given class_path '(?P<path>[\w.]+)':\s+(?:module .* has no attribute|No module named)"
)
_BASE = re.compile(r"Import path does not correspond to a subclass of (\w+)")
_PLACE = re.compile(r'Parser key "([^"]+)"')
_EXPECTED = re.compile(r"^[\s-]*Expected an? (?!path but)(.+?)(?:\. Got value:.*)?$", re.MULTILINE)
_GIVEN = re.compile(r"(?:Got value|Given value): (.*)")


def mark(line: str) -> str:
    """Mark a line as explained, for the parser around this one."""
    return line if line.startswith(_MARK) else _MARK + line


def explain(message: str, known: Iterable[str] = ()) -> str:
    """One line for a parser's message.

    Args:
        message: What jsonargparse says, of any length.
        known: The dotted keys that the parser accepts.

    Returns:
        What came, what was expected, and the nearest valid key where one was mistyped.
    """
    places = _PLACE.findall(message)
    where = ".".join(dict.fromkeys(places[:1]))
    if _MARK in message:
        line = message.split(_MARK, 1)[1].splitlines()[0].strip()
        return f"in {where!r}: {line}" if where else line
    if found := _UNKNOWN.search(message):
        key = found["key"] or found["flag"].lstrip("-").split("=")[0]
        return nearest(f"{found['group']}.{key}" if found["group"] else key, known)
    if found := _REQUIRED.search(message):
        # Keys of a command come with the command's name: fit.model.
        keys = [key.strip() for key in found["keys"].split(",")]
        return f"missing {', '.join(repr(key.split('.')[-1]) for key in keys)}; it has no default."
    if found := _CLASS.search(message):
        return f"{_said(where)}{_nearest_class(found['name'] or found['path'])}"
    if where and (found := _BASE.search(message)) and (given := _GIVEN.search(message)):
        return f"{where!r} is {given[1]!r}; expected a subclass of {found[1]}."
    if where and (given := _GIVEN.search(message)):
        types = [_type_name(text) for text in _EXPECTED.findall(message)]
        if types:
            wanted = " or ".join(dict.fromkeys(types))
            return f"{where!r} is {given[1]!r}; expected {wanted}."
    reason = _first_reason(message)
    return _said(where) + reason


def nearest(key: str, known: Iterable[str]) -> str:
    """Say that a dotted key is unknown, and which one was probably meant."""
    known = {prefix for name in known for prefix in _prefixes(name)}
    parts = key.split(".")
    depth = 0
    while depth < len(parts) - 1 and ".".join(parts[: depth + 1]) in known:
        depth += 1
    parent = ".".join([*parts[:depth], ""]) if depth else ""
    siblings = {name[len(parent) :] for name in known if name.startswith(parent)}
    siblings = {name for name in siblings if name and "." not in name}
    wrong = ".".join(parts[: depth + 1])
    close = difflib.get_close_matches(parts[depth], siblings, n=1, cutoff=0.5)
    if close:
        return f"unknown key {wrong!r}; did you mean {parent + close[0]!r}?"
    if siblings and len(siblings) <= 20:
        return f"unknown key {wrong!r}; the keys here are {', '.join(sorted(siblings))}."
    return f"unknown key {wrong!r}; --help lists the valid ones."


def as_complaint(error: Exception) -> str | None:
    """One line for an error about the user's input; ``None`` for anything else.

    Input is what this package or Lightning's Trainer refuse, and files that are not there. An
    error that came from deeper down is somebody's bug and worth its traceback.
    """
    if isinstance(error, MisconfigurationException | FileNotFoundError):
        return _joined(str(error))
    if not isinstance(error, ValueError | TypeError | ModuleNotFoundError):
        return None
    origin: BaseException = error
    while origin.__cause__ is not None and _is_union(origin):
        origin = origin.__cause__
    frames = traceback.extract_tb(origin.__traceback__)
    place = Path(frames[-1].filename) if frames else Path()
    if not any(place.is_relative_to(folder) for folder in _REFUSING):
        return None
    return explain(str(error)) if _is_union(error) else _joined(str(error))


def _is_union(error: BaseException) -> bool:
    """Whether jsonargparse has wrapped what a constructor raised."""
    return "Does not validate against any of the Union subtypes" in str(error)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _said(where: str) -> str:
    return f"{where!r}: " if where else ""


def _nearest_class(name: str) -> str:
    classes = {
        cls.__name__
        for base in (LightningModule, LightningDataModule, Callback, Logger)
        for cls in _subclasses(base)
        if not cls.__name__.startswith("_")
    }
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], classes, n=1)
    hint = f"did you mean {close[0]!r}?" if close else "give its full path, package.module.Class."
    return f"there is no class {name!r}; {hint}"


def _subclasses(base: type) -> set[type]:
    direct: set[type] = set(base.__subclasses__())
    return direct.union(*(_subclasses(cls) for cls in direct))


def _type_name(text: str) -> str:
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text).replace("NoneType", "null")
    if literal := re.fullmatch(r"typing\.Literal\[(.+)\]", text):
        return f"one of {literal[1]}"
    return text.replace("typing.", "").rstrip(".")


def _first_reason(message: str) -> str:
    """The first reason of a union that is not about its ``None``, or else the whole message."""
    _, _, reasons = message.partition("Errors:\n")
    for reason in re.split(r"^\s*- ", reasons, flags=re.MULTILINE):
        text = _joined(reason.split("\nGiven value type:")[0])
        if text and not text.startswith("Expected a <class 'NoneType'>"):
            return text
    return _joined(_PLACE.sub("", message).lstrip(" :"))


def _joined(message: str) -> str:
    return " ".join(message.split())

"""The argument parser behind every command: one-line errors, and YAML without surprises."""

from __future__ import annotations

import re
import sys
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from lit_compress.cli.errors import explain, mark

__all__ = ["PARSER_MODE", "CommandParser"]

PARSER_MODE = "yaml_plain_colons"


class CommandParser(LightningArgumentParser):
    """A parser that refuses in one line and with exit status 2.

    Parsers of nested classes are of this type too: they explain their own keys, which only they
    know, and leave the printing to the outermost.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("parser_mode", PARSER_MODE)
        kwargs.setdefault("allow_abbrev", False)  # --trainer.max_epoch is a typo
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Explain a message: to the parser around this one, or to the user."""
        # A command's keys are checked by the parser above it, which passes the command's along.
        parser = getattr(ex, "subcommand_parser", None) or self
        line = explain(message, parser._known_keys())
        if not self.exit_on_error:
            super().error(mark(line), ex)
        command = parser.prog.replace(" [options]", "")
        if parser._subparsers is not None:
            command = " ".join([command, *self.args[:1]])
        sys.stderr.write(f"{command}: error: {line}\n")
        sys.stderr.write(f"{command} --help lists the keys.\n")
        self.exit(2)

    def _known_keys(self) -> list[str]:
        return [action.dest for action in self._actions if action.dest != "help"]


class _PlainColonLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML 1.1 without its numbers to base 60: ``2:4`` is a pattern, not 124."""


def _without_base_60(loader: type) -> None:
    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")
    loader.yaml_implicit_resolvers = {  # type: ignore[attr-defined]
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in numbers]
        for first, resolvers in loader.yaml_implicit_resolvers.items()  # type: ignore[attr-defined]
    }
    integer = r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+|0[0-7_]+)$"
    real = (
        r"^(?:[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[-+]?[0-9][0-9_]*\.[0-9_]*"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    )
    for tag, pattern in zip(numbers, (integer, real), strict=False):
        loader.add_implicit_resolver(  # type: ignore[attr-defined]
            tag, re.compile(pattern), list("-+.0123456789")
        )


def _load(text: str) -> Any:
    value = yaml.load(text, Loader=_PlainColonLoader)
    if isinstance(value, dict) and value and all(v is None for v in value.values()):
        return get_loader("yaml")(text)  # jsonargparse takes "{a}" and "a:" for strings
    return value


_without_base_60(_PlainColonLoader)
set_loader(PARSER_MODE, _load, (yaml.YAMLError,))

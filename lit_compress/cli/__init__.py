"""The command line: ``lit-compress COMMAND``, with the commands of ``cli/commands.py``.

:func:`main` only chooses the command; the commands import what they need themselves, so that
``--help`` answers at once.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from lit_compress.cli.commands import COMMANDS

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; by default those of the process.

    Returns:
        The exit status: 0, or 2 if the arguments, a configuration or a file were refused; then one
        line on stderr says why. Errors that are nobody's input keep their traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"give one of {', '.join(COMMANDS)}."
        print(f"lit-compress: error: unknown command {command!r}; {hint}", file=sys.stderr)
        return 2
    try:
        run = _load(command)
    except ModuleNotFoundError as error:
        print(
            f"lit-compress: error: the command line needs {error.name!r}, which is not installed; "
            "install it with: pip install 'lit-compress[cli]'",
            file=sys.stderr,
        )
        return 2
    from lit_compress.cli.errors import as_complaint

    with _environment_restored():
        try:
            run(rest)
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except BrokenPipeError:  # the reader, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except Exception as error:
            complaint = as_complaint(error)
            if complaint is None:
                raise
            print(f"lit-compress {command}: error: {complaint}", file=sys.stderr)
            return 2
    return 0


def _load(command: str) -> Callable[[list[str]], object]:
    if command == "report":
        from lit_compress.cli.inspection import report

        return report
    if command == "benchmark":
        from lit_compress.cli.inspection import benchmark

        return benchmark
    if command == "export":
        from lit_compress.cli.export import export

        return export
    if command == "quantize":
        from lit_compress.cli.quantize import quantize

        return quantize
    if command == "analyze":
        from lit_compress.cli.analyze import analyze

        return analyze
    if command == "search":
        from lit_compress.cli.search import search

        return search
    from lit_compress.cli.training import CompressionCLI

    return lambda rest: CompressionCLI([command, *rest])


def _overview() -> str:
    lines = [
        "usage: lit-compress COMMAND [options]",
        "",
        "Compress PyTorch Lightning models with callbacks, and measure what was gained.",
        "",
        "commands:",
        *(f"  {name:<10} {purpose}" for name, purpose in COMMANDS.items()),
        "",
        "lit-compress COMMAND --help lists the options of a command.",
    ]
    return "\n".join(lines)


@contextmanager
def _environment_restored() -> Iterator[None]:
    """Let ``--assets`` hold for one command only."""
    before = os.environ.get("LIT_COMPRESS_ASSETS")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("LIT_COMPRESS_ASSETS", None)
        else:
            os.environ["LIT_COMPRESS_ASSETS"] = before

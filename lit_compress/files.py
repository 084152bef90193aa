"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "write_text"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write in the place of another one.

    It has the other's name, which some writers put into what they write, in a folder of its own
    beside it, and takes its place when the block has ended. Where the block raises, the older file
    is as it was, and nothing is left beside it. Folders are made.

    Args:
        path: The file to be replaced, or to be made.

    Yields:
        The path to write to; nothing is there yet.

    Raises:
        OSError: If the folder cannot be made, or the file not be moved.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "plan.json"
        >>> with replacing(file) as part:
        ...     _ = part.write_text("{}")
        >>> file.read_text()
        '{}'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: what it makes is for its owner alone, whatever the umask says.
    folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder / target.name
        os.replace(folder / target.name, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text in UTF-8, as :func:`replacing` does.

    Returns:
        The file.

    Raises:
        OSError: If it cannot be written.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)

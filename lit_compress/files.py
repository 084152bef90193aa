"""Write files whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing", "write_text"]


@contextmanager
def replacing(path: str | os.PathLike[str], *companions: str) -> Iterator[Path]:
    """A file to write in the place of another one.

    It has the other's name, which some writers put into what they write, in a folder of its own
    beside it, and takes its place when the block has ended. Where the block raises, the older file
    is as it was, and nothing is left beside it. Folders are made.

    Companions, such as a file of weights, are written beside it and take their places with it: the
    older file goes before they do, so that at no time it stands beside companions of another.

    Args:
        path: The file to be replaced, or to be made.
        *companions: Suffixes of files of the same name that belong to it, as ``".bin"``.

    Yields:
        The path to write to; nothing is there yet.

    Raises:
        OSError: If the folder cannot be made, or a file not be moved, or was not written.

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
        _take_places(folder, (target, *(target.with_suffix(suffix) for suffix in companions)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_places(folder: Path, places: tuple[Path, ...]) -> None:
    """Move files to their places, the first one last; where that fails, all is as before."""
    if len(places) == 1:
        os.replace(folder / places[0].name, places[0])
        return
    older = folder / "older"
    older.mkdir()
    aside: list[Path] = []
    placed: list[Path] = []
    try:
        for place in places:
            if place.exists():
                os.replace(place, older / place.name)
                aside.append(place)
        for place in reversed(places):
            os.replace(folder / place.name, place)
            placed.append(place)
    except BaseException:
        for place in placed:
            place.unlink()
        for place in reversed(aside):
            os.replace(older / place.name, place)
        raise


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

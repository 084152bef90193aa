"""Results that are written to JSON files and read again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import ClassVar, TypeVar

from lit_compress.files import write_text
from lit_compress.plain import from_plain, to_plain

__all__ = ["SavedAsJSON"]

_Self = TypeVar("_Self", bound="SavedAsJSON")


class SavedAsJSON:
    """What a result that is a dataclass inherits, to be saved and loaded.

    The fields are those that :func:`~lit_compress.plain.from_plain` knows. The file says
    what it is, so that another one is refused.
    """

    json_format: ClassVar[str]
    """What the file is, with the number of its version; its entry ``"format"``."""
    json_name: ClassVar[str]
    """The same for messages: ``"the result of a search"``."""
    json_computed: ClassVar[tuple[str, ...]] = ()
    """Properties to be written for other readers; here they are computed anew."""

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

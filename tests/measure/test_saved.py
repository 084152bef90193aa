"""Dataclasses saved as JSON files."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_compress.measure.saved import SavedAsJSON


@dataclass(frozen=True)
class Times(SavedAsJSON):
    name: str
    ms: tuple[float, ...]

    json_format: ClassVar[str] = "times 1"
    json_name: ClassVar[str] = "a list of times"
    json_computed: ClassVar[tuple[str, ...]] = ("total",)

    @property
    def total(self) -> float:
        return sum(self.ms)


@given(st.text(), st.lists(st.floats(allow_nan=False)))
def test_there_and_back(name, ms):
    times = Times(name, tuple(ms))
    assert Times.from_json(times.to_json()) == times


def test_the_text_is_strict_json_with_what_is_computed():
    def refuse(word):
        raise AssertionError(word)

    text = Times("a", (1.0, math.inf)).to_json()
    assert json.loads(text, parse_constant=refuse) == {
        "format": "times 1", "name": "a", "ms": [1.0, "inf"], "total": "inf",
    }  # fmt: skip


def test_what_is_computed_is_not_read():
    text = Times("a", (1.0, 2.0)).to_json().replace("3.0", "7.0")
    assert "7.0" in text
    assert Times.from_json(text).total == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "tim', "no JSON .*; expected a list of times. Was the file cut off"),
        ("[]", "format None; expected 'times 1', as Times.save writes it"),
        ('{"format": "times 2"}', "format 'times 2'"),
        ('{"format": "times 1", "name": "a"}', r"Times lacks \['ms'\]"),
        ('{"format": "times 1", "name": 1, "ms": []}', "Times.name is 1; expected str"),
        ('{"format": "times 1", "name": "a", "ms": [], "x": 0}', r"unknown \['x'\]"),
    ],
)
def test_other_text_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Times.from_json(text)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=f"x.json' cannot be read as a list of times: .*{message}"):
        Times.load(tmp_path / "x.json")


def test_files(tmp_path):
    times = Times("a", (1.0,))
    assert Times.load(times.save(tmp_path / "new" / "x.json")) == times
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read as a list of times: 'utf-8"):
        Times.load(tmp_path / "bytes")
    with pytest.raises(FileNotFoundError):
        Times.load(tmp_path / "none")

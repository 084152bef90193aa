"""Dataclasses as plain data and as JSON files: there and back, and what is refused."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.plain import SavedAsJSON, from_plain, to_plain


@dataclass(frozen=True)
class Leaf:
    label: str
    number: int
    share: float | None


@dataclass(frozen=True)
class Tree:
    leaves: tuple[Leaf, ...]
    scores: Mapping[str, float]
    best: Leaf | None = None
    marks: tuple[int, ...] | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


floats = st.floats(allow_nan=False)
leaves = st.builds(Leaf, st.text(), st.integers(), st.none() | floats)
trees = st.builds(
    Tree,
    st.lists(leaves, max_size=3).map(tuple),
    st.dictionaries(st.text(), floats, max_size=3),
    st.none() | leaves,
    st.none() | st.lists(st.integers(), max_size=3).map(tuple),
    st.dictionaries(st.text(), st.integers(), max_size=3),
)


@settings(deadline=None, max_examples=60)
@given(trees)
def test_a_round_trip_through_json_is_equal(tree: Tree) -> None:
    text = json.dumps(to_plain(tree), allow_nan=False)
    assert from_plain(Tree, json.loads(text), "tree") == tree


def test_nan_survives() -> None:
    plain = to_plain(Leaf("x", 1, float("nan")))
    assert plain["share"] == "nan"
    back = from_plain(Leaf, plain, "leaf").share
    assert back is not None
    assert back != back


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": "1"}, r"tree.leaves\[0\].number is '1'; expected int"),
        ({"number": True}, r"number is True; expected int"),
        ({"number": None}, r"number is None; expected int"),
        ({"share": "much"}, r"share is 'much'; expected float"),
        ({"label": 3}, r"label is 3; expected str"),
        ({"extra": 3}, r"tree.leaves\[0\] lacks nothing and has unknown \['extra'\]"),
    ],
)
def test_wrong_values_are_refused_with_their_place(change: dict[str, Any], message: str) -> None:
    leaf = {"label": "x", "number": 1, "share": 0.5, **change}
    data = {"leaves": [leaf], "scores": {}, "best": None, "marks": None, "sizes": {}}
    with pytest.raises(ValueError, match=message):
        from_plain(Tree, data, "tree")


def test_missing_fields_and_other_containers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"leaf lacks \['share'\] and has unknown nothing"):
        from_plain(Leaf, {"label": "x", "number": 1}, "leaf")
    with pytest.raises(ValueError, match=r"leaf is \[1\]; expected an object"):
        from_plain(Leaf, [1], "leaf")
    whole = {"leaves": {}, "scores": {}, "best": None, "marks": None, "sizes": {}}
    with pytest.raises(ValueError, match=r"tree.leaves is \{\}; expected tuple"):
        from_plain(Tree, whole, "tree")
    with pytest.raises(ValueError, match=r"tree.scores is \[\]; expected Mapping"):
        from_plain(Tree, {**whole, "leaves": [], "scores": []}, "tree")


@dataclass(frozen=True)
class Branch:
    alive: bool
    side: Literal["left", "right"]
    span: tuple[str, float] | None


@pytest.mark.parametrize("span", [None, ("cm", 2.0)])
def test_bools_literals_and_pairs_survive(span: tuple[str, float] | None) -> None:
    branch = Branch(True, "left", span)
    assert from_plain(Branch, json.loads(json.dumps(to_plain(branch))), "branch") == branch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alive": 1}, "branch.alive is 1; expected bool"),
        ({"side": "top"}, "branch.side is 'top'; expected 'left' or 'right'"),
        ({"side": 3}, "branch.side is 3; expected"),
        ({"span": ["cm"]}, r"branch.span is \['cm'\]; expected 2 items"),
        ({"span": ["cm", "long"]}, r"branch.span\[1\] is 'long'; expected float"),
    ],
)
def test_wrong_bools_literals_and_pairs_are_refused(change: dict[str, Any], message: str) -> None:
    data = {"alive": True, "side": "left", "span": ["cm", 2.0], **change}
    with pytest.raises(ValueError, match=message):
        from_plain(Branch, data, "branch")


# --- As JSON files --------------------------------------------------------------------------------


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

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_compress import Schedule
from lit_compress.arguments import differences, plain_arguments

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=3)


@dataclass(frozen=True)
class Inner:
    kind: str = "a"
    number: int = 1


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    names: list[str] = field(default_factory=list)


@given(ARGUMENTS)
def test_equal_arguments_do_not_differ_also_after_json(arguments):
    saved = json.loads(json.dumps(plain_arguments(arguments)))
    assert differences(saved, arguments) == []


@given(ARGUMENTS, ARGUMENTS)
def test_arguments_differ_where_their_plain_data_do(one, other):
    same = json.dumps(plain_arguments(one), sort_keys=True) == json.dumps(
        plain_arguments(other), sort_keys=True
    )
    numbers_alike = plain_arguments(one) == plain_arguments(other)  # 1 == 1.0 == True in Python
    if same or not numbers_alike:
        assert (differences(plain_arguments(one), other) == []) == same


def test_each_difference_is_named_with_both_values():
    now = {"schedule": Schedule(begin=0.2), "ratio": 0.5}
    saved = plain_arguments({"schedule": Schedule(), "ratio": 0.5})
    assert differences(saved, now) == ["schedule.begin is 0.2, was 0.1"]


def test_a_field_newer_than_the_checkpoint_must_have_its_default():
    saved = {"inner": {"kind": "a"}}
    assert differences(saved, Outer()) == []
    assert differences(saved, Outer(Inner(number=2))) == ["inner.number is 2, was not there"]
    assert differences(saved, Outer(names=["x"])) == ["names is ['x'], was not there"]


def test_an_argument_that_is_gone_is_a_difference():
    assert differences({"kind": "a", "number": 1, "old": 3}, Inner()) == ["old is not there, was 3"]


@pytest.mark.parametrize(("saved", "now"), [(1, True), (True, 1), (0, False)])
def test_a_flag_is_no_number(saved, now):
    assert differences({"x": saved}, {"x": now}) != []


def test_functions_are_told_apart():
    def score(x):
        return x

    functions = [len, max, score, lambda x: x, lambda x: -x, lambda x: x + 1, lambda x: x + 2]
    functions += [functools.partial(max, 1), functools.partial(max, 2)]
    plain = [json.dumps(plain_arguments(f)) for f in functions]
    assert len(set(plain)) == len(functions)
    assert plain_arguments(lambda x: -x) == plain_arguments(functions[4])


def test_objects_are_told_apart_by_their_attributes():
    class Importance:
        def __init__(self, power):
            self.power = power

    saved = plain_arguments({"importance": Importance(1), "path": Path("a")})
    assert differences(saved, {"importance": Importance(1), "path": "a"}) == []
    assert differences(saved, {"importance": Importance(2), "path": "a"}) != []

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_compress.compress.schedules import Ramp
from lit_compress.compress.sparsity.patterns import Block, NofM
from lit_compress.compress.sparsity.target import SparsityTarget

WEIGHTS = {"stem.weight": 40, "body.weight": 1000, "head.weight": 60}


@given(
    st.sampled_from(["uniform", "global", "heuristic"]),
    st.floats(0, 0.5),
    st.floats(0.5, 0.99),
    st.integers(0, 120),
)
def test_the_zeros_are_those_of_the_scheduled_sparsity(allocation, initial, final, now):
    ramp = Ramp("cubic", begin=10, end=100, every=1)
    due = SparsityTarget(final, initial, allocation).scheduled(ramp, now, WEIGHTS)
    assert due.sparsity == ramp.value(now, initial, final)
    zeros = due.num_zeros if isinstance(due.num_zeros, int) else sum(due.num_zeros.values())
    assert zeros == round(due.sparsity * 1100)


def test_a_mapping_gives_each_layer_its_own():
    target = SparsityTarget({"head": 0.5, "*": 0.9}, initial=0.1)
    taken_by = {"stem.weight": "*", "body.weight": "*", "head.weight": "head"}
    ramp = Ramp("linear", begin=0, end=10, every=1)
    assert target.layers == ["head", "*"]
    due = target.scheduled(ramp, 10, WEIGHTS, taken_by)
    assert due.sparsity == {"stem.weight": 0.9, "body.weight": 0.9, "head.weight": 0.5}
    assert due.num_zeros == {"stem.weight": 36, "body.weight": 900, "head.weight": 30}
    assert target.scheduled(ramp, 0, WEIGHTS, taken_by).sparsity == dict.fromkeys(WEIGHTS, 0.1)


def test_a_single_number_names_no_layers():
    assert SparsityTarget(0.5).layers is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final": 1.0}, "final_sparsity is 1.0"),
        ({"final": {}}, "empty mapping"),
        ({"final": {"a": 0.9, "b": -1}}, r"final_sparsity\['b'\] is -1"),
        ({"final": 0.2, "initial": 0.3}, "below initial_sparsity=0.3"),
        ({"final": {"a": 0.2}, "initial": 0.3}, r"final_sparsity\['a'\] is 0.2, below"),
        ({"final": 0.5, "allocation": "even"}, "allocation is 'even'"),
        ({"final": {"a": 0.5}, "allocation": "heuristic"}, "leave allocation out"),
        ({"final": 0.4, "pattern": NofM(2, 4)}, "complete at exactly 0.5"),
        ({"final": 0.5, "pattern": NofM(2, 4), "allocation": "heuristic"}, "use allocation='unif"),
    ],
    ids=str,
)
def test_bad_targets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparsityTarget(**arguments)


def test_blocks_may_be_of_any_sparsity():
    assert SparsityTarget(0.4, pattern=Block(4, 1)).final == 0.4


def test_sparsities_that_a_search_finds_take_the_place_of_the_word():
    target = SparsityTarget("searched")
    assert target.waits_for_search
    assert target.layers is None
    found = replace(target, final={"a": 0.5, "b": 0.25})
    assert not found.waits_for_search
    ramp = Ramp("constant", 0, 0, 1)
    taken_by = {"a.weight": "a", "b.weight": "b"}
    due = found.scheduled(ramp, 0, {"a.weight": 8, "b.weight": 8}, taken_by)
    assert due.num_zeros == {"a.weight": 4, "b.weight": 2}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"final": "search"}, "final_sparsity is 'search', expected a number"),
        ({"final": "searched", "allocation": "global"}, "allocation='global' .* leave both out"),
        ({"final": "searched", "pattern": NofM(2, 4)}, "pattern 2:4 are given; leave both out"),
    ],
)
def test_what_is_no_search_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        SparsityTarget(**arguments)

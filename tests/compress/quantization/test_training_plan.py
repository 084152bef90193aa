"""When what happens in quantization-aware training."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.compress.quantization.training_plan import QuantizationMoments, QuantizationPlan

BITS = st.integers(2, 8)


def test_moments_begin_with_their_step():
    plan = QuantizationPlan(3, 5, 7, bits_end=3, first_bits=4, last_bits=4)
    assert [plan.rounds(now) for now in (0, 2, 3, 9)] == [False, False, True, True]
    assert [plan.batch_norm_frozen(now) for now in (4, 5, 9)] == [False, True, True]
    assert [plan.ranges_frozen(now) for now in (6, 7, 9)] == [False, True, True]


def test_none_is_never():
    plan = QuantizationPlan(0, None, None, bits_end=0, first_bits=8, last_bits=8)
    assert not plan.batch_norm_frozen(10**9)
    assert not plan.ranges_frozen(10**9)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 30), st.integers(0, 60), BITS, BITS)
def test_bits_fall_one_at_a_time_from_the_first_to_the_last(begin, length, one, other):
    first, last = max(one, other), min(one, other)
    plan = QuantizationPlan(begin, None, None, begin + length, first, last)
    bits = [plan.least_bits(now) for now in range(begin + length + 3)]
    assert all(a >= b for a, b in pairwise(bits))
    assert set(bits[: begin + (length > 0)]) <= {first}
    assert set(bits[begin + length :]) == {last}
    if length >= first - last:
        assert set(bits[begin:]) == set(range(last, first + 1))
        steps = [bits[begin:].count(b) for b in range(last + 1, first + 1)]
        assert not steps or max(steps) - min(steps) <= 1


def moments(begin=0, freeze_batch_norm=None, freeze_ranges=None, bits=None, unit="step"):
    return QuantizationMoments(begin, freeze_batch_norm, freeze_ranges, bits, unit)


@pytest.mark.parametrize("moment", [0, 3, 0.0, 0.5, 1.0])
def test_moments_that_make_sense_pass(moment):
    assert moments(moment, moment, moment).moments == dict.fromkeys(
        ("begin", "freeze_batch_norm", "freeze_ranges"), moment
    )
    assert moments(moment, unit="epoch").moments == {"begin": moment}


@pytest.mark.parametrize("moment", [-1, -0.5, 1.5, float("nan"), float("inf"), "1", True, [1]])
@pytest.mark.parametrize("name", ["begin", "freeze_batch_norm", "freeze_ranges"])
def test_moments_that_make_none_are_refused(moment, name):
    with pytest.raises(ValueError, match=f"{name} is .*, expected a "):
        moments(**{name: moment}, unit="epoch")


def test_rounding_has_to_begin():
    with pytest.raises(ValueError, match="begin is None"):
        moments(None)


def test_units_are_two():
    with pytest.raises(ValueError, match="unit is 'batch', expected 'step' or 'epoch'"):
        moments(unit="batch")


def test_bits_fall_until_ranges_are_frozen_or_the_run_ends():
    assert moments(0, freeze_ranges=0.5, bits=8).moments == {"begin": 0, "freeze_ranges": 0.5}
    until_frozen = moments(2, freeze_ranges=9, bits=8).plan(
        {"begin": 2, "freeze_ranges": 9}, "step", 4
    )
    assert (until_frozen.first_bits, until_frozen.bits_end, until_frozen.last_bits) == (8, 9, 4)
    at_the_end = moments(2, bits=8)
    resolved = {name: 40 if m == 1.0 else m for name, m in at_the_end.moments.items()}
    assert at_the_end.plan(resolved, "epoch", 4).bits_end == 40
    with pytest.raises(
        ValueError, match=r"begin \(step 9\) to freeze_ranges \(step 9\), which is not"
    ):
        moments(9, freeze_ranges=9, bits=8).plan({"begin": 9, "freeze_ranges": 9}, "step", 4)

"""When what happens in quantization-aware training."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.compress.quantization.training_plan import QuantizationPlan, check_moments

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


@pytest.mark.parametrize("moment", [0, 3, 0.0, 0.5, 1.0])
def test_moments_that_make_sense_pass(moment):
    assert check_moments(moment, moment, moment, "step") is None
    assert check_moments(moment, None, None, "epoch") is None


@pytest.mark.parametrize("moment", [-1, -0.5, 1.5, float("nan"), float("inf"), "1", True, [1]])
def test_moments_that_make_none_are_refused(moment):
    for arguments, name in (
        ((moment, None, None), "begin"),
        ((0, moment, None), "freeze_batch_norm"),
        ((0, None, moment), "freeze_ranges"),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*; expected a fraction of the run"):
            check_moments(*arguments, "epoch")


def test_rounding_has_to_begin():
    with pytest.raises(ValueError, match="begin is None"):
        check_moments(None, None, None, "step")


def test_units_are_two():
    with pytest.raises(ValueError, match="unit is 'batch'; choose 'step' or 'epoch'"):
        check_moments(0, None, None, "batch")

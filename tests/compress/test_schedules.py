import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_compress.compress.schedules import Ramp, Schedule, constant, cubic, linear

FORMULAS = [cubic, linear]
sparsities = st.floats(0.0, 0.99)
kinds = st.sampled_from(["cubic", "linear", "constant"])
ramps = st.builds(
    lambda kind, begin, length, every: Ramp(kind, begin, begin + length, every),
    kinds,
    st.integers(0, 1000),
    st.integers(0, 1000),
    st.integers(1, 700),
)


@pytest.mark.parametrize("formula", FORMULAS)
@given(sparsities, sparsities)
def test_formulas_hit_both_ends_exactly(formula, initial, final):
    assert formula(0.0, initial, final) == initial
    assert formula(1.0, initial, final) == final


@pytest.mark.parametrize("formula", FORMULAS)
@given(sparsities, sparsities, st.floats(0, 1), st.floats(0, 1))
def test_formulas_are_monotone_and_stay_between_the_ends(formula, a, b, p, q):
    initial, final = sorted((a, b))
    early, late = (formula(x, initial, final) for x in sorted((p, q)))
    assert early <= late + 1e-12
    assert initial - 1e-12 <= early <= final + 1e-12


def test_cubic_is_zhu_and_guptas_equation():
    # s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3 with t0 = 100, n dt = 400
    ramp = Ramp("cubic", begin=100, end=500, every=50)
    for t in range(100, 500, 50):
        expected = 0.75 + (0.1 - 0.75) * (1 - (t - 100) / 400) ** 3
        assert ramp.value(t, 0.1, 0.75) == pytest.approx(expected)


def test_constant_is_final_from_the_begin_on():
    assert constant(0.0, 0.2, 0.7) == 0.7


@pytest.mark.parametrize("formula", [cubic, linear, constant])
@pytest.mark.parametrize("progress", [-0.1, 1.1, math.nan])
def test_formulas_refuse_progress_outside_of_the_ramp(formula, progress):
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"):
        formula(progress, 0.0, 1.0)


@given(ramps, st.integers(0, 3000))
def test_updates_end_exactly_at_the_end(ramp, now):
    point = ramp.update_point(now)
    if now < ramp.begin:
        assert point is None
    elif now >= ramp.end:
        assert point == ramp.end
    else:
        assert ramp.begin <= point <= now
        assert (point - ramp.begin) % ramp.every == 0
        assert now - point < ramp.every


@given(ramps, sparsities, sparsities)
def test_the_value_at_the_end_is_the_final_one(ramp, a, b):
    initial, final = sorted((a, b))
    assert ramp.value(ramp.end, initial, final) == final
    assert ramp.value(ramp.end + 1, initial, final) == final


@given(ramps)
def test_a_ramp_survives_plain_data(ramp):
    assert Ramp(**ramp.to_dict()) == ramp


def test_fractions_and_absolute_moments_resolve():
    relative = Schedule("linear", begin=0.1, end=0.5, update_every=0.01).resolve(1000)
    assert relative == Ramp("linear", begin=100, end=500, every=10)
    absolute = Schedule("cubic", begin=3, end=7, update_every=2).resolve(math.inf)
    assert absolute == Ramp("cubic", begin=3, end=7, every=2)
    mixed = Schedule(begin=3, end=1.0, update_every=0.001).resolve(10)
    assert mixed == Ramp("cubic", begin=3, end=10, every=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "quadratic"}, "kind is 'quadratic', expected one of"),
        ({"unit": "batch"}, "unit is 'batch', expected 'step' or 'epoch'"),
        ({"begin": -1}, "begin is -1, expected a number of steps of at least 0"),
        ({"begin": True}, "begin is True, expected a fraction"),
        ({"end": 5.0}, "For step 5 write end=5"),
        ({"end": math.nan}, "end is nan, expected a fraction"),
        ({"begin": -0.1}, r"begin is -0.1, expected a fraction of the run in \[0, 1\]"),
        ({"update_every": 0}, "update_every is 0, expected a positive"),
        ({"update_every": 0.0}, "update_every is 0, expected a positive"),
        ({"begin": 0.6, "end": 0.5}, "begin=0.6 lies after end=0.5"),
        ({"end": "half"}, "end is 'half', expected a fraction"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


def test_a_fraction_needs_a_run_of_known_length():
    with pytest.raises(ValueError, match="the run has no known length"):
        Schedule().resolve(math.inf)


def test_mixed_moments_in_the_wrong_order_are_refused_once_resolved():
    with pytest.raises(ValueError, match="begin=80 is step 80 of this run and lies after"):
        Schedule(begin=80, end=0.5).resolve(100)


def test_zero_needs_no_run_length():
    schedule = Schedule("constant", begin=0.0, end=0.0, update_every=1)
    assert schedule.resolve(math.inf) == Ramp("constant", 0, 0, 1)


def test_everything_at_one_moment():
    assert Schedule.at(0.5, "epoch").resolve(10) == Ramp("constant", 5, 5, 1, "epoch")

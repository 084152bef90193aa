"""Bars on time: the interval of the median, and what is decided from it."""

import json
import math
import random
from statistics import median

import pytest
from bars import Ratio, TimeBar, median_interval, missed
from hypothesis import given
from hypothesis import strategies as st

TIMES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60)
FEW = 5
"""Values from which 95 % cannot be said: all of one draw in 16 are on one side of the median."""


@given(TIMES)
def test_the_interval_contains_the_median(values):
    low, high = median_interval(values)
    assert low <= median(values) <= high


@given(TIMES.filter(lambda values: len(values) > FEW), st.randoms())
def test_the_interval_is_of_given_values_in_any_order(values, chance):
    low, high = median_interval(values)
    assert low in values
    assert high in values
    chance.shuffle(values)
    assert median_interval(values) == (low, high)


@given(st.lists(st.floats(1e-6, 1e6), max_size=FEW, min_size=1))
def test_few_values_decide_nothing(values):
    assert median_interval(values) == (-math.inf, math.inf)
    assert TimeBar("x", 1e-9, Ratio.of_rounds(values)).verdict == "not decided"


@given(TIMES.filter(lambda values: len(values) > FEW), st.integers(2, 5))
def test_more_rounds_of_the_same_narrow_the_interval(values, times):
    low, high = median_interval(values)
    narrow_low, narrow_high = median_interval(values * times)
    assert low <= narrow_low <= narrow_high <= high


@given(TIMES, st.floats(0.5, 0.9), st.floats(0.9, 0.999))
def test_more_confidence_widens_the_interval(values, less, more):
    narrow, wide = median_interval(values, less), median_interval(values, more)
    assert wide[0] <= narrow[0] <= narrow[1] <= wide[1]


@given(st.integers(6, 300))
def test_the_confidence_is_that_of_the_binomial_and_no_narrower_interval_has_it(n):
    low, high = median_interval(range(n))
    assert low + high == n - 1

    def covered(k):
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    assert covered(low + 1) >= 0.95
    assert covered(low + 2) < 0.95 or low + 1 >= high


@pytest.mark.parametrize("n", [6, 15, 40])
def test_the_interval_covers_the_true_median_as_often_as_it_says(n):
    chance = random.Random(n)
    draws = [[chance.expovariate(1) for _ in range(n)] for _ in range(2000)]
    covered = sum(low <= math.log(2) <= high for low, high in map(median_interval, draws))
    assert covered / len(draws) > 0.94


@pytest.mark.parametrize(
    ("values", "confidence", "message"),
    [([], 0.95, "values is empty"), ([1.0], 0.0, r"confidence is 0.0; expected .* \(0, 1\)")],
)
def test_wrong_arguments_are_refused(values, confidence, message):
    with pytest.raises(ValueError, match=message):
        median_interval(values, confidence)


# --- Verdicts -------------------------------------------------------------------------------------


@given(st.floats(0.01, 100), st.floats(0, 100), st.floats(0, 100), st.floats(0.01, 100))
def test_a_bar_is_decided_only_by_the_whole_interval(estimate, below, above, limit):
    ratio = Ratio(estimate, estimate - below, estimate + above, 9)
    verdict = TimeBar("x", limit, ratio).verdict
    assert (verdict == "missed") == (ratio.low > limit)
    assert (verdict == "holds") == (ratio.high <= limit)
    assert (verdict == "not decided") == (ratio.low <= limit < ratio.high)


def timed(ratio, noise, rounds=40, seed=0):
    """Times of two calls in rounds: slow moments hit both, noise hits each alone."""
    chance = random.Random(seed)
    speed = [chance.uniform(1, 5) for _ in range(rounds)]
    ours, peer = (
        [s * factor * chance.lognormvariate(0, noise) for s in speed] for factor in (ratio, 1.0)
    )
    return Ratio.of(ours, peer)


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict"),
    [
        (1.00, 0.01, "holds"),
        (1.03, 0.01, "holds"),
        (1.05, 0.01, "not decided"),
        (1.08, 0.01, "missed"),
        (1.00, 0.5, "not decided"),
        (1.10, 0.5, "not decided"),
        (3.00, 0.5, "missed"),
        (0.50, 0.5, "holds"),
    ],
)
def test_noise_leaves_a_bar_undecided_where_it_is_larger_than_the_difference(ratio, noise, verdict):
    found = [TimeBar("x", 1.05, timed(ratio, noise, seed=seed)).verdict for seed in range(5)]
    assert found.count(verdict) >= 4
    if verdict != "not decided":
        assert not {"holds", "missed"} - {verdict} & set(found)


@given(st.floats(0.1, 10), st.lists(st.floats(0.1, 10), min_size=6, max_size=30))
def test_a_machine_that_changes_its_speed_does_not_change_the_ratio(ratio, speeds):
    found = Ratio.of([ratio * s for s in speeds], speeds)
    assert found.estimate == pytest.approx(ratio)
    assert (found.low, found.high) == (pytest.approx(ratio), pytest.approx(ratio))


def test_only_what_is_missed_is_missed():
    over, straddling = Ratio(2.0, 1.5, 2.5, 9), Ratio(1.0, 0.5, 1.5, 9)
    bars = [TimeBar("a", 1.0, over), TimeBar("b", 1.0, straddling), TimeBar("c", 1.0, None, "why")]
    assert missed(bars) == [str(bars[0])]
    assert [bar.verdict for bar in bars] == ["missed", "not decided", "not decided"]
    assert all(number in str(bars[1]) for number in ("1.0000", "0.5000", "1.5000"))


# --- Files ----------------------------------------------------------------------------------------


@given(TIMES)
def test_ratios_come_back_from_json(values):
    ratio = Ratio.of_rounds(values)
    again = Ratio.from_json(json.loads(json.dumps(ratio.as_json(), allow_nan=False)))
    assert again.rounds == len(values)
    for name in ("estimate", "low", "high"):
        assert getattr(again, name) == pytest.approx(getattr(ratio, name), abs=1e-5)


@given(st.floats(0.1, 10))
def test_a_number_without_an_interval_is_taken_as_it_is(value):
    assert TimeBar("x", 1.0, Ratio.from_json(value)).verdict == (
        "holds" if value <= 1 else "missed"
    )

"""Whether a lower precision will do."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lit_compress.search.precision import lower_precision_pays, ranks_alike

scores = st.lists(st.integers(0, 1000).map(lambda n: n / 1000), min_size=2, max_size=6)


@given(scores)
def test_the_same_scores_rank_alike(full):
    assert ranks_alike(full, full)


@given(scores, st.randoms())
def test_another_order_does_not(full, random):
    lower = list(full)
    random.shuffle(lower)
    assume(lower != full)
    assert not ranks_alike(full, lower)


@given(scores, st.floats(-0.1, 0.1))
def test_a_shift_of_all_scores_is_judged_by_their_spread(full, share):
    spread = max(full) - min(full)
    assume(spread > 0 and abs(abs(share) - 0.1) > 1e-6)
    assert ranks_alike(full, [score + share * spread for score in full])
    assert not ranks_alike(full, [score + 0.11 * spread for score in full])


@given(scores, st.permutations(range(6)))
def test_the_order_of_the_candidates_does_not_matter(full, order):
    lower = [score + 0.01 * index for index, score in enumerate(full)]
    order = [index for index in order if index < len(full)]
    shuffled = ranks_alike([full[i] for i in order], [lower[i] for i in order])
    assert shuffled == ranks_alike(full, lower)


def test_equal_candidates_leave_no_room():
    assert ranks_alike([0.5, 0.5], [0.5, 0.5])
    assert not ranks_alike([0.5, 0.5], [0.5, 0.51])


@pytest.mark.parametrize("lower", [[math.nan, 0.2], [0.9, math.nan]])
def test_what_is_no_number_ranks_nothing(lower):
    assert not ranks_alike([0.9, 0.2], lower)


def test_it_has_to_be_faster_too():
    full, lower = [0.9, 0.5, 0.1], [0.89, 0.5, 0.11]
    assert lower_precision_pays(full, lower, 1.0, 0.8)
    assert not lower_precision_pays(full, lower, 1.0, 0.95)
    assert not lower_precision_pays(full, [0.1, 0.5, 0.9], 1.0, 0.1)

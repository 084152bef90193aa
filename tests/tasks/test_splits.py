"""Held-out splits: disjoint, whole, stratified, repeatable."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.tasks.splits import hold_out, limit_per_class

labels_with_three_each = st.lists(st.integers(0, 4), max_size=60).map(
    lambda extra: torch.tensor([*range(5)] * 3 + extra)
)


@settings(deadline=None, max_examples=50)
@given(
    labels=labels_with_three_each,
    per_class=st.integers(1, 2) | st.floats(0.01, 0.6),
    seed=st.integers(0, 9),
)
def test_hold_out_takes_the_same_part_of_each_class(labels, per_class, seed):
    stay, held = hold_out(labels, per_class, seed)
    assert sorted([*stay.tolist(), *held.tolist()]) == list(range(len(labels)))
    for label in range(5):
        size = int((labels == label).sum())
        taken = int((labels[held] == label).sum())
        expected = per_class if isinstance(per_class, int) else max(1, round(per_class * size))
        assert taken == expected < size
    again = hold_out(labels, per_class, seed)
    assert torch.equal(stay, again[0])
    assert torch.equal(held, again[1])


def test_another_seed_holds_out_other_images():
    labels = torch.arange(10).repeat(50)
    assert not torch.equal(hold_out(labels, 5, 0)[1], hold_out(labels, 5, 1)[1])


@settings(deadline=None, max_examples=30)
@given(labels=labels_with_three_each, limit=st.integers(1, 20), seed=st.integers(0, 9))
def test_limit_keeps_that_many_of_each_class(labels, limit, seed):
    kept = limit_per_class(labels, limit, seed)
    assert len(kept.unique()) == len(kept)
    for label in range(5):
        size = int((labels == label).sum())
        assert int((labels[kept] == label).sum()) == min(limit, size)


@pytest.mark.parametrize("per_class", [0, -1, 0.0, 1.0, 1.5])
def test_hold_out_refuses_a_part_that_is_none(per_class):
    with pytest.raises(ValueError, match=f"per_class came as {per_class}"):
        hold_out(torch.tensor([0, 0, 1, 1]), per_class, 0)


def test_hold_out_refuses_to_take_a_whole_class():
    with pytest.raises(ValueError, match="Class 1 has 2 images, and 2 are to be held out"):
        hold_out(torch.tensor([0, 0, 0, 1, 1]), 2, 0)


def test_limit_refuses_zero():
    with pytest.raises(ValueError, match="limit came as 0"):
        limit_per_class(torch.tensor([0, 1]), 0, 0)

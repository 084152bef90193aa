from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.compress.channels.progress import ChannelProgress
from tests.compress.channels.hand_made_groups import groups_of

GROUPS = groups_of(
    {"a": 8, "b": 16, "c": 24},
    ("a.weight", 0, range(8), "out"),
    ("b.weight", 0, range(8, 24), "out"),
    ("c.weight", 0, range(24, 48), "out"),
)
PLAN = ChannelPlan({"a": 4, "b": 4, "c": 24}, {"a": 8, "b": 16, "c": 24})


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0, 1), max_size=5),
    st.sampled_from(["channels", "layers"]),
    st.sampled_from([1, 4]),
    st.integers(0, 100),
)
def test_every_way_ends_at_the_plan_and_never_goes_back(fractions, spread, round_to, seed):
    progress = ChannelProgress(GROUPS, PLAN, spread, round_to)
    scores = torch.rand(48, generator=torch.Generator().manual_seed(seed))
    kept = [progress.kept]
    for fraction in [*sorted(fractions), 1.0]:
        keep = progress.choose(fraction, scores)
        progress.now, scores = progress.now.after(keep), scores[keep]
        kept.append(progress.kept)
    assert kept[0] == PLAN.channels
    assert kept[-1] == PLAN.kept
    for before, after in pairwise(kept):
        assert all(after[name] <= before[name] for name in before)


@pytest.mark.parametrize(
    ("spread", "fraction", "expected"),
    [
        ("channels", 0.0, {"a": 8, "b": 16, "c": 24}),
        ("channels", 0.5, {"a": 6, "b": 10, "c": 24}),
        ("channels", 1.0, {"a": 4, "b": 4, "c": 24}),
        ("layers", 0.0, {}),
        ("layers", 1 / 3, {"a": 4}),
        ("layers", 2 / 3, {"a": 4, "b": 4}),
        ("layers", 1.0, {"a": 4, "b": 4, "c": 24}),
    ],
)
def test_a_part_of_the_way(spread, fraction, expected):
    assert ChannelProgress(GROUPS, PLAN, spread, 1).due(fraction).kept == expected


def test_the_highest_scores_stay():
    progress = ChannelProgress(GROUPS, PLAN, round_to=1)
    scores = -torch.arange(48.0)
    keep = progress.choose(1.0, scores)
    assert keep.nonzero().flatten().tolist() == [0, 1, 2, 3, 8, 9, 10, 11, *range(24, 48)]


def cut_to(**kept):
    keep = torch.ones(48, dtype=torch.bool)
    for name, number in kept.items():
        span = GROUPS.span(name)
        keep[span.start + number : span.stop] = False
    return GROUPS.after(keep)


def test_a_model_that_was_cut_before_is_on_its_way_already():
    progress = ChannelProgress(GROUPS, PLAN, round_to=1, now=cut_to(a=5, b=4))
    assert progress.kept == {"a": 5, "b": 4, "c": 24}
    assert progress.due(0.25).kept == {"a": 5, "b": 4, "c": 24}  # 7 and 13 are gone
    assert progress.due(1.0).kept == PLAN.kept
    assert progress.choose(0.25, torch.zeros(33)).all()
    assert int(progress.choose(1.0, torch.zeros(33)).sum()) == 32


def test_a_group_that_has_no_channel_to_spare_may_be_missing():
    plan = ChannelPlan({"a": 1, "b": 4}, {"a": 8, "b": 16})
    left = groups_of({"b": 16, "c": 24}, ("b.weight", 0, range(16), "out"))
    progress = ChannelProgress(GROUPS, plan, now=left, round_to=1)
    assert progress.due(1.0) == ChannelPlan({"b": 4}, {"b": 16})


def test_channels_do_not_come_back():
    message = "the plan keeps 4 of the 16 channels of group 'b', and an earlier cut left 3; channel"
    with pytest.raises(ValueError, match=message):
        ChannelProgress(GROUPS, PLAN, now=cut_to(b=3))


def test_it_comes_back_from_plain_data(tmp_path):
    progress = ChannelProgress(GROUPS, PLAN, "layers", 4)
    progress.now = cut_to(a=4)
    torch.save(progress.state_dict(), tmp_path / "progress.pt")
    state = torch.load(tmp_path / "progress.pt", weights_only=True)
    again = ChannelProgress.from_state_dict(state)
    assert again.kept == progress.kept == {"a": 4, "b": 16, "c": 24}
    assert again.plan == PLAN
    assert [g.num_channels for g in again.dense.groups] == [8, 16, 24]
    assert again.due(2 / 3) == progress.due(2 / 3)
    pairs = zip(again.now.axes, progress.now.axes, strict=True)
    assert all(torch.equal(a.channels, b.channels) for a, b in pairs)


def test_what_makes_no_sense():
    with pytest.raises(ValueError, match="spread is 'rows', expected 'channels' or 'layers'"):
        ChannelProgress(GROUPS, PLAN, "rows")
    with pytest.raises(ValueError, match="the plan has a group 'z' and the model has none"):
        ChannelProgress(GROUPS, ChannelPlan({"z": 1}, {"z": 2}))

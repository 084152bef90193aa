"""Stages: their order, their targets in relation to what is left, and one plan of them all."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.search.problem import Decision
from lit_compress.search.search_result import Episode, SearchResult
from lit_compress.search.settings import SearchTarget
from lit_compress.search.staged import plan_of_stages, search_in_stages, stage_targets

CHANNELS = {"first": 64, "second": 32}


def found(space, channels, kept):
    """A search from a network of some channels, each of which costs one MAC."""
    decisions = tuple(
        Decision(name, tuple(map(float, range(1, full + 1))), float(full), (0.0,))
        for name, full in channels.items()
    )
    cost = "weights" if space == "sparsity" else "macs"
    total, left = float(sum(channels.values())), float(sum(kept.values()))
    choice = tuple(kept[name] - 1 for name in channels)
    episode = Episode(0, "uniform", choice, 0.9, 0.9, {cost: left}, True, None, 0.1)
    return SearchResult(
        space,
        decisions,
        "acc",
        "max",
        0.95,
        {cost: total},
        (cost, left),
        "score",
        (episode,),
        0,
        {},
    )


class Network:
    """Channels that a search looks at and that a tuning takes away; notes who was called."""

    def __init__(self, space="channels"):
        self.space = space
        self.channels = dict(CHANNELS)
        self.calls = []

    def search(self, target):
        self.calls.append("search")
        (name,) = target.given
        assert name == "target_macs_ratio"
        left = int(target.target_macs_ratio * sum(self.channels.values()))
        second = max(left // 3, 1)
        return found(self.space, self.channels, {"first": left - second, "second": second})

    def tune(self, results):
        self.calls.append(f"tune {len(results)}")
        self.channels = {name: round(value) for name, value in results[-1].values.items()}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True))
def test_each_stage_meets_its_target_in_relation_to_the_first_network(tenths):
    targets = [SearchTarget(target_macs_ratio=n / 10) for n in sorted(tenths, reverse=True)]
    network, total = Network(), sum(CHANNELS.values())
    results = search_in_stages(targets, network.search, network.tune)
    names = [f"tune {i + 1}" for i in range(len(targets))]
    assert network.calls == [call for name in names for call in ("search", name)]
    for target, result in zip(targets, results, strict=True):
        limit = target.target_macs_ratio * total
        # The network of two channels below is what rounding down twice may cost.
        assert limit - 2 <= result.best_episode.costs["macs"] <= limit + 1e-9
    plan = plan_of_stages(results)
    assert plan.channels == CHANNELS
    assert plan.kept == network.channels


def test_targets_that_are_absolute_stay_as_they_are():
    targets = stage_targets(SearchTarget(final_sparsity=0.9), [0.5, 0.75])
    asked = []

    def search(target):
        asked.append(target)
        return found("sparsity", CHANNELS, CHANNELS)

    search_in_stages(targets, search, lambda results: None)
    assert asked == list(targets)
    sizes = stage_targets(SearchTarget(target_size_bytes=1000), [4000.0, 2000.0])
    assert [target.target_size_bytes for target in sizes] == [4000, 2000, 1000]


def test_a_stage_that_has_nothing_to_remove_is_said():
    network = Network()
    targets = [SearchTarget(target_macs_ratio=ratio) for ratio in (0.5, 0.499)]

    def search(target):  # leaves less than was asked
        return network.search(SearchTarget(target_macs_ratio=target.target_macs_ratio - 0.05))

    with pytest.raises(ValueError, match=r"target_macs_ratio 0\.499 has nothing to remove: .*0\.4"):
        search_in_stages(targets, search, network.tune)
    assert network.calls == ["search", "tune 1"]


@pytest.mark.parametrize(
    ("last", "on_the_way", "message"),
    [
        ({"final_sparsity": 0.9}, [0.75, 0.5], r"0\.75, 0\.5, 0\.9.*expected rising numbers"),
        ({"final_sparsity": 0.9}, [0.9], "expected rising numbers"),
        ({"target_macs_ratio": 0.5}, [0.4], "expected falling numbers"),
        ({"target_macs_ratio": 0.5}, [1.5], r"target_macs_ratio is 1\.5"),
        ({}, [0.5], "no target is given, and stages"),
        ({"mean_weight_bits": 4.0}, [6.0], "mean_weight_bits is the target, and stages"),
    ],
)
def test_targets_that_make_no_stages_are_refused(last, on_the_way, message):
    with pytest.raises(ValueError, match=message):
        stage_targets(SearchTarget(**last), on_the_way)


def test_a_group_that_no_later_stage_speaks_of_stays_as_it_was_left():
    first = found("channels", CHANNELS, {"first": 16, "second": 1})
    second = found("channels", {"first": 16}, {"first": 8})
    assert plan_of_stages([first, second]) == ChannelPlan({"first": 8, "second": 1}, CHANNELS)


def test_no_stages_and_other_spaces_make_no_plan():
    with pytest.raises(ValueError, match="there are no stages"):
        plan_of_stages([])
    with pytest.raises(ValueError, match="this search was over sparsity"):
        plan_of_stages([found("sparsity", CHANNELS, CHANNELS)])

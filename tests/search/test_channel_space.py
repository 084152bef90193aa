"""Channel groups as decisions: what they cost is what the networks measure."""

import random

import pytest
import torch

from lit_compress.compress.channels.groups import ChannelGroup
from lit_compress.measure.complexity import count_macs, count_params, layer_complexity
from lit_compress.search.channel_space import ChannelSpace, channel_levels
from lit_compress.search.problem import Budget
from tests.compress.channels.test_slim_copies import NETWORKS, forward, images, setting


def space_of(name, **options):
    network, groups, copies = setting(name)
    options.setdefault("round_to", 2)
    layer_macs = {row.name: row.macs for row in layer_complexity(network, images())}
    return network, ChannelSpace(network, groups, copies, layer_macs, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_of_the_network_of_a_choice(name):
    network, space = space_of(name)
    problem = space.problem(None)
    assert problem.full_costs["macs"] == count_macs(network, images())
    assert problem.full_costs["num_params"] == count_params(network)
    chance = random.Random(0)
    for _ in range(6):
        choice = tuple(chance.randint(0, top) for top in problem.highest)
        slim = space.network(choice)
        costs = problem.cost_of(choice)
        assert costs["macs"] == count_macs(slim, images())
        assert costs["num_params"] == count_params(slim)
        numbers = sum(t.numel() * t.element_size() for t in slim.state_dict().values())
        assert costs["size_bytes"] == numbers
        assert not slim.training
        assert dict(space.plan(choice).kept) == {
            decision.name: value
            for decision, value in zip(
                problem.decisions, problem.values([choice])[0].tolist(), strict=True
            )
        }


def test_networks_of_choices_are_reconstructed_where_that_was_gathered():
    network, groups, copies = setting("plain")
    space = ChannelSpace(network, groups, copies, {}, round_to=2)
    choice = tuple(len(d.levels) // 2 for d in space.decisions)
    cut_only = space.network(choice).state_dict()
    copies.gather([images(1)], forward)
    solved = space.network(choice).state_dict()
    assert not torch.equal(cut_only["1.0.weight"], solved["1.0.weight"])
    assert torch.equal(cut_only["0.0.weight"], solved["0.0.weight"])


def test_layers_that_a_sum_ties_share_a_decision():
    _, space = space_of("residual")
    assert sorted(d.full for d in space.decisions) == [8, 12]
    shared = next(i for i, d in enumerate(space.decisions) if d.full == 8)
    choice = tuple(0 if i == shared else 1 for i in range(2))
    slim = space.network(choice)
    kept = int(space.decisions[shared].levels[0])
    assert slim.stem[0].out_channels == slim.outer.out_channels == slim.head.in_features == kept


def test_a_depthwise_convolution_shares_the_decision_of_what_it_reads():
    _, space = space_of("depthwise")
    assert [d.full for d in space.decisions] == [8, 16]
    slim = space.network((0, 0))
    assert slim[0][0].out_channels == slim[1][0].groups == slim[2][0].in_channels == 2


def test_the_budget_holds_for_the_networks_themselves():
    network, space = space_of("plain", round_to=1, min_preserve_ratio=0.1)
    problem = space.problem(Budget("macs", 0.5 * count_macs(network, images())))
    for shape in ([1, 1, 1], [1, 0.5, 0.2], [0.2, 0.5, 1]):
        slim = space.network(problem.scaled(shape))
        assert 0.4 * count_macs(network, images()) < count_macs(slim, images())
        assert count_macs(slim, images()) <= 0.5 * count_macs(network, images())


@pytest.mark.parametrize(("round_to", "ratio"), [(1, 0.2), (2, 0.5), (8, 0.2), (16, 1.0)])
@pytest.mark.parametrize(
    ("channels", "blocks"), [(1, 1), (5, 1), (16, 1), (20, 1), (64, 1), (5, 5), (20, 5), (160, 5)]
)
def test_levels_are_multiples_and_all_channels(channels, round_to, ratio, blocks):
    levels = channel_levels(ChannelGroup("conv", channels, blocks), round_to, ratio)
    assert levels[-1] == channels
    assert list(levels) == sorted(set(levels))
    assert levels[0] >= min(ratio * channels, channels)
    assert all(level % blocks == 0 for level in levels)
    if channels > round_to * blocks:
        assert all(level % round_to == 0 for level in levels[:-1])
        step = round_to * blocks if round_to % blocks else round_to
        assert levels[0] - step < ratio * channels


def test_what_a_space_is_made_of():
    _, space = space_of("plain", min_preserve_ratio=0.5)
    assert space.name == "channels"
    assert [d.name for d in space.decisions] == [g.name for g in space.groups.groups]
    assert space.decisions[0].levels == (4.0, 6.0, 8.0)
    assert {len(d.features) for d in space.decisions} == {7}
    assert set(space.costs) == {"macs", "num_params", "size_bytes"}


def test_measured_latency_is_a_cost_where_it_is_given():
    _, space = space_of("plain", latency_ms=lambda values: values.sum(1) / 10)
    problem = space.problem(Budget("latency_ms", 2.0))
    choice = problem.scaled([1.0, 1.0, 1.0])
    assert sum(problem.values([choice])[0].tolist()) / 10 == problem.cost_of(choice)["latency_ms"]
    assert problem.cost_of(choice)["latency_ms"] <= 2.0


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.1])
def test_a_least_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(ValueError, match=rf"min_preserve_ratio is {ratio}, expected a share of"):
        space_of("plain", min_preserve_ratio=ratio)
    with pytest.raises(ValueError, match="round_to is 0, expected a whole number of at least 1"):
        space_of("plain", round_to=0)

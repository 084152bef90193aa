"""Slim copies: the weights that cutting and reconstructing by hand give, made once."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.channels.cut import cut_channels
from lit_compress.compress.channels.importance import channel_importance
from lit_compress.compress.channels.normal_equations import NormalEquations
from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.compress.channels.reconstruction import layers_to_reconstruct, reconstruct
from lit_compress.compress.channels.slim_copies import SlimCopies
from lit_compress.compress.channels.tracing import find_channel_groups

RIDGE = 1e-3
ALL_POINTS = 36  # of 6 x 6: which positions are drawn depends on the layers that are gathered


def forward(model, batch):
    return model(batch)


def conv(inputs, outputs, *args, bias=False, **options):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, *args, bias=bias, **options),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Residual(nn.Module):
    """A sum of two branches, whose channels stand and fall together."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8, 3, padding=1)
        self.inner = conv(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.outer(self.inner(x))).relu().mean((2, 3)))


def plain():
    return nn.Sequential(
        conv(3, 8, 3, padding=1, bias=True),
        conv(8, 12, 3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(12 * 9, 10),
        nn.ReLU(),
        nn.Linear(10, 5, bias=False),
    )


def depthwise():
    return nn.Sequential(
        conv(3, 8, 3, padding=1),
        conv(8, 8, 3, padding=1, groups=8),
        conv(8, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


NETWORKS = {"plain": plain, "residual": Residual, "depthwise": depthwise}


def images(seed=0):
    return torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def setting(name, **options):
    """A network in evaluation mode with uneven norms, its groups and its copies."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
    groups = find_channel_groups(network, lambda m: m(images()))
    scores = channel_importance(network, groups, "l1")
    return network, groups, SlimCopies(network, groups, scores, ridge=RIDGE, **options)


def plan_of(groups, chance):
    kept = {g.name: chance.randint(1, g.num_channels) for g in groups.groups}
    return ChannelPlan(kept, {g.name: g.num_channels for g in groups.groups})


def by_hand(network, groups, keep, batches=None):
    slim = copy.deepcopy(network)
    cut_channels(slim, groups, keep)
    if batches is not None:
        options = {"sequential": False, "num_points": ALL_POINTS, "ridge": RIDGE}
        reconstruct(slim, network, groups, keep, batches, forward, **options)
    return slim


def assert_same(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-5)


@pytest.fixture
def solves(monkeypatch):
    """The solves there were."""
    done = []
    solve = NormalEquations.solve

    def counted(self, *args, **options):
        done.append(self)
        return solve(self, *args, **options)

    monkeypatch.setattr(NormalEquations, "solve", counted)
    return done


# --- The copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_are_what_cutting_and_reconstructing_by_hand_makes(name):
    network, groups, copies = setting(name)
    before = copy.deepcopy(network.state_dict())
    batches = [images(1), images(2)]
    copies.gather(batches, forward, num_points=ALL_POINTS)

    @given(st.randoms(use_true_random=False))
    @settings(deadline=None, max_examples=5)
    def of_any_plan(chance):
        plan = plan_of(groups, chance)
        keep = copies.keep(plan)
        assert groups.num_kept(keep) == dict(plan.kept)
        slim = copies(plan)
        assert_same(slim, by_hand(network, groups, keep, batches))
        assert slim(images(3)).shape == (24, 5)

    of_any_plan()
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key])
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_without_gathering_copies_are_plain_cuts(name):
    network, groups, copies = setting(name)
    plan = ChannelPlan(
        {g.name: max(g.num_channels // 2, 1) for g in groups.groups},
        {g.name: g.num_channels for g in groups.groups},
    )
    slim = copies(plan)
    expected = by_hand(network, groups, copies.keep(plan)).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in slim.state_dict().items())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_that_keeps_all_gives_the_network_bit_for_bit(name):
    network, groups, copies = setting(name)
    copies.gather([images(1)], forward)
    full = {g.name: g.num_channels for g in groups.groups}
    slim = copies(ChannelPlan(full, full))
    for key, tensor in slim.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[key])
        assert tensor.data_ptr() != network.state_dict()[key].data_ptr()


def test_least_squares_bring_outputs_nearer_to_the_dense_ones():
    network, _groups, copies = setting("plain")
    plan = ChannelPlan({"0.0": 6, "1.0": 9}, {"0.0": 8, "1.0": 12})
    fresh = images(5)
    with torch.no_grad():
        dense = network(fresh)
        before = (copies(plan)(fresh) - dense).square().mean()
        copies.gather([images(seed) for seed in range(1, 5)], forward)
        after = (copies(plan)(fresh) - dense).square().mean()
    assert after < 0.85 * before


def test_copies_are_nested():
    _, groups, copies = setting("plain")
    full = {g.name: g.num_channels for g in groups.groups}
    keeps = [copies.keep(ChannelPlan({"1.0": kept}, {"1.0": full["1.0"]})) for kept in (3, 5, 9)]
    for fewer, more in itertools.pairwise(keeps):
        assert bool((~fewer | more).all())


def test_a_copy_can_be_trained_without_the_others():
    """Solved weights that are kept do not change when a copy does."""
    _, _groups, copies = setting("plain")
    copies.gather([images(1)], forward)
    plan = ChannelPlan({"0.0": 4}, {"0.0": 8})
    first = copies(plan)
    expected = copy.deepcopy(first.state_dict())
    first(images(2)).square().sum().backward()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    for key, tensor in copies(plan).state_dict().items():
        assert torch.equal(tensor, expected[key])


# --- What is kept ---------------------------------------------------------------------------------


def test_the_same_inputs_are_solved_once(solves):
    _, _, copies = setting("plain")
    copies.gather([images(1)], forward)

    def made(first, second):
        solves.clear()
        copies(ChannelPlan({"0.0": first, "1.0": second}, {"0.0": 8, "1.0": 12}))
        return len(solves)

    assert made(4, 6) == 2
    assert made(4, 6) == 0
    assert made(4, 9) == 1  # only the reader of the second group
    assert made(5, 9) == 1
    assert made(5, 6) == 0
    assert made(8, 6) == 0  # the reader of the first group lost nothing
    copies.gather([images(2)], forward)
    assert made(4, 6) == 2


def test_no_more_is_kept_than_allowed(solves):
    """Room for three of the solved weights: the least recently used go."""
    one = 12 * 8 * 9 * 4  # at most: outputs, inputs, taps, bytes
    _, _, copies = setting("plain", max_bytes=3 * one)
    copies.gather([images(1)], forward)
    expected = {}
    for kept in (7, 6, 5, 7, 4, 3):
        slim = copies(ChannelPlan({"0.0": kept}, {"0.0": 8})).state_dict()
        for key, tensor in slim.items():
            assert torch.equal(expected.setdefault((kept, key), tensor), tensor)
        held = [t for pair in copies._solved._kept.values() for t in pair if t is not None]
        assert sum(t.numel() * t.element_size() for t in held) <= 3 * one
    assert len(solves) == 5
    copies(ChannelPlan({"0.0": 6}, {"0.0": 8}))
    assert len(solves) == 6


def test_without_room_copies_are_right_all_the_same():
    network, groups, copies = setting("plain", max_bytes=0)
    copies.gather([images(1)], forward, num_points=ALL_POINTS)
    plan = ChannelPlan({"0.0": 5, "1.0": 7}, {"0.0": 8, "1.0": 12})
    for _ in range(2):
        assert_same(copies(plan), by_hand(network, groups, copies.keep(plan), [images(1)]))
    assert len(copies._solved._kept) == 1


# --- Which layers, and refusals -------------------------------------------------------------------


def test_layers_to_reconstruct_read_channels_and_can_be_solved():
    found = {}
    for name in NETWORKS:
        network, groups, _ = setting(name)
        found[name] = layers_to_reconstruct(network, groups)
    assert found["plain"] == ["1.0", "3", "5"]
    assert sorted(found["residual"]) == ["head", "inner.0", "outer"]
    assert found["depthwise"] == ["2.0", "5"]  # the depthwise convolution makes what it reads


def test_a_plan_for_another_network_is_refused():
    _, _, copies = setting("plain")
    with pytest.raises(ValueError, match="conv9"):
        copies(ChannelPlan({"conv9": 4}, {"conv9": 8}))


def test_nothing_to_gather_from_is_refused():
    _, _, copies = setting("plain")
    with pytest.raises(ValueError, match="batches is empty"):
        copies.gather([], forward)

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.sparsity.copies import SparseCopies
from lit_compress.compress.sparsity.magnitude import allocate_zeros, magnitude_masks
from lit_compress.compress.sparsity.patterns import Unstructured
from lit_compress.search.environment import walk
from lit_compress.search.problem import Budget
from lit_compress.search.searchers import rules_of_thumb
from lit_compress.search.sparsity_space import (
    SparsitySpace,
    density_levels,
    exact_sparsities,
    sparse_layers,
)

sizes_of_layers = st.lists(st.integers(20, 5000), min_size=2, max_size=6)
targets = st.floats(0.2, 0.95)


def linear_space(sizes, target, **kwargs):
    """A space of linear layers with so many weights each."""
    network = nn.ModuleDict({f"layer{i}": nn.Linear(n, 1) for i, n in enumerate(sizes)})
    layers = list(network)
    macs = {layer: 3 * size for layer, size in zip(layers, sizes, strict=True)} | {"other": 50}
    copies = SparseCopies(network, layers)
    return SparsitySpace(network, layers, copies, macs, target_sparsity=target, **kwargs)


@given(sizes_of_layers, targets, st.data())
@settings(deadline=None, max_examples=40)
def test_every_walk_meets_the_target_as_nearly_as_a_level_allows(sizes, target, data):
    space = linear_space(sizes, target)
    problem = space.problem(space.budget)
    choice = walk(problem, lambda state: data.draw(st.floats(0, 1)))
    total = sum(sizes)
    kept = problem.cost_of(choice)["weights"]
    assert kept <= total - round(target * total)
    for index, level in enumerate(choice):
        if level < problem.highest[index]:
            more = (*choice[:index], level + 1, *choice[index + 1 :])
            assert problem.cost_of(more)["weights"] > space.budget.limit
    zeros = allocate_zeros(space.sizes, space.exact(choice), "uniform")
    assert sum(zeros.values()) == round(target * total)
    # A correction within a level's step: what was missing is less than the least step upwards.
    missing = space.budget.limit - kept
    plain = allocate_zeros(space.sizes, space.sparsities(choice), "uniform")
    assert all(abs(zeros[layer] - plain[layer]) <= missing + 1 for layer in zeros)


@given(st.integers(1, 3000), targets, st.integers(2, 30))
@settings(deadline=None, max_examples=60)
def test_levels_are_whole_weights_between_the_bounds(size, target, number):
    levels = density_levels(size, target, number)
    kept = [level * size for level in levels]
    assert 1 <= len(levels) <= number
    assert all(round(k) / size == level for k, level in zip(kept, levels, strict=True))
    low, high = (1 - target) / 3, min(3 * (1 - target), 1.0)
    assert kept[0] == pytest.approx(max(low * size, 1), abs=0.5 + 1e-9)
    assert kept[-1] == pytest.approx(max(high * size, 1), abs=0.5 + 1e-9)
    assert all(a < b for a, b in pairwise(levels))


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0, 0.999)), min_size=1, max_size=6),
    st.floats(0, 0.99),
)
@settings(deadline=None, max_examples=60)
def test_exact_sparsities_add_up_to_the_weight(layers, target):
    sizes = {f"layer{i}": size for i, (size, _) in enumerate(layers)}
    given_sparsities = {f"layer{i}": sparsity for i, (_, sparsity) in enumerate(layers)}
    total = sum(sizes.values())
    assume(total - round(target * total) >= len(layers))
    exact = exact_sparsities(given_sparsities, sizes, target)
    zeros = allocate_zeros(sizes, exact, "uniform")
    assert sum(zeros.values()) == round(target * total)
    assert all(zeros[layer] < sizes[layer] for layer in sizes)


def test_exact_sparsities_that_are_met_stay():
    sizes = {"a": 10, "b": 90}
    assert exact_sparsities({"a": 0.5, "b": 0.8}, sizes, 0.77) == {"a": 0.5, "b": 0.8}


def test_costs_are_those_of_the_sparse_network():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))
    layers, macs = ["0", "3"], {"0": 72 * 16, "3": 320, "else": 7}
    space = SparsitySpace(
        network, layers, SparseCopies(network, layers), macs, target_sparsity=0.5, num_levels=4
    )
    problem = space.problem(None)
    for choice in ((0, 0), (1, 2), (3, 3)):
        costs = problem.cost_of(choice)
        sparse = space.network(choice)
        kept = {layer: int((sparse[int(layer)].weight != 0).sum()) for layer in layers}
        assert costs["weights"] == sum(kept.values())
        assert costs["num_params"] == sum(kept.values()) + 4 + 8 + 5
        assert costs["macs"] == pytest.approx(16 * kept["0"] + kept["3"] + 7)
        masked = {"0": 9 + 4 * kept["0"], "3": 40 + 4 * kept["3"]}
        rest = 4 * (4 + 8 + 5) + 4 * 8 + 8  # biases, batch norm and its buffers
        assert costs["size_bytes"] == min(masked["0"], 288) + min(masked["3"], 1280) + rest
    full = problem.full_costs
    tensors = (*network.parameters(), *network.buffers())
    assert full["size_bytes"] == sum(t.numel() * t.element_size() for t in tensors)
    assert full["num_params"] == sum(p.numel() for p in network.parameters())
    assert full["macs"] == sum(macs.values())


@given(st.lists(st.floats(0.001, 1), min_size=3, max_size=3), st.data())
@settings(deadline=None, max_examples=30)
def test_no_cost_falls_where_more_is_kept(values, data):
    space = linear_space([30, 200, 1000], 0.8)
    more = [data.draw(st.floats(value, 1)) for value in values]
    pair = torch.tensor([values, more], dtype=torch.float64)
    for name, cost in space.costs.items():
        less, greater = cost(pair).tolist()
        assert less <= greater + 1e-9, name


def test_a_network_has_the_density_of_its_choice_and_is_in_evaluation_mode():
    space = linear_space([100, 400], 0.9)
    problem = space.problem(space.budget)
    choice = problem.scaled([1, 1])
    network = space.network(choice)
    assert not network.training
    for decision, index in zip(space.decisions, choice, strict=True):
        kept = int((network[decision.name].weight != 0).sum())
        assert kept == round(decision.levels[index] * space.sizes[decision.name])
        assert decision.full == 1.0
        assert len(decision.features) == 7


def test_layers_are_those_that_magnitude_sparsity_takes():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.Linear(8, 2)
    )
    assert sparse_layers(network) == ["0", "3"]
    assert sparse_layers(network, ["3"]) == ["0"]
    with pytest.raises(ValueError, match="ignored_layers holds the pattern 'x'"):
        sparse_layers(network, ["x"])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"target_sparsity is 90, .* For 90 % write 0.9"):
        linear_space([10, 20], 90)
    with pytest.raises(ValueError, match="target_sparsity is 0: nothing is to be removed"):
        linear_space([10, 20], 0.0)
    with pytest.raises(ValueError, match="num_levels is 1, expected at least 2"):
        linear_space([10, 20], 0.5, num_levels=1)
    with pytest.raises(ValueError, match="the lowest that the bounds allow is 10 "):
        linear_space([100, 200], 0.9).problem(Budget("weights", 5))
    with pytest.raises(ValueError, match="which leaves 1 weights for 2 layers"):
        exact_sparsities({"a": 0.5, "b": 0.5}, {"a": 10, "b": 10}, 0.95)
    with pytest.raises(ValueError, match=r"sparsity of 'a' is 1.0, .* in \[0, 1\)"):
        exact_sparsities({"a": 1.0}, {"a": 10}, 0.5)


def test_magnitudes_of_all_layers_are_what_a_ranking_goes_by():
    torch.manual_seed(0)
    network = nn.ModuleDict({"weak": nn.Linear(100, 4), "strong": nn.Linear(100, 4)})
    with torch.no_grad():
        network["strong"].weight.mul_(1.5)
    copies = SparseCopies(network, list(network))
    space = SparsitySpace(network, list(network), copies, {}, target_sparsity=0.5)
    problem = space.problem(space.budget)
    by_source = {p.source: p.choice for p in rules_of_thumb(problem, 1, space.worth)}
    found = space.exact(by_source["global"])
    masks = magnitude_masks({name: network[name].weight for name in network}, 400, Unstructured())
    for name, mask in masks.items():
        assert found[name] == pytest.approx(1 - float(mask.float().mean()), abs=0.02)
    assert found["weak"] > found["strong"] + 0.1
    assert space.exact(by_source["uniform"])["weak"] == pytest.approx(0.5, abs=0.01)

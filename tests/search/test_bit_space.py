from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.quantization.affine import Grid
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.compress.quantization.weight_scales import mse_weight_scale
from lit_compress.search.bit_space import BitSpace, quantizable_layers
from lit_compress.search.environment import walk
from lit_compress.search.problem import Budget


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 6, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def small_space(**kwargs):
    network = small_network()
    return BitSpace(network, quantizable_layers(network), {"0": 100, "3": 10}, **kwargs)


@given(st.lists(st.integers(1, 2000), min_size=2, max_size=6), st.floats(2.0, 7.9), st.data())
@settings(deadline=None, max_examples=40)
def test_every_walk_meets_the_budget_and_spends_it(sizes, mean_bits, data):
    network = nn.ModuleDict({f"layer{i}": nn.Linear(n, 1) for i, n in enumerate(sizes)})
    problem = BitSpace(network, list(network), {}).problem(Budget("mean_bits", mean_bits))
    choice = walk(problem, lambda state: data.draw(st.floats(0, 1)))
    bits = [level + 2 for level in choice]
    total = sum(n * b for n, b in zip(sizes, bits, strict=True))
    assert total <= mean_bits * sum(sizes) * (1 + 1e-6)
    for size, each in zip(sizes, bits, strict=True):
        assert each == 8 or total + size > mean_bits * sum(sizes) * (1 - 1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_are_rounded_for_each_channel_by_least_squares(bits):
    space, dense = small_space(), small_network()
    network = space.network((bits - 2,) * 4)
    assert not network.training
    for layer in (0, 2, 3, 6):
        weight, original = network[layer].weight.detach(), dense[layer].weight.detach()
        scale = mse_weight_scale(original, Grid(bits, signed=True))
        integers = weight.flatten(1) / scale[:, None]
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)
        assert float(integers.abs().max()) <= 2 ** (bits - 1) - 1 + 1e-4
        wanted = (original.flatten(1) / scale[:, None]).round()
        wanted = wanted.clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        assert float((integers - wanted).abs().max()) <= 1 + 1e-4
        assert float((integers - wanted).abs().mean()) <= 0.01  # ties alone
    for name, tensor in dense.state_dict().items():
        if name not in ("0.weight", "2.weight", "3.weight", "6.weight"):
            assert torch.equal(tensor, network.state_dict()[name])


def test_more_bits_come_nearer_and_the_dense_network_stays():
    space, dense = small_space(), small_network()
    errors = [
        float((space.network((level, 0, 0, 0))[0].weight - dense[0].weight).square().sum())
        for level in range(7)
    ]
    assert all(a > b for a, b in pairwise(errors))
    with torch.no_grad():
        space.network((6, 6, 6, 6))[0].weight.zero_()
    assert space.network((6, 6, 6, 6))[0].weight.count_nonzero() > 0


def test_each_layer_is_rounded_once_for_each_number_of_bits(monkeypatch):
    rounded = []

    def scale(weight, grid):
        rounded.append((tuple(weight.shape), grid.bits))
        return mse_weight_scale(weight, grid)

    monkeypatch.setattr("lit_compress.search.bit_space.mse_weight_scale", scale)
    space = small_space()
    for choice in ((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 4)):
        space.network(choice)
    assert rounded == [
        ((4, 2, 3, 3), 2), ((4, 1, 3, 3), 3), ((6, 4, 1, 1), 4), ((3, 6), 5), ((3, 6), 6)
    ]  # fmt: skip


def test_costs_count_bits_of_weights_and_bytes_of_all():
    problem = small_space().problem(None)
    costs = problem.cost_of((0, 1, 2, 3))
    sizes = [72, 36, 24, 18]
    in_bits = sum(n * b for n, b in zip(sizes, (2, 3, 4, 5), strict=True))
    assert costs["mean_bits"] == pytest.approx(in_bits / sum(sizes))
    floats = 4 + 4 + 3 + 8 + 8  # biases, batch norm, its statistics
    scales = 4 + 4 + 6 + 3
    assert costs["size_bytes"] == pytest.approx(in_bits / 8 + 4 * (floats + scales) + 8)
    assert problem.full_costs["mean_bits"] == 8


def test_bits_go_to_a_quantization_scheme():
    space = small_space(min_bits=3, max_bits=6)
    bits = space.layer_bits((0, 1, 2, 3))
    assert bits == {"0": 3, "2": 4, "3": 5, "6": 6}
    assert QuantizationScheme(layer_bits=bits).layer_bits == bits


def test_layers_are_convolutions_and_linear_ones_each_weight_once():
    network = small_network()
    network.append(nn.Linear(3, 6))
    network.append(nn.Linear(6, 3))
    network[-1].weight = network[6].weight
    network.append(nn.ConvTranspose2d(2, 2, 3))
    assert quantizable_layers(network) == ["0", "2", "3", "6", "7"]
    assert quantizable_layers(network, ["0", "7"]) == ["2", "3", "6"]


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="min_bits is 1 and max_bits 8; expected 2 <= min_bits"):
        small_space(min_bits=1)
    with pytest.raises(ValueError, match="min_bits is 4 and max_bits 4"):
        small_space(min_bits=4, max_bits=4)
    with pytest.raises(ValueError, match="ignored_layers holds the pattern 'head', which matches"):
        quantizable_layers(small_network(), ["head"])
    with pytest.raises(ValueError, match="no layer of Sequential is left to search the bits of"):
        quantizable_layers(small_network(), ["*"])
    with pytest.raises(ValueError, match="layers holds '1', which is no module whose weight"):
        BitSpace(small_network(), ["1"], {})
    with pytest.raises(ValueError, match=r"the lowest that the bounds allow is 2 "):
        small_space().problem(Budget("mean_bits", 1.5))

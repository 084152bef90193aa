"""What an agent is told of layers."""

import math

import pytest
from torch import nn

from lit_compress.search.layer_features import layer_features

NETWORK = nn.Sequential(
    nn.Conv2d(3, 16, 3, stride=2),
    nn.Conv2d(16, 64, 1),
    nn.Linear(64, 256),
)


def test_layers_are_described_by_their_sizes_scaled_over_all():
    first, second, third = layer_features(NETWORK, ["0", "1", "2"], {"0": 9999, "1": 99, "2": 0})
    assert (first[0], second[0], third[0]) == (0.0, 0.0, 1.0)  # linear
    assert (first[1], third[1]) == (0.0, 1.0)  # inputs: 3, 16, 64
    scaled = (math.log1p(16) - math.log1p(3)) / (math.log1p(64) - math.log1p(3))
    assert second[1] == pytest.approx(scaled)
    assert (first[2], third[2]) == (0.0, 1.0)  # outputs: 16, 64, 256
    assert (first[3], second[3], third[3]) == pytest.approx((1.0, 0.0, 0.0))  # kernels: 3, 1, 1
    assert (first[4], second[4], third[4]) == (1.0, 0.0, 0.0)  # strides: 2, 1, 1
    assert (first[5], third[5]) == (0.0, 1.0)  # weights: 432, 1024, 16384
    assert (first[6], second[6], third[6]) == pytest.approx((1.0, 0.5, 0.0))  # ln 10^4, 10^2, 1


def test_all_numbers_lie_in_0_to_1_and_rows_have_one_length():
    rows = layer_features(NETWORK, ["0", "1", "2"], {})
    assert {len(row) for row in rows} == {7}
    assert all(0 <= number <= 1 for row in rows for number in row)
    assert [row[6] for row in rows] == [0.0, 0.0, 0.0]  # where all are the same


def test_the_second_group_of_a_layer_is_described_as_the_layer():
    first, second = (layer_features(NETWORK, ["0", name], {"2": 5})[1] for name in ("2", "2#2"))
    assert first == second
    assert first[6] == 1.0


@pytest.mark.parametrize("name", ["(root)", "nowhere"])
def test_what_is_no_layer_is_described_all_the_same(name):
    rows = layer_features(NETWORK, ["1", name], {})
    assert rows[0][:3] == (0.0, 1.0, 1.0)
    assert rows[1][:3] == (0.0, 0.0, 0.0)

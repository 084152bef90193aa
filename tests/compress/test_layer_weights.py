import pytest
from torch import nn

from lit_compress.compress.layer_weights import layer_weights


def test_weights_come_by_name_in_the_order_given():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2))
    weights = layer_weights(network, ["2", "0"])
    assert list(weights) == ["2", "0"]
    assert weights["0"] is network[0].weight


def test_names_that_do_not_fit_are_refused():
    network = nn.Sequential()
    network.conv1 = nn.Conv2d(3, 4, 3)
    network.norm = nn.BatchNorm2d(4)
    network.linear = nn.Linear(4, 4)
    network.again = nn.Linear(4, 4)
    network.again.weight = network.linear.weight
    with pytest.raises(ValueError, match="layers is the string 'conv1'; give a list"):
        layer_weights(network, "conv1")
    with pytest.raises(ValueError, match="layers is empty; give the name of at least one"):
        layer_weights(network, [])
    with pytest.raises(ValueError, match=r"layers holds 'conv2'.*the nearest are 'conv1'"):
        layer_weights(network, ["conv2"])
    with pytest.raises(ValueError, match=r"layers holds 'norm', which is no module whose weight"):
        layer_weights(network, ["norm"])
    with pytest.raises(ValueError, match="the weight of 'again' is also that of 'linear'"):
        layer_weights(network, ["linear", "again"])
    with pytest.raises(ValueError, match="the weight of 'conv1' is also that of 'conv1'"):
        layer_weights(network, ["conv1", "conv1"])

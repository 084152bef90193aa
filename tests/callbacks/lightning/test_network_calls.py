import copy

import pytest
import torch
from torch import nn

from lit_compress.callbacks.lightning.network_calls import (
    NetworkCalls,
    find_layer,
    find_network,
    find_uncompiled_network,
    is_compiled,
    name_of_network,
)
from tests.callbacks.nets import Net


@pytest.fixture
def network():
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))


def test_a_call_is_recorded_with_its_input_output_and_features(network):
    calls = NetworkCalls(network, ["0"])
    calls.install()
    x = torch.randn(4, 3)
    with calls.recording():
        output = network(x)
        network(input=-x)
    first, second = calls.take()
    assert first.args[0] is x
    assert first.output is output
    assert torch.equal(first.features["0"][0], network[0](x))
    assert torch.equal(second.kwargs["input"], -x)
    assert len(second.features["0"]) == 1
    assert calls.take() == []


def test_calls_outside_without_gradients_or_after_removal_are_not_recorded(network):
    calls = NetworkCalls(network, ["0"])
    calls.install()
    x = torch.randn(4, 3)
    network(x)
    with calls.recording():
        with torch.no_grad():
            network(x)
        with calls.recording(armed=False):
            network(x)
    assert calls.take() == []
    calls.remove()
    with calls.recording():
        network(x)
    assert calls.take() == []
    assert not network._forward_hooks
    assert not network[0]._forward_hooks


def test_a_copy_of_the_network_does_not_report_to_the_recorder(network):
    calls = NetworkCalls(network, ["0"])
    calls.install()
    with calls.recording():
        copy.deepcopy(network)(torch.randn(4, 3))
        network(torch.randn(4, 3))
    (call,) = calls.take()
    assert len(call.features["0"]) == 1


def test_the_network_is_the_only_child_that_holds_everything():
    module = Net()
    assert find_network(module, None) is module.model
    assert find_network(module, "") is module
    assert find_network(module, "model.0") is module.model[0]
    module.criterion = nn.CrossEntropyLoss()
    assert find_network(module, None) is module.model
    module.scale = nn.Parameter(torch.ones(()))
    assert find_network(module, None) is module
    del module.scale
    module.alias = nn.Sequential(module.model)
    assert find_network(module, None) is module


def test_layers_are_found_by_their_plain_names():
    module = Net()
    module.model = torch.compile(module.model, backend="eager")
    assert find_layer(module, "model.4") is module.model._orig_mod[4]
    assert find_layer(module, "model") is module.model
    assert find_layer(module.model, "4") is module.model._orig_mod[4]
    with pytest.raises(
        ValueError, match="'model.44' is no module of Net; the nearest are 'model.4"
    ):
        find_layer(module, "model.44")


def test_a_network_has_a_plain_name():
    module = Net()
    assert name_of_network(module) == "model"
    assert name_of_network(module, module.model[4]) == "model.4"
    assert name_of_network(module, module) == ""
    module.model = torch.compile(module.model, backend="eager")
    assert name_of_network(module) == "model"
    assert name_of_network(module, find_uncompiled_network(module)) == "model"


def test_compiled_parts_are_noticed():
    assert not is_compiled(Net())
    whole, part, in_place = Net(), Net(), Net()
    torch.compile(whole, backend="eager")
    assert not is_compiled(whole)  # the wrapper is compiled, not the module itself
    part.model = torch.compile(part.model, backend="eager")
    in_place.model.compile(backend="eager")
    assert is_compiled(part)
    assert is_compiled(in_place)

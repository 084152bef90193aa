"""The same arithmetic with integers, in each spelling."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from lit_compress.compress.quantization.integers import (
    Spelling,
    integer_layers,
    integer_network,
)
from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme
from tests.compress.quantization.nets import (
    IMAGES,
    NETS,
    Shared,
    call,
    first_tensor,
    head,
    made,
    small_variances,
)

SPELLINGS = {
    "plain": Spelling(gates="sigmoids"),
    "onnx": Spelling(integer_bias=True, gates="sums"),
    "signed": Spelling(signed_activations=True, weights_in_graph=True, gates="sigmoids"),
    "all": Spelling(True, True, True, True, gates="steps"),
}


def quantized(name: str, seed: int = 0, ranges: Any = "minmax", **scheme: Any):
    net, inputs = made(name, seed)
    return calibrated(net, inputs, ranges, **scheme), inputs


def calibrated(net: nn.Module, inputs: Any, ranges: Any = "minmax", **scheme: Any) -> nn.Module:
    prepare(net, QuantizationScheme(**scheme), lambda n: call(n, inputs))
    calibrate(net, lambda n, b: call(n, b), [inputs], ranges=ranges)
    return net


def steps_between(net: nn.Module, inputs: Any, spelling: Spelling, bits: int = 8) -> Tensor:
    """Differences to the network that rounds, in steps of a grid over its answers."""
    with torch.no_grad():
        expected = first_tensor(call(net, inputs))
        got = first_tensor(call(integer_network(net, spelling), inputs))
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    step = (expected.max().clamp_min(0) - expected.min().clamp_max(0)) / (2**bits - 1)
    return (got - expected).abs() / step


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", NETS)
def test_integers_compute_what_the_network_computes(name, spelling):
    net, inputs = quantized(name)
    steps = steps_between(net, inputs, SPELLINGS[spelling])
    assert steps.max() <= (3 if SPELLINGS[spelling].quantized_outputs else 2)
    # Most do not move, though a value may be rounded up here and down there. Where answers go on a
    # grid of their own, they all move by up to half a step.
    assert steps.median() <= (0.35 if SPELLINGS[spelling].quantized_outputs else 0.1)


@pytest.mark.parametrize(
    "scheme",
    [
        {"weight_bits": 4, "activation_bits": 4},
        {"weight_bits": 2, "activation_bits": 5, "weight_ranges": "mse"},
        {"weight_bits": 3, "weight_ranges": "learned", "activation_ranges": "learned"},
        {"activation_bits": None},
        {"activation_ranges": "dynamic"},
        {"layer_bits": {"fc": 2, "*": 6}},
        {"per_tensor_weights": ["conv1.weight", "conv3.weight"]},
        {"ignored_layers": ["conv2"], "quantize_last_layer": False},
    ],
)
@pytest.mark.parametrize("spelling", ["onnx", "signed"])
def test_schemes_come_through(scheme, spelling):
    net, inputs = quantized("residual", **scheme)
    steps = steps_between(net, inputs, SPELLINGS[spelling], scheme.get("activation_bits") or 8)
    assert steps.max() <= 2
    assert steps.median() <= 0.1


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_eps_is_in_the_folded_scales(spelling):
    net, x = small_variances()
    calibrated(net, ((x,), {}))
    assert steps_between(net, ((x,), {}), SPELLINGS[spelling]).max() <= 2
    for norm in (net[1], net[5]):
        norm.eps = 1e-5  # what a tool that forgets it would fold
    wrong = integer_network(net, SPELLINGS[spelling])
    for norm in (net[1], net[5]):
        norm.eps = 1e-3
    with torch.no_grad():
        expected = net(x)
        step = (expected.max() - expected.min()) / 255
        assert (wrong(x) - expected).abs().max() > 10 * step


def test_layers_are_the_rounded_weights_times_the_norm():
    net, _inputs = quantized("plain")
    norm = net[1]
    norm.weight.data[:5] = torch.tensor([-1.5, 0.0, 1e-39, 1e-30, -1e-44])
    rounded = net.quantization.weight("0.weight")(net[0].weight).detach()
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    layer = integer_layers(net)["0:conv2d:0"]
    assert layer.values.dtype == torch.int8
    assert torch.allclose(
        layer.weight, rounded * factor.reshape(-1, 1, 1, 1), rtol=1e-5, atol=1e-30
    )
    bias = (net[0].bias - norm.running_mean) * factor + norm.bias
    step = layer.scale * net.quantization.activation("input:0").step
    assert torch.all((layer.bias - bias).abs() <= 0.51 * step + 1e-6)
    fits = bias.abs() < 2**30 * step
    assert torch.allclose(layer.bias[fits] / step[fits], torch.round(bias / step)[fits], atol=0.01)
    assert torch.isfinite(layer.scale).all()
    assert layer.scale.min() > 0
    # Next to nothing is nothing, and not something under a scale of one.
    assert not layer.values[[1, 2, 4]].any()
    assert layer.weight[3].abs().max() < 1e-28
    assert layer.values[3].any()


def test_channels_of_all_factors_give_what_the_norm_gives():
    net, inputs = made("plain")
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -1.0, 0.0, 1e-39, -1e-39, 1e-20, -1e-44, 1e3]))
    calibrated(net, inputs)
    for spelling in SPELLINGS.values():
        assert steps_between(net, inputs, spelling).max() <= 2


@pytest.mark.parametrize("norm", [False, True])
def test_channels_without_weights_keep_their_biases(norm):
    # As pruning leaves them; a scale of one would round their biases to whole steps of the input.
    net, inputs = made("plain")
    with torch.no_grad():
        net[4].weight[1:4] = 0
        net[0].weight.zero_()
        net[10].weight[2] = 0
        net[10].bias[2] = 0.123
    if not norm:
        net[1] = net[5] = nn.Identity()
        net[4].bias = nn.Parameter(torch.linspace(-0.1, 0.2, 8))
    calibrated(net, inputs)
    small = integer_network(net, Spelling(integer_bias=True))
    layers = integer_layers(net)
    for index, call_name in enumerate(("0:conv2d:0", "4:conv2d:0", "10:linear:0")):
        integers = getattr(small, f"layer{index}_bias")
        assert integers.dtype == torch.int32
        bias = integers * getattr(small, f"layer{index}_bias_scale")
        assert torch.allclose(bias, layers[call_name].bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_zeros_and_equal_weights_survive_folding(per_tensor):
    net, inputs = made("plain")
    centroids = torch.tensor([-0.07, -0.02, 0.0, 0.011, 0.05])
    names = ["0.weight", "4.weight"]
    with torch.no_grad():
        for name in names:
            weight = net.get_parameter(name)
            weight.copy_(centroids[torch.randint(0, 5, weight.shape)])
    calibrated(net, inputs, per_tensor_weights=names if per_tensor else [])
    layers = integer_layers(net)
    for index in (0, 4):
        layer, weight = layers[f"{index}:conv2d:0"], net[index].weight
        gives = net[index + 1].weight.abs() > 1e-30
        assert 4 < gives.sum() < 8
        assert ((layer.values == 0) == (weight == 0))[gives].all()
        assert (layer.values[~gives] == 0).all()
        if per_tensor:  # up to the signs of the norms' factors
            assert (net[index + 1].weight[gives] < 0).any()
            assert len(layer.values.abs().unique()) == len(centroids)


def test_weights_live_on_as_integers_only():
    net, _inputs = quantized("plain")
    small = integer_network(net)
    state = small.state_dict()
    bytes_of = {name: value.untyped_storage().nbytes() for name, value in state.items()}
    weights = sum(net[i].weight.numel() for i in (0, 4, 10))
    assert sum(n for name, n in bytes_of.items() if name.endswith("_weight")) == weights
    kept = [n for name, n in bytes_of.items() if name in ("network.0.weight", "network.4.weight")]
    assert kept == [4, 4]
    floating = sum(v.numel() * 4 for v in net.parameters())
    assert sum(bytes_of.values()) < 0.75 * floating + 300


def test_weights_that_are_read_elsewhere_stay_there():
    net, _inputs = quantized("tied")
    small = integer_network(net)
    assert torch.equal(small.network.embed.weight, net.embed.weight)
    assert small.network.fc.weight.untyped_storage().nbytes() == 4


def test_the_network_stays_as_it_was():
    net, inputs = quantized("residual")
    net.train()
    state, kind = copy.deepcopy(net.state_dict()), type(net)
    call(integer_network(net), inputs)
    after = net.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in state.items() if isinstance(v, Tensor))
    assert type(net) is kind
    assert net.training


def test_integers_follow_weights_that_changed_since_calibration():
    net, inputs = quantized("plain")
    with torch.no_grad():
        net[0].weight.mul_(0.5)
        net[4].weight.add_(0.01)
    assert steps_between(net, inputs, Spelling(integer_bias=True)).max() <= 2


def test_learned_scales_below_zero_are_what_they_are_in_training():
    net, inputs = quantized("plain", weight_ranges="learned", activation_ranges="learned")
    net.quantization.weight("0.weight").scale.data[0] = -1.0
    net.quantization.activation("2:relu:0").scale.data.fill_(-0.5)
    with torch.no_grad():
        expected = call(net, inputs)
        got = call(integer_network(net), inputs)
    assert torch.allclose(got, expected, atol=1e-4)


def test_great_biases_of_small_weights_fit():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *head(4))
    with torch.no_grad():
        net[0].weight[0] *= 1e-12
        net[0].bias[0] = 2.0
        net[0].bias[1] = -1e4
    inputs = ((torch.randn(2, *IMAGES),), {})
    net = calibrated(net.eval(), inputs)
    network = integer_network(net, Spelling(integer_bias=True))
    assert network.layer0_bias.dtype == torch.int32
    assert network.layer0_bias.abs().max() < 2**31 - 1
    assert steps_between(net, inputs, Spelling(integer_bias=True)).max() <= 2


def test_nested_inputs_and_outputs_keep_their_form():
    net, inputs = quantized("nested")
    got, expected = call(integer_network(net), inputs), call(net, inputs)
    assert tree_structure(got) == tree_structure(expected)
    assert torch.equal(got["rest"][1][0], expected["rest"][1][0])


def test_few_bits_of_activations_are_clipped_as_runtimes_do_not():
    net, inputs = quantized("plain", activation_bits=3, ranges="percentile")
    small = integer_network(net)
    values = []
    small.network[3].register_forward_hook(lambda m, args, out: values.append(args[0]))
    with torch.no_grad():
        call(small, ((inputs[0][0] * 5,), {}))
    assert 2 < len(values[0].unique()) <= 8


def test_copies_are_independent():
    net, inputs = quantized("plain")
    small = integer_network(net)
    with torch.no_grad():
        expected = call(small, inputs)
        twin = copy.deepcopy(small)
        assert torch.equal(call(twin, inputs), expected)
        twin.layer0_scale.mul_(2)
        assert not torch.equal(call(twin, inputs), expected)
        assert torch.equal(call(small, inputs), expected)


def test_what_is_not_quantized_is_refused():
    net, _ = made("plain")
    for needs in (integer_network, integer_layers):
        with pytest.raises(ValueError, match="Sequential is not quantized; use prepare or attach"):
            needs(net)


def test_ranges_that_are_missing_are_named():
    net, inputs = made("plain")
    prepare(net, QuantizationScheme(), lambda n: call(n, inputs))
    with pytest.raises(ValueError, match="activation 'input:0' has no range; calibrate or train"):
        integer_network(net)
    calibrate(net, lambda n, b: call(n, b), [inputs])
    net.quantization.activation("10:linear:0").low.fill_(torch.nan)
    integer_network(net)
    with pytest.raises(ValueError, match="activation '10:linear:0' has no range"):
        integer_network(net, Spelling(quantized_outputs=True))


@pytest.mark.parametrize("spelling", ["onnx", "signed"])
def test_exported_graphs_have_integers_around_every_layer_and_no_norm(spelling):
    net, inputs = quantized("shared")
    small = integer_network(net, SPELLINGS[spelling])
    program = torch.export.export(small, *inputs, strict=False)
    layers = [
        n for n in program.graph.nodes if "conv2d" in str(n.target) or "linear" in str(n.target)
    ]
    assert len(layers) == 4
    for node in layers:
        source, weight = node.args[:2]
        assert "dequantize_per_tensor" in str(source.target), node
        assert "dequantize_per_channel" in str(weight.target), node
        bias = node.args[2]
        expected = "dequantize_per_channel" if spelling == "onnx" else "placeholder"
        assert expected in str(bias.target) + bias.op
    assert not any("batch_norm" in str(n.target) for n in program.graph.nodes)
    with torch.no_grad():
        assert torch.equal(program.module()(*inputs[0]), call(small, inputs))


def test_a_layer_called_twice_has_two_sets_of_scales():
    net, _inputs = quantized("shared")
    assert isinstance(net, Shared)
    layers = integer_layers(net)
    one, two = layers["conv:conv2d:0"], layers["conv:conv2d:1"]
    assert torch.equal(one.values.abs().bool()[[0, 1, 4, 5]], two.values.abs().bool()[[0, 1, 4, 5]])
    assert not torch.equal(one.scale, two.scale)

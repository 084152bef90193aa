"""Weights of which no two products together overflow 16 bits."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.quantization.corrections.rounding import round_adaptively
from lit_compress.compress.quantization.integers import integer_layers
from lit_compress.compress.quantization.network import (
    attach,
    calibrate,
    prepare,
    quantization_record,
)
from lit_compress.compress.quantization.saturation import (
    MAX_PAIR_SUM,
    in_large_pairs,
    largest_pair_sum,
    may_saturate,
    safe_scale,
)
from lit_compress.compress.quantization.scheme import QuantizationScheme

SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))


def neighbours(weight, axis):
    """Index pairs of each output channel, written out: for each place all input channels."""
    weight = weight.transpose(0, axis)
    out, inputs, high, wide = weight.shape
    order = [(c, i, j) for i in range(high) for j in range(wide) for c in range(inputs)]
    found = list(pairwise(order))
    return [[(a, b) for a, b in (found if inputs % 2 else found[::2])] for _ in range(out)]


def sums(weight, axis):
    rows = weight.transpose(0, axis)
    return [[float(row[a] + row[b]) for a, b in pairs]
            for row, pairs in zip(rows, neighbours(weight, axis), strict=True)]  # fmt: skip


def drawn(shape, seed, axis=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return weight.transpose(0, axis).contiguous()


@settings(deadline=None, max_examples=40)
@given(shape=SHAPES, seed=st.integers(0, 10_000), axis=st.integers(0, 1))
def test_sums_of_neighbours(shape, seed, axis):
    weight = drawn(shape, seed, axis)
    expected = [max(map(abs, each), default=0.0) for each in sums(weight, axis)]
    assert largest_pair_sum(weight, axis).tolist() == pytest.approx(expected)
    bound = torch.tensor([value * 0.7 for value in expected])
    found = in_large_pairs(weight, bound, axis).transpose(0, axis)
    for row, pairs, limit, channel in zip(
        weight.transpose(0, axis), neighbours(weight, axis), bound, found, strict=True
    ):
        over = {i for a, b in pairs if abs(row[a] + row[b]) > limit for i in (a, b)}
        assert {tuple(i.tolist()) for i in channel.nonzero()} == over


@settings(deadline=None, max_examples=60)
@given(
    shape=SHAPES,
    seed=st.integers(0, 10_000),
    axis=st.integers(0, 1),
    whole=st.booleans(),
    steps=st.floats(20, 300),
)
def test_at_a_safe_scale_no_two_neighbours_saturate(shape, seed, axis, whole, steps):
    weight = drawn(shape, seed, axis)
    scale = weight.abs().amax([i for i in range(4) if i != axis]) / steps
    scale = scale.amax() if whole else scale
    safe = safe_scale(weight, scale, axis)
    assert safe.shape == scale.shape
    assert torch.all(safe >= scale)
    wide = safe if whole else safe.reshape([-1 if i == axis else 1 for i in range(4)])
    integers = torch.round(weight / wide)
    assert largest_pair_sum(integers, axis).max() <= MAX_PAIR_SUM
    # No larger than it has to be.
    grown = safe > scale
    largest = largest_pair_sum(weight, axis)
    largest = largest.amax() if whole else largest
    assert torch.all(largest[grown] / safe[grown] > MAX_PAIR_SUM - 0.02)
    # Weights that are whole multiples of it keep it.
    assert torch.equal(safe_scale(integers * wide, safe, axis), safe)


def test_what_fits_int16():
    assert not may_saturate(64, 255)
    assert may_saturate(64.5, 255)
    assert may_saturate(127, 255)
    assert not may_saturate(127, 127)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = self.up(self.grouped(self.depthwise(x)).relu()).relu()
        return self.head(x.mean((2, 3)))


IMAGES = torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def quantized(positive=False, **scheme):
    torch.manual_seed(0)
    net = Net().eval()
    if positive:  # the worst case: all products have one sign
        for parameter in net.parameters():
            parameter.data.abs_()
    prepare(net, QuantizationScheme(**scheme), lambda n: n(IMAGES))
    calibrate(net, lambda n, x: n(x), [IMAGES])
    return net


def saturating(net):
    return {
        call.partition(":")[0] for call, layer in integer_layers(net).items() if layer.saturates
    }


@pytest.mark.parametrize("ranges", ["minmax", "mse", "learned"])
def test_no_layer_saturates_by_default(ranges):
    assert saturating(quantized(weight_ranges=ranges, positive=True)) == set()
    without = quantized(weight_ranges=ranges, positive=True, avoid_saturation=False)
    assert saturating(without) == {"stem", "grouped", "up", "head"}


@pytest.mark.parametrize("ranges", ["mse", "learned"])
def test_nor_when_weights_have_grown_since(ranges):
    net = quantized(weight_ranges=ranges)
    with torch.no_grad():
        for name in ("stem", "grouped", "up", "head"):
            getattr(net, name).weight.abs_().mul_(3)
    assert saturating(net) == set()
    expected = integer_layers(net)["head:linear:0"].weight
    assert torch.equal(net.quantization.weight("head.weight")(net.head.weight), expected)


def test_with_fewer_bits_nothing_changes():
    for bits in ({"weight_bits": 7}, {"activation_bits": 7}, {"activation_bits": None}):
        with_it, without = (quantized(avoid_saturation=a, **bits) for a in (True, False))
        assert torch.equal(with_it(IMAGES), without(IMAGES))
        assert saturating(with_it) == set()


def test_the_choice_is_in_the_record_and_older_records_have_none():
    net = quantized(positive=True)
    record = quantization_record(net)
    assert record["scheme"]["avoid_saturation"] is True
    older = copy.deepcopy(record)
    del older["scheme"]["avoid_saturation"]
    state = net.state_dict()
    attach(net, older)
    net.load_state_dict(state)
    assert saturating(net) == {"stem", "grouped", "up", "head"}
    attach(net, record)
    net.load_state_dict(state)
    assert saturating(net) == set()


def test_a_wrong_choice_is_refused():
    with pytest.raises(ValueError, match="avoid_saturation is 'no'; give true or false"):
        QuantizationScheme(avoid_saturation="no")


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_adaptive_rounding_keeps_to_it(ranges):
    net = quantized(weight_ranges=ranges)
    before = {n: q.step_for(net.get_parameter(n)).clone() for n, q in weights_of(net)}
    round_adaptively(net, lambda n, x: n(x), [IMAGES], num_iterations=40, num_samples=200)
    assert saturating(net) == set()
    for name, quantizer in weights_of(net):
        weight = net.get_parameter(name)
        assert torch.allclose(quantizer.step_for(weight), before[name], rtol=1e-4)
        # What was written are whole steps, but for the pair that a scale follows.
        steps = weight / before[name].reshape([-1 if i == (quantizer.axis or 0) else 1
                                               for i in range(weight.dim())])  # fmt: skip
        if ranges == "mse" and name not in ("up.weight",):
            assert torch.allclose(steps, steps.round(), atol=1e-3)


def weights_of(net):
    names = dict.fromkeys(net.quantization.placement.weights.values())
    return [(name, net.quantization.weight(name)) for name in names]


def test_biases_are_whole_multiples_in_evaluation_and_gradients_pass():
    net = quantized()
    x = IMAGES.clone()
    step = net.quantization.weight("head.weight").step_for(net.head.weight)
    name = net.quantization.placement.layer_inputs["head:linear:0"]
    step = step * net.quantization.activation(name).step
    with torch.no_grad():
        net.head.bias.add_(0.4 * step)
    before = net(x)
    with torch.no_grad():
        net.head.bias.copy_(torch.round(net.head.bias / step) * step)
    assert torch.allclose(net(x), before, atol=1e-7)
    net(x).sum().backward()
    assert torch.allclose(net.head.bias.grad, torch.full((5,), 6.0))

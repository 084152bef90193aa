"""Tensors on their grids, and the state that says where these are."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_compress.compress.quantization.affine import Grid
from lit_compress.compress.quantization.quantizers import (
    ActivationQuantizer,
    DynamicQuantizer,
    WeightQuantizer,
)

SEEDS = st.integers(0, 10_000)
UNSIGNED, SIGNED = Grid(8, signed=False), Grid(8, signed=True)


def activation(bits: int = 8, *, learned: bool = False, momentum: float = 0.5):
    quantizer = ActivationQuantizer(Grid(bits, signed=False), learned, momentum)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(3.0))
    quantizer.quantizing = True
    return quantizer


def weights(seed: int = 0, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (6, 4, 3, 3), generator=generator)


# --- Activations ----------------------------------------------------------------------------------


def test_a_fresh_one_does_nothing_and_knows_nothing():
    quantizer, x = ActivationQuantizer(UNSIGNED), torch.randn(4)
    assert quantizer(x) is x
    assert not quantizer.ready
    assert torch.equal(quantizer(x), x)


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(2, 8))
def test_activations_lie_on_a_grid_of_so_many_values_within_the_range(seed, bits):
    quantizer = activation(bits)
    x = weights(seed, 500) * 2
    y = quantizer(x)
    assert len(y.unique()) <= 2**bits
    inside = (x > -1) & (x < 3)
    assert (y - x)[inside].abs().max() <= float(quantizer.scale) * 0.500001 + 1e-6
    assert y.min() >= -1 - quantizer.scale
    assert y.max() <= 3 + quantizer.scale
    assert torch.equal(quantizer(y), y)
    assert torch.equal(quantizer(torch.zeros(3)), torch.zeros(3))


def test_what_holds_no_real_numbers_passes():
    quantizer = activation()
    quantizer.observing = True
    for x in (torch.arange(3), torch.tensor([True]), torch.zeros(0)):
        assert quantizer(x) is x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(dtype):
    y = activation()(torch.randn(9, dtype=dtype))
    assert y.dtype == dtype
    assert DynamicQuantizer(UNSIGNED)(torch.randn(9, dtype=dtype)).dtype == dtype


def test_ranges_are_a_moving_average_from_the_first_batch_on():
    quantizer = ActivationQuantizer(UNSIGNED, momentum=0.25)
    quantizer.observing = True
    quantizer(torch.tensor([-2.0, 4.0]))
    assert (float(quantizer.low), float(quantizer.high)) == (-2.0, 4.0)
    assert quantizer.ready
    quantizer(torch.tensor([-6.0, 2.0]))
    assert (float(quantizer.low), float(quantizer.high)) == (-3.0, 3.5)
    assert math.isclose(float(quantizer.scale), 6.5 / 255, rel_tol=1e-6)
    assert int(quantizer.zero_point) == round(3 / (6.5 / 255))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_batches_with_values_that_are_no_numbers_are_left_out(bad):
    quantizer = ActivationQuantizer(UNSIGNED, momentum=0.5)
    quantizer.observing = quantizer.quantizing = True
    quantizer(torch.tensor([1.0, bad]))
    assert not quantizer.ready
    assert int(quantizer.zero_point) == 0
    quantizer(torch.tensor([-1.0, 1.0]))
    known = copy.deepcopy(quantizer.state_dict())
    quantizer(torch.tensor([7.0, bad]))
    assert all(torch.equal(known[k], v) for k, v in quantizer.state_dict().items())
    assert quantizer.ready


def test_ranges_do_not_move_in_evaluation_nor_where_learned():
    for quantizer in (activation().eval(), activation(learned=True)):
        quantizer.observing = True
        before = copy.deepcopy(quantizer.state_dict())
        quantizer(torch.tensor([-50.0, 50.0]))
        assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())


def test_ranges_that_are_no_numbers_are_refused():
    quantizer = activation()
    before = quantizer.scale.clone()
    with pytest.raises(ValueError, match="range to quantize is nan to 1.0"):
        quantizer.set_range(torch.tensor(math.nan), torch.tensor(1.0))
    assert torch.equal(quantizer.scale, before)


def test_learned_scales_stay_positive_where_training_made_them_negative():
    quantizer = activation(learned=True)
    assert isinstance(quantizer.scale, nn.Parameter)
    quantizer.set_scale(torch.tensor(-1.0))
    assert quantizer.step > 0
    assert torch.isfinite(quantizer(torch.randn(5))).all()
    assert torch.equal(activation().step, activation().scale)


def test_gradients_pass_inside_and_end_outside():
    for learned in (False, True):
        x = torch.tensor([-5.0, 0.3, 2.0, 9.0], requires_grad=True)
        quantizer = activation(learned=learned)
        quantizer(x).sum().backward()
        assert x.grad.tolist() == [0, 1, 1, 0]
        assert (quantizer.scale.grad is not None) == learned


def test_dynamic_ranges_are_those_of_the_batch():
    quantizer, x = DynamicQuantizer(UNSIGNED), torch.tensor([-1.0, 0.111, 0.777, 4.1])
    assert quantizer.ready
    assert quantizer(x) is x
    quantizer.quantizing = True
    for factor in (1.0, 100.0):
        error = (quantizer(x * factor) - x * factor).abs().max()
        assert 0 < error <= 0.51 * 5.1 / 255 * factor
    assert not list(quantizer.parameters())


# --- Weights --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(2, 8), st.booleans())
def test_weights_use_the_whole_grid_of_each_channel(seed, bits, whole):
    weight = weights(seed)
    quantizer = WeightQuantizer(Grid(bits, signed=True), None if whole else 6)
    assert quantizer(weight) is weight
    quantizer.quantizing = True
    rounded = quantizer(weight)
    steps = rounded / quantizer.scale.reshape(-1, *[1] * (0 if whole else 3))
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    largest = steps.abs().flatten(0 if whole else 1).amax(-1)
    assert torch.allclose(largest, torch.full_like(largest, 2 ** (bits - 1) - 1))
    assert torch.equal(quantizer(-weight), -rounded)


def test_the_axis_is_that_of_output_channels():
    weight = weights(0, 4, 6, 3, 3) * torch.arange(1.0, 7).reshape(1, -1, 1, 1)
    quantizer = WeightQuantizer(SIGNED, 6, axis=1)
    quantizer.follow(weight)
    expected = weight.abs().amax((0, 2, 3)) / 127
    assert torch.allclose(quantizer.scale, expected)


def test_channels_of_zeros_and_next_to_zero_stay_what_they_are():
    weight = weights()
    weight[0], weight[1] = 0, 1e-40
    quantizer = WeightQuantizer(SIGNED, 6)
    quantizer.quantizing = True
    rounded = quantizer(weight)
    assert (rounded[0] == 0).all()
    assert rounded[1].abs().max() <= 1e-39
    assert torch.isfinite(rounded).all()


def test_scales_follow_weights_only_with_minmax():
    for ranges, follows in (("minmax", True), ("mse", False), ("learned", False)):
        quantizer = WeightQuantizer(SIGNED, 6, ranges=ranges)
        quantizer.quantizing = True
        quantizer.set_scale(torch.full((6,), 0.01))
        quantizer(weights())
        assert torch.equal(quantizer.scale, torch.full((6,), 0.01)) == (not follows)
        assert isinstance(quantizer.scale, nn.Parameter) == (ranges == "learned")


@pytest.mark.parametrize("ranges", ["minmax", "mse", "learned"])
def test_bits_change_and_the_range_stays(ranges):
    quantizer = WeightQuantizer(SIGNED, 6, ranges=ranges)
    quantizer.follow(weights())
    reach = quantizer.scale.detach() * 127
    quantizer.set_bits(4)
    assert quantizer.grid == Grid(4, signed=True)
    assert torch.allclose(quantizer.scale * 7, reach)
    quantizer.set_bits(8)
    assert torch.allclose(quantizer.scale * 127, reach)
    with pytest.raises(ValueError, match="bits is 9; expected 2 to 8"):
        quantizer.set_bits(9)
    assert quantizer.grid == SIGNED


def test_gradients_reach_weights_and_learned_scales():
    for ranges in ("minmax", "learned"):
        weight = weights().requires_grad_()
        quantizer = WeightQuantizer(Grid(3, signed=True), 6, ranges=ranges)
        quantizer.quantizing = True
        quantizer.follow(weight)
        quantizer(weight).square().sum().backward()
        assert weight.grad.abs().sum() > 0
        assert ranges == "minmax" or quantizer.scale.grad.abs().min() > 0


# --- State ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_casts_of_the_network_do_not_reach_scales(learned, dtype):
    quantizer = activation(learned=learned)
    quantizer.set_scale(torch.tensor(0.012345678), torch.tensor(77))
    network = nn.Sequential(nn.Linear(2, 2), quantizer)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    if learned:
        quantizer.scale.grad = torch.tensor(0.5)
    network.to(dtype)
    assert network[0].weight.dtype == dtype
    for name, value in quantizer.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert isinstance(quantizer.scale, nn.Parameter) == learned
    assert not learned or quantizer.scale.grad.dtype == torch.float32
    network.half().bfloat16().float()
    assert torch.equal(quantizer.scale, before["scale"])
    assert network.to("meta")[1].scale.device.type == "meta"


def test_state_makes_the_same_quantizer_again():
    for old, new in (
        (activation(4), ActivationQuantizer(Grid(4, signed=False))),
        (WeightQuantizer(SIGNED, 6), WeightQuantizer(SIGNED, 6)),
    ):
        if isinstance(old, WeightQuantizer):
            old.follow(weights())
        new.load_state_dict(old.state_dict())
        assert torch.equal(new.scale, old.scale)
        assert torch.equal(new.zero_point, old.zero_point)
        assert new.zero_point.dtype == torch.int32


def test_they_say_what_they_are():
    assert repr(activation(4)) == "ActivationQuantizer(bits=4, signed=False, observed)"
    assert "learned" in repr(activation(learned=True))
    assert repr(WeightQuantizer(SIGNED, 6)) == "WeightQuantizer(bits=8, ranges=minmax, axis=0)"


def test_the_range_of_an_output_holds_all_values_ever_seen():
    quantizer = ActivationQuantizer(Grid(8, signed=False), extremes=True)
    quantizer.observing = True
    for low, high in ((-1.0, 2.0), (-3.0, 1.0), (-0.5, 0.5)):
        quantizer.train()(torch.tensor([low, 0.0, high]))
    assert (float(quantizer.low), float(quantizer.high)) == (-3, 2)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.compress.quantization.affine import (
    Grid,
    affine_parameters,
    dequantize,
    fake_quantize,
    learned_fake_quantize,
    quantize,
)

quick = settings(deadline=None, max_examples=40)
all_bits = st.integers(2, 8)
grids = st.builds(Grid, all_bits, st.booleans())
signed_grids = st.builds(Grid, all_bits, st.just(True))
ends = st.floats(-1e4, 1e4, width=32)
ranges = st.tuples(ends, ends).filter(lambda pair: abs(pair[0] - pair[1]) > 1e-3).map(sorted)
seeds = st.integers(0, 2**16)


def values(seed, *shape, spread=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def parameters(low, high, grid):
    return affine_parameters(torch.tensor(low), torch.tensor(high), grid)


def channel_parameters(x, grid, axis):
    rows = x.movedim(axis, 0).flatten(1) * 0.8  # so that some values are clipped
    return affine_parameters(rows.amin(1), rows.amax(1), grid)


@pytest.mark.parametrize(
    ("grid", "low", "high"),
    [
        (Grid(8, signed=True), -127, 127),
        (Grid(8, signed=False), 0, 255),
        (Grid(2, signed=True), -1, 1),
        (Grid(2, signed=False), 0, 3),
    ],
)
def test_ends_of_grids(grid, low, high):
    assert (grid.low, grid.high) == (low, high)


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_grids_refuse_bits_that_no_runtime_has(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}; expected 2 to 8"):
        Grid(bits, signed=True)


@pytest.mark.parametrize("bits", [8.0, "8", True, None])
def test_grids_refuse_bits_that_are_no_whole_number(bits):
    with pytest.raises(ValueError, match="give a whole number from 2 to 8"):
        Grid(bits, signed=True)


@quick
@given(ranges, grids)
def test_zero_is_exactly_an_integer(low_high, grid):
    scale, zero_point = parameters(*low_high, grid)
    zero = torch.zeros(3)
    assert grid.low <= int(zero_point) <= grid.high
    assert dequantize(zero_point, scale, zero_point) == 0
    assert torch.equal(fake_quantize(zero, scale, zero_point, grid), zero)
    if grid.signed:
        assert int(zero_point) == 0


@quick
@given(ranges, grids)
def test_values_within_the_range_move_by_half_a_step_at_most(low_high, grid):
    low, high = min(low_high[0], 0.0), max(low_high[1], 0.0)
    scale, zero_point = parameters(*low_high, grid)
    x = torch.linspace(low, high, 301)
    back = dequantize(quantize(x, scale, zero_point, grid), scale, zero_point)
    assert float((back - x).abs().max()) <= float(scale) * (0.5 + 1e-4)


@quick
@given(ranges, grids)
def test_the_range_takes_all_of_the_grid(low_high, grid):
    low, high = min(low_high[0], 0.0), max(low_high[1], 0.0)
    scale, _ = parameters(*low_high, grid)
    width = 2 * max(-low, high) if grid.signed else high - low
    assert float(scale) * (grid.high - grid.low) == pytest.approx(width, rel=1e-5)


@pytest.mark.parametrize("grid", [Grid(8, signed=True), Grid(8, signed=False)])
@pytest.mark.parametrize("end", [0.0, 1e-44])
def test_an_empty_range_has_scale_one(grid, end):
    scale, zero_point = parameters(-end, end, grid)
    assert float(scale) == 1.0
    assert int(zero_point) == 0


@pytest.mark.parametrize("grid", [Grid(8, signed=True), Grid(8, signed=False)])
def test_the_widest_range_of_float32_has_a_finite_scale(grid):
    largest = torch.finfo(torch.float32).max
    scale, zero_point = parameters(-largest, largest, grid)
    assert math.isfinite(float(scale))
    x = torch.tensor([-largest, 0.0, largest]) / 2
    torch.testing.assert_close(fake_quantize(x, scale, zero_point, grid), x, rtol=0.01, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ranges_that_are_no_numbers_are_refused(bad):
    low, high = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, bad])
    with pytest.raises(ValueError, match=rf"-2.0 to {bad}; the values are NaN or infinite"):
        affine_parameters(low, high, Grid(8, signed=False))


@quick
@given(seeds, ranges, grids, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_faked_is_quantized_and_back(seed, low_high, grid, dtype):
    scale, zero_point = parameters(*low_high, grid)
    # Multiples of half a step are where ways of rounding differ.
    x = (values(seed, 500, spread=float(scale) * grid.high) / scale * 2).round() / 2 * scale
    x = x.to(dtype)
    integers = quantize(x, scale, zero_point, grid)
    assert integers.dtype == torch.int32
    assert int(integers.min()) >= grid.low
    assert int(integers.max()) <= grid.high
    expected = dequantize(integers, scale, zero_point).to(dtype)
    assert torch.equal(fake_quantize(x, scale, zero_point, grid), expected)
    assert torch.equal(learned_fake_quantize(x, scale, zero_point, grid), expected)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@quick
@given(seeds, grids)
def test_channels_are_quantized_each_by_itself(axis, seed, grid):
    x = values(seed, 4, 3, 5)
    scale, zero_point = channel_parameters(x, grid, axis)
    whole = fake_quantize(x, scale, zero_point, grid, axis)
    for channel in range(x.shape[axis]):
        alone = fake_quantize(x.select(axis, channel), scale[channel], zero_point[channel], grid)
        assert torch.equal(whole.select(axis, channel), alone)
    integers = quantize(x, scale, zero_point, grid, axis)
    assert torch.equal(dequantize(integers, scale, zero_point, axis), whole)
    assert torch.equal(learned_fake_quantize(x, scale, zero_point, grid, axis), whole)


@quick
@given(seeds, grids)
def test_what_lies_on_the_grid_stays(seed, grid):
    x = values(seed, 4, 50)
    scale, zero_point = channel_parameters(x, grid, 0)
    once = fake_quantize(x, scale, zero_point, grid, 0)
    assert torch.equal(fake_quantize(once, scale, zero_point, grid, 0), once)


@quick
@given(seeds, signed_grids, st.lists(st.integers(-6, 6), min_size=4, max_size=4))
def test_scaling_and_flipping_channels_commutes_with_a_signed_grid(seed, grid, exponents):
    # What folding a batch norm into a convolution does to its channels; powers of two are exact.
    factor = torch.tensor([2.0**e * (-1) ** e for e in exponents])[:, None]
    x = values(seed, 4, 50)
    scale, zero_point = channel_parameters(x, grid, 0)
    new_scale, new_zero_point = channel_parameters(x * factor, grid, 0)
    assert torch.equal(new_scale, scale * factor[:, 0].abs())
    after = fake_quantize(x * factor, new_scale, new_zero_point, grid, 0)
    assert torch.equal(after, fake_quantize(x, scale, zero_point, grid, 0) * factor)


@pytest.mark.parametrize("axis", [None, 0])
@quick
@given(seeds, grids)
def test_straight_through_where_not_clipped(axis, seed, grid):
    x = values(seed, 3, 40, spread=3.0).requires_grad_()
    scale, zero_point = (
        parameters(-1.0, 2.0, grid) if axis is None else channel_parameters(x.detach(), grid, 0)
    )
    upstream = values(seed + 1, 3, 40)
    fake_quantize(x, scale, zero_point, grid, axis).backward(upstream)
    wide = scale if axis is None else scale[:, None]
    zero = zero_point if axis is None else zero_point[:, None]
    unclipped = torch.round(x.detach() * (1 / wide)) + zero
    inside = (unclipped >= grid.low) & (unclipped <= grid.high)
    assert torch.equal(x.grad, upstream * inside)


def test_some_values_of_the_test_above_are_clipped_and_some_are_not():
    x = values(0, 3, 40, spread=3.0)
    inside = (x > -1.0) & (x < 2.0)
    assert inside.any()
    assert not inside.all()


def paper_gradient(x, scale, zero_point, grid):
    """Esser et al. 2020, equation 3, with the ends of the grid seen from its zero point."""
    low, high = grid.low - zero_point, grid.high - zero_point
    v = x / scale
    within = torch.round(v) - v
    return torch.where(v <= low, low, torch.where(v >= high, high, within))


@quick
@given(seeds, grids)
def test_learned_scales_have_the_gradient_of_the_paper(seed, grid):
    x = values(seed, 6, 50, spread=3.0)
    scale, zero_point = parameters(-1.5, 2.0, grid)
    scale.requires_grad_()
    upstream = values(seed + 1, 6, 50)
    learned_fake_quantize(x, scale, zero_point, grid).backward(upstream)
    each = paper_gradient(x, scale.detach(), zero_point, grid) * upstream
    expected = each.double().sum() / math.sqrt(x.numel() * grid.high)
    assert float(scale.grad) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


@quick
@given(seeds, grids)
def test_learned_scales_have_the_slope_of_the_surrogate(seed, grid):
    # Rounding taken for the addition of a constant, the result is a smooth function of the scale.
    x = values(seed, 200, spread=3.0).double()
    scale, zero_point = parameters(-1.5, 2.0, grid)
    low, high = float(grid.low - zero_point), float(grid.high - zero_point)
    clipped = (x / scale.double()).clamp(low, high)
    added = torch.round(clipped) - clipped

    def surrogate(s):
        return float((((x / s).clamp(low, high) + added) * s).sum())

    step = 1e-6 * float(scale)
    slope = (surrogate(scale.double() + step) - surrogate(scale.double() - step)) / (2 * step)
    scale.requires_grad_()
    learned_fake_quantize(x.float(), scale, zero_point, grid).sum().backward()
    unscaled = float(scale.grad) * math.sqrt(x.numel() * grid.high)
    assert unscaled == pytest.approx(slope, rel=1e-3, abs=0.05)


@quick
@given(seeds, grids)
def test_gradients_pass_learned_scales_between_the_outermost_integers(seed, grid):
    x = values(seed, 5, 40, spread=3.0).requires_grad_()
    scale, zero_point = parameters(-1.5, 2.0, grid)
    upstream = values(seed + 1, 5, 40)
    learned_fake_quantize(x, scale, zero_point, grid).backward(upstream)
    v = x.detach() / scale + zero_point
    assert torch.equal(x.grad, upstream * ((v > grid.low) & (v < grid.high)))


@pytest.mark.parametrize("axis", [0, 1, -1])
@quick
@given(seeds, signed_grids)
def test_each_channel_has_its_own_learned_scale(axis, seed, grid):
    x = values(seed, 3, 4, 6)
    scale, zero_point = channel_parameters(x, grid, axis)
    scale.requires_grad_()
    learned_fake_quantize(x, scale, zero_point, grid, axis).square().sum().backward()
    for channel in range(x.shape[axis]):
        alone = scale[channel].detach().clone().requires_grad_()
        part = x.select(axis, channel)
        learned_fake_quantize(part, alone, zero_point[channel], grid).square().sum().backward()
        assert float(scale.grad[channel]) == pytest.approx(float(alone.grad), rel=1e-4, abs=1e-5)


def test_one_dimension_can_be_channels():
    x = torch.tensor([0.3, -0.9])
    scale = torch.tensor([0.1, 0.5], requires_grad=True)
    y = learned_fake_quantize(x, scale, torch.zeros(2, dtype=torch.int32), Grid(4, True), 0)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([0.3, -1.0]))
    torch.testing.assert_close(scale.grad, torch.tensor([0.0, -0.2]) / math.sqrt(7))


def test_a_learned_scale_finds_the_least_error():
    # Gaussian weights, 3 integers: 1.22 standard deviations by exhaustive search.
    x = values(0, 4000, spread=1.0)
    scale = torch.tensor(3.0, requires_grad=True)
    optimizer = torch.optim.Adam([scale], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        y = learned_fake_quantize(x, scale, torch.tensor(0, dtype=torch.int32), Grid(2, True))
        (y - x).square().mean().backward()
        optimizer.step()
    assert scale.item() == pytest.approx(1.22, abs=0.12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("function", [fake_quantize, learned_fake_quantize])
def test_the_dtype_stays(function, dtype):
    x = values(0, 20).to(dtype).requires_grad_()
    scale, zero_point = parameters(-1.0, 1.0, Grid(8, signed=False))
    y = function(x, scale, zero_point, Grid(8, signed=False))
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad.dtype == dtype

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.compress.quantization.affine import Grid, affine_parameters, fake_quantize
from lit_compress.compress.quantization.histogram import (
    entropy_range,
    mse_range,
    percentile_range,
    squared_error,
)
from lit_compress.compress.quantization.ranges import (
    HistogramRange,
    MinMaxRange,
    MovingAverageRange,
    range_observer,
)
from lit_compress.compress.quantization.weight_scales import mse_weight_scale

KINDS = ["minmax", "moving_average", "histogram", "percentile", "mse"]
UNSIGNED, SIGNED = Grid(8, signed=False), Grid(8, signed=True)

quick = settings(deadline=None, max_examples=40)
few = settings(deadline=None, max_examples=15)
grids = st.builds(Grid, st.integers(2, 8), st.booleans())
seeds = st.integers(0, 2**16)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
batches = st.lists(st.lists(floats, min_size=1, max_size=20), min_size=1, max_size=5)
positive = st.floats(2.0**-30, 2.0**40, width=32)
alike = st.one_of(st.just(0.0), positive, positive.map(lambda x: -x))
alike_batches = st.lists(st.lists(alike, min_size=1, max_size=20), min_size=1, max_size=5)
histograms = st.tuples(
    st.lists(st.integers(0, 1000), min_size=2, max_size=120).filter(any),
    st.floats(-50, 50),
    st.floats(0.1, 100),
).map(lambda drawn: (torch.tensor(drawn[0]), drawn[1], drawn[1] + drawn[2]))


def values(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(seed, number=20_000):
    return values(seed, number) ** 3


def observed(observer, *tensors):
    for x in tensors:
        observer.observe(x)
    return observer


def actual_error(x, low, high, grid):
    scale, zero_point = affine_parameters(torch.as_tensor(low), torch.as_tensor(high), grid)
    return float((fake_quantize(x, scale, zero_point, grid) - x).square().mean())


def ends(observer):
    return tuple(float(end) for end in observer.range())


# --- what all observers have in common


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_scalars_of_float32(kind):
    observer = observed(range_observer(kind, UNSIGNED), values(0, 3, 4, 5).bfloat16())
    for end in observer.range():
        assert end.dtype == torch.float32
        assert end.shape == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_count_as_float32_in_every_dtype(kind, dtype):
    x = values(0, 1000).to(dtype)
    narrow = observed(range_observer(kind, UNSIGNED), x)
    wide = observed(range_observer(kind, UNSIGNED), x.float())
    assert ends(narrow) == ends(wide)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen_is_no_range(kind):
    observer = range_observer(kind, UNSIGNED)
    observer.observe(torch.empty(0, 3))
    assert not observer.seen
    with pytest.raises(ValueError, match="no values were observed; run at least one batch"):
        observer.range()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused_and_leave_no_trace(kind, bad):
    observer = observed(range_observer(kind, UNSIGNED), values(0, 100))
    before = copy.deepcopy(observer.state_dict())
    with pytest.raises(ValueError, match="which are NaN or infinite. Look at the input data"):
        observer.observe(torch.tensor([0.0, bad, 1.0]))
    for name, tensor in observer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_refused(kind):
    with pytest.raises(ValueError, match="torch.int64 came to be observed; expected floating"):
        range_observer(kind, UNSIGNED).observe(torch.arange(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_observer_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    first, second = heavy_tailed(0), heavy_tailed(1) * 3
    straight = observed(range_observer(kind, UNSIGNED), first)
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    resumed = range_observer(kind, UNSIGNED)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.seen
    assert ends(resumed) == ends(straight)
    assert ends(observed(resumed, second)) == ends(observed(straight, second))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_goes_its_own_way(kind):
    observer = observed(range_observer(kind, UNSIGNED), heavy_tailed(0))
    before = ends(observer)
    twin = observed(copy.deepcopy(observer), heavy_tailed(1) * 100)
    assert ends(observer) == before
    assert ends(twin) != before


@pytest.mark.parametrize("kind", KINDS)
def test_casting_the_network_leaves_the_range_in_float32(kind):
    network = nn.Sequential(nn.Linear(2, 2), observed(range_observer(kind, UNSIGNED), values(0, 9)))
    before = ends(network[1])
    network.to(torch.bfloat16)
    assert network[0].weight.dtype == torch.bfloat16
    assert ends(network[1]) == before
    network.half().double()
    assert ends(network[1]) == before


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen_under_inference_mode_can_be_added_to(kind):
    observer = range_observer(kind, UNSIGNED)
    with torch.inference_mode():
        observer.observe(values(0, 100))
    observed(observer, values(1, 100).requires_grad_() * 2)
    low, high = observer.range()
    assert low < high
    assert not low.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_alone_are_an_empty_range(kind):
    assert ends(observed(range_observer(kind, UNSIGNED), torch.zeros(50))) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(batches)
def test_no_range_goes_beyond_what_was_seen(kind, lists):
    observer = observed(range_observer(kind, UNSIGNED), *map(torch.tensor, lists))
    low, high = ends(observer)
    everything = [0.0, *(value for batch in lists for value in batch)]
    assert min(everything) <= low <= high <= max(everything)


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="range kind is 'entropy'; expected one of minmax, moving"):
        range_observer("entropy", UNSIGNED)


@pytest.mark.parametrize("percentile", [50, 100.1, -1, math.nan, "99", True])
def test_percentiles_out_of_range_are_refused(percentile):
    with pytest.raises(ValueError, match="expected a number above 50 and up to 100"):
        range_observer("percentile", UNSIGNED, percentile=percentile)


def test_what_is_no_grid_is_refused():
    with pytest.raises(ValueError, match="grid is 8; expected a Grid, as in"):
        range_observer("mse", 8)


def test_unknown_objectives_are_refused():
    with pytest.raises(ValueError, match="objective is 'kl'; expected one of entropy, perc"):
        HistogramRange(UNSIGNED, "kl")


@pytest.mark.parametrize("momentum", [0, 1.5, math.nan, "0.1", True])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match="expected a number above 0 and up to 1"):
        MovingAverageRange(momentum)


# --- least and largest values, and their averages


@quick
@given(batches)
def test_minmax_is_the_range_of_everything(lists):
    observer = observed(MinMaxRange(), *map(torch.tensor, lists))
    assert ends(observer) == (min(map(min, lists)), max(map(max, lists)))


@quick
@given(seeds, st.floats(0.01, 1.0))
def test_moving_averages_follow_their_formula(seed, momentum):
    tensors = values(seed, 6, 30)
    low, high = float(tensors[0].min()), float(tensors[0].max())
    for x in tensors[1:]:
        low = (1 - momentum) * low + momentum * float(x.min())
        high = (1 - momentum) * high + momentum * float(x.max())
    observer = observed(MovingAverageRange(momentum), *tensors)
    assert ends(observer) == pytest.approx((low, high), rel=1e-5)


# --- counting


@quick
@given(batches)
def test_growing_loses_no_count(lists):
    observer = HistogramRange(UNSIGNED)
    for number, batch in enumerate(lists, start=1):
        observer.observe(torch.tensor(batch))
        assert int(observer.counts.sum()) == sum(map(len, lists[:number]))


def test_zeros_first_cost_no_resolution():
    tensors = (torch.zeros(3), torch.tensor([0.125]))
    zeros_first = observed(HistogramRange(UNSIGNED), *tensors)
    at_once = observed(HistogramRange(UNSIGNED), torch.cat(tensors))
    assert torch.equal(zeros_first.counts, at_once.counts)


@quick
@given(alike_batches)
def test_growing_forgets_batches_and_order(lists):
    tensors = [torch.tensor(batch) for batch in lists]
    grown = observed(HistogramRange(UNSIGNED), *tensors)
    backwards = observed(HistogramRange(UNSIGNED), *reversed(tensors))
    at_once = observed(HistogramRange(UNSIGNED), torch.cat(tensors))
    for name in ("counts", "first", "exponent", "low", "high"):
        assert torch.equal(getattr(grown, name), getattr(at_once, name)), name
        assert torch.equal(getattr(grown, name), getattr(backwards, name)), name


@quick
@given(seeds, st.floats(-20, 20), st.floats(0.01, 1000))
def test_every_value_is_counted_in_its_bin(seed, shift, spread):
    x = values(seed, 300) * spread + shift
    observer = observed(HistogramRange(UNSIGNED), x[:100], x[100:])
    width = 2.0 ** int(observer.exponent)
    expected = [0] * 2048
    for value in x.tolist():
        expected[math.floor(value / width) - int(observer.first)] += 1
    assert observer.counts.tolist() == expected


@quick
@given(seeds, st.floats(-20, 20), st.floats(0.01, 1000))
def test_more_than_half_of_the_bins_are_in_use(seed, shift, spread):
    observer = observed(HistogramRange(UNSIGNED), values(seed, 300) * spread + shift)
    low, high = min(float(observer.low), 0.0), max(float(observer.high), 0.0)
    assert 1023 <= (high - low) / 2.0 ** int(observer.exponent) <= 2048


def test_values_of_many_parts_are_all_counted():
    x = values(0, 5, 2**17 // 4 + 3)
    observer = observed(HistogramRange(UNSIGNED), x[:, ::2], x[:, 1::2])
    assert int(observer.counts.sum()) == x.numel()


# --- percentiles


@quick
@given(alike_batches)
def test_the_hundredth_percentile_is_minmax(lists):
    tensors = [torch.tensor(batch) for batch in lists]
    observer = observed(range_observer("percentile", UNSIGNED, percentile=100), *tensors)
    assert ends(observer) == ends(observed(MinMaxRange(), *tensors))


@quick
@given(seeds, st.floats(60, 99.9))
def test_percentiles_are_those_of_the_values(seed, percentile):
    x = values(seed, 4000) * 3 + 1
    low, high = ends(observed(HistogramRange(UNSIGNED, "percentile", percentile=percentile), x))
    assert float((x <= high).double().mean()) == pytest.approx(percentile / 100, abs=5e-3)
    assert float((x >= low).double().mean()) == pytest.approx(percentile / 100, abs=5e-3)


def test_a_percentile_divides_its_bin():
    low, high = percentile_range(torch.tensor([0, 4, 4, 0]), -4.0, 4.0, 75)
    assert (low, high) == (-1.0, 1.0)
    assert percentile_range(torch.tensor([0, 4, 4, 0]), -4.0, 4.0, 100) == (-2.0, 2.0)


# --- least squares


@quick
@given(histograms, grids)
def test_the_expected_error_is_that_of_evenly_spread_values(histogram, grid):
    counts, low, high = histogram
    per_bin = 200
    width = (high - low) / len(counts)
    offsets = (torch.arange(per_bin, dtype=torch.float64) + 0.5) / per_bin
    x = low + width * (torch.arange(len(counts))[:, None] + offsets)
    range_low, range_high = torch.tensor([low, low / 2]), torch.tensor([high, high / 3])
    errors = squared_error(counts, low, high, grid, range_low, range_high)
    for error, one, other in zip(errors, range_low, range_high, strict=True):
        scale, zero_point = affine_parameters(one, other, grid)
        rounded = torch.round(x / scale.double()) + zero_point
        rounded = (rounded.clamp(grid.low, grid.high) - zero_point) * scale.double()
        sampled = ((rounded - x).square().mean(1) * counts).sum() / counts.sum()
        assert float(error) == pytest.approx(float(sampled), rel=0.02, abs=(width / per_bin) ** 2)


@few
@given(histograms, grids)
def test_least_squares_are_never_worse_than_all_of_the_histogram(histogram, grid):
    counts, low, high = histogram
    best_low, best_high = mse_range(counts, low, high, grid)
    assert best_low <= 0 <= best_high
    filled = torch.nonzero(counts).flatten()
    width = (high - low) / len(counts)
    whole = (low + int(filled[0]) * width, low + (int(filled[-1]) + 1) * width)
    lows, highs = torch.tensor([best_low, whole[0]]), torch.tensor([best_high, whole[1]])
    best, widest = squared_error(counts, low, high, grid, lows, highs).tolist()
    assert best <= widest * (1 + 1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["relu", "both", "signed"])
def test_least_squares_are_as_good_as_exhaustive_search(bits, kind):
    grid = Grid(bits, signed=kind == "signed")
    x = heavy_tailed(bits, 5000)
    x = x.relu() if kind == "relu" else nn.functional.silu(x) if kind == "both" else x
    observer = observed(range_observer("mse", grid), x)
    parts = [part / 40 for part in range(1, 41)]
    other_parts = [0.0, *parts[::4]] if kind == "both" else [1.0]
    low, high = float(x.min()), float(x.max())
    exhaustive = min(
        actual_error(x, low * (part if grid.signed else other), high * part, grid)
        for part in parts
        for other in other_parts
    )
    assert actual_error(x, *observer.range(), grid) <= exhaustive * 1.03
    if bits <= 4:
        assert exhaustive < 0.8 * actual_error(x, low, high, grid)


# --- entropy


@few
@given(histograms, grids)
def test_entropy_stays_within_the_histogram(histogram, grid):
    counts, low, high = histogram
    best_low, best_high = entropy_range(counts, low, high, grid)
    assert min(low, 0.0) <= best_low <= 0 <= best_high <= max(high, 0.0) + 1e-9
    assert best_low < best_high


def test_entropy_keeps_all_of_a_uniform_distribution():
    # Where every value is as likely, clipping any of them loses more than rounding all of them.
    low, high = entropy_range(torch.full((2048,), 10), 0.0, 8.0, UNSIGNED)
    assert (low, high) == pytest.approx((0.0, 8.0), rel=0.02)


def test_entropy_leaves_out_a_few_outliers():
    # Most of 8 bits would go to values that hardly ever come.
    x = torch.cat([values(0, 50_000).abs(), torch.tensor([15.0, 16.0])])
    low, high = ends(observed(range_observer("histogram", UNSIGNED), x))
    assert low == 0
    assert 3.0 < high < 8.0


def test_zeros_do_not_draw_the_entropy():
    x = values(0, 50_000).abs()
    without = ends(observed(range_observer("histogram", UNSIGNED), x))
    with_zeros = observed(range_observer("histogram", UNSIGNED), torch.cat([x, torch.zeros(10**6)]))
    assert ends(with_zeros) == pytest.approx(without, rel=0.1)


@pytest.mark.parametrize("function", [mse_range, entropy_range])
@pytest.mark.parametrize(
    ("counts", "low", "high", "message"),
    [
        (torch.zeros(8), 0.0, 1.0, "expected values to have been counted"),
        (torch.tensor([3.0, -1.0]), 0.0, 1.0, "and no negative numbers"),
        (torch.ones(2, 2), 0.0, 1.0, r"has the shape \[2, 2\]; expected \[bins\]"),
        (torch.ones(4), 1.0, 1.0, "goes from 1.0 to 1.0; expected finite ends"),
        (torch.ones(4), 0.0, math.inf, "goes from 0.0 to inf; expected finite ends"),
    ],
)
def test_histograms_that_are_none_are_refused(function, counts, low, high, message):
    with pytest.raises(ValueError, match=message):
        function(counts, low, high, UNSIGNED)


# --- weights


def weight_errors(weight, scale, grid, axis=0):
    zero_point = torch.zeros(len(scale), dtype=torch.int32)
    rounded = fake_quantize(weight, scale, zero_point, grid, axis)
    return (rounded - weight).square().movedim(axis, 0).flatten(1).sum(1)


def greatest_scale(weight, grid, axis=0):
    return weight.abs().movedim(axis, 0).flatten(1).amax(1) / grid.high


@pytest.mark.parametrize("axis", [0, 1, -1])
@quick
@given(seeds, st.integers(2, 8))
def test_weight_scales_are_never_worse_than_the_greatest_value(axis, seed, bits):
    grid = Grid(bits, signed=True)
    weight = heavy_tailed(seed, 6 * 5 * 8).reshape(6, 5, 8)
    best = weight_errors(weight, mse_weight_scale(weight, grid, axis), grid, axis)
    widest = weight_errors(weight, greatest_scale(weight, grid, axis), grid, axis)
    assert bool((best <= widest * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_scales_are_as_good_as_exhaustive_search(bits):
    grid = Grid(bits, signed=True)
    weight = values(bits, 8, 100) * torch.arange(1, 9)[:, None]
    widest = greatest_scale(weight, grid)
    tried = [weight_errors(weight, widest * part / 500, grid) for part in range(1, 501)]
    exhaustive = torch.stack(tried).amin(0)
    best = weight_errors(weight, mse_weight_scale(weight, grid), grid)
    assert bool((best <= exhaustive * 1.06).all())
    assert float(best.sum()) <= 1.02 * float(exhaustive.sum())


def test_two_bits_gain_much_by_least_squares():
    weight, grid = values(0, 16, 300), Grid(2, signed=True)
    best = weight_errors(weight, mse_weight_scale(weight, grid), grid)
    widest = weight_errors(weight, greatest_scale(weight, grid), grid)
    assert float(best.sum()) < 0.4 * float(widest.sum())


@quick
@given(seeds, st.integers(2, 8), st.lists(st.integers(-9, 9), min_size=5, max_size=5))
def test_weight_scales_follow_their_channel(seed, bits, exponents):
    grid = Grid(bits, signed=True)
    weight = values(seed, 5, 30)
    factor = torch.tensor([2.0**e * (-1) ** e for e in exponents])
    moved = mse_weight_scale(weight * factor[:, None], grid)
    torch.testing.assert_close(moved, mse_weight_scale(weight, grid) * factor.abs())


def test_weights_on_a_grid_stay_there():
    grid = Grid(4, signed=True)
    weight = torch.arange(-7.0, 8.0).repeat(3, 1) * torch.tensor([[0.1], [1.0], [30.0]])
    torch.testing.assert_close(mse_weight_scale(weight, grid), torch.tensor([0.1, 1.0, 30.0]))


def test_one_scale_for_the_whole_weight():
    weight, grid = values(0, 4, 30), Grid(3, signed=True)
    scale = mse_weight_scale(weight, grid, axis=None)
    assert scale.shape == ()
    assert scale == mse_weight_scale(weight.reshape(1, -1), grid)[0]


def test_channels_that_do_not_fit_together_in_the_cache_are_all_scaled():
    weight, grid = values(0, 5, 2**16 + 1), Grid(2, signed=True)
    alone = torch.cat([mse_weight_scale(row[None], grid) for row in weight])
    torch.testing.assert_close(mse_weight_scale(weight, grid), alone)


def test_channels_of_zeros_have_scale_one():
    weight = torch.stack([torch.zeros(9), values(0, 9), torch.full((9,), 1e-44)])
    scale = mse_weight_scale(weight, Grid(4, signed=True))
    assert scale[[0, 2]].tolist() == [1.0, 1.0]
    assert mse_weight_scale(torch.empty(2, 0), SIGNED).tolist() == [1.0, 1.0]


def test_weight_scales_refuse_unsigned_grids():
    with pytest.raises(ValueError, match="weights are rounded to a signed grid; Grid"):
        mse_weight_scale(values(0, 2, 2), UNSIGNED)


@pytest.mark.parametrize("axis", [2, -3, True])
def test_weight_scales_refuse_dimensions_that_are_not_there(axis):
    with pytest.raises(ValueError, match=rf"axis is {axis} of a weight of shape \[2, 2\]"):
        mse_weight_scale(values(0, 2, 2), SIGNED, axis)


def test_weight_scales_refuse_nan():
    with pytest.raises(ValueError, match="which are NaN or infinite"):
        mse_weight_scale(torch.tensor([[1.0, math.nan]]), SIGNED)

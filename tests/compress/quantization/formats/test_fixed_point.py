import copy
import json
import math
import pickle
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_compress.compress.quantization.formats.fixed_point import (
    apply_fixed_point,
    quantize_fixed_point,
)
from lit_compress.compress.quantization.formats.fixed_point_grid import (
    FixedPointGrid,
    FixedPointMethod,
    fixed_point_grid,
    round_to_fixed_point,
)
from lit_compress.compress.quantization.formats.fixed_point_record import (
    FixedPoint,
    FixedPointRecord,
)

METHODS = get_args(FixedPointMethod)
methods = st.sampled_from(METHODS)
bits = st.integers(2, 32)
reals = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
tensors = st.lists(reals, min_size=1, max_size=30).map(torch.tensor)
quick = settings(deadline=None, max_examples=80)


def error_bound(grid: FixedPointGrid) -> float:
    """The largest error within the range, in absolute terms."""
    width = grid.high - grid.low
    if grid.method == "linear":
        return 2.0**-grid.fractional_bits  # half a step, a whole one at the upper end
    if grid.method == "minmax":
        return 0.5 * width / (2**grid.bits - 1)
    levels = 2 ** (grid.bits - 1) - 1
    if grid.method == "tanh":  # steps are widest at the ends
        return grid.high / 2 * (math.tanh(2) / levels) / (1 - math.tanh(2) ** 2)
    octaves = min(math.log2(grid.high / grid.low), levels - 1) if grid.high else 0.0
    least = grid.high * 2.0**-octaves
    return max(grid.high * (2 ** (octaves / max(2 * (levels - 1), 1)) - 1), least / 2)


class TestGrid:
    @quick
    @given(tensors, bits, methods, st.floats(0, 0.5))
    def test_zero_stays_zero_and_signs_do_not_change(self, x, b, method, rate):
        x = torch.cat([x, torch.zeros(1)])
        y = round_to_fixed_point(x, b, method, rate)
        assert (y[x == 0] == 0).all()
        assert (y * x >= 0).all()
        assert torch.isfinite(y).all()

    @quick
    @given(tensors, bits, methods)
    def test_rounding_keeps_the_order(self, x, b, method):
        x = x.sort().values
        assert (round_to_fixed_point(x, b, method).diff() >= 0).all()

    @quick
    @given(tensors, st.integers(2, 12), methods)
    def test_numbers_of_the_grid_stay_and_are_at_most_as_many_as_bits_allow(self, x, b, method):
        grid = fixed_point_grid(x, b, method)
        y = grid.round(x)
        torch.testing.assert_close(grid.round(y), y, rtol=1e-5, atol=0)
        end = 1.1 * x.abs().max().clamp_min(1e-3)
        many = torch.cat([torch.linspace(-1, 1, 9001) * end, torch.logspace(-6, 0, 999) * end])
        assert len(grid.round(many).unique()) <= 2**b

    @quick
    @given(tensors, st.integers(2, 31), methods)
    def test_error_is_within_a_bound_that_falls_with_the_bits(self, x, b, method):
        grid, finer = fixed_point_grid(x, b, method), fixed_point_grid(x, b + 1, method)
        slack = 4e-6 * float(x.abs().max()) + 1e-37  # of float32
        assert float((grid.round(x) - x).abs().max()) <= error_bound(grid) + slack
        assert error_bound(finer) <= error_bound(grid)

    @quick
    @given(tensors, st.integers(2, 31))
    def test_each_linear_error_falls_with_the_bits(self, x, b):
        coarse, fine = (round_to_fixed_point(x, n) - x for n in (b, b + 1))
        assert (fine.abs() <= coarse.abs()).all()

    @pytest.mark.parametrize("method", METHODS)
    def test_bits_on_a_bell_curve(self, method):
        x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
        errors = [
            float((round_to_fixed_point(x, b, method) - x).norm() / x.norm())
            for b in (2, 3, 4, 5, 6, 8, 10, 12, 16, 32)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[2] < 0.4
        assert errors[5] < 0.04
        assert errors[-2] < 1e-3
        assert errors[-1] < 1e-5

    @quick
    @given(tensors, bits, st.sampled_from(["minmax", "tanh", "linear"]), st.floats(0, 0.9))
    def test_no_more_values_overflow_than_allowed(self, x, b, method, rate):
        # Linear grids reach one step less far up than down, which can cost positive values more.
        x = -x.abs() if method == "linear" else x
        grid = fixed_point_grid(x, b, method, rate)
        assert grid.num_overflow(x) <= rate * len(x)

    def test_fractional_bits_are_those_of_the_rule(self):
        for value, at_8_bits in ((0.9, 7), (1.0, 7), (1.1, 6), (0.24, 9), (0.25, 9), (200.0, -1)):
            grid = fixed_point_grid(torch.tensor([value, -value / 3]), 8, "linear")
            assert grid.fractional_bits == at_8_bits == 7 - math.ceil(math.log2(value))

    def test_overflow_rate_leaves_outliers_out_for_finer_steps(self):
        x = torch.cat([torch.linspace(-1, 1, 999) * 0.99, torch.tensor([100.0])])
        grids = {m: fixed_point_grid(x, 8, m, 0.003) for m in METHODS}
        assert grids["linear"].fractional_bits == 7
        for grid in grids.values():
            assert grid.high < 1
            assert 1 <= grid.num_overflow(x) <= 3
        assert fixed_point_grid(x, 8, "linear").num_overflow(x) == 0

    def test_a_power_of_two_overflows_by_a_step_and_counts(self):
        x = torch.tensor([1.0, -1.0])
        grid = fixed_point_grid(x, 4, "linear")
        assert grid.round(x).tolist() == [0.875, -1.0]
        assert grid.num_overflow(x) == 1

    def test_exact_examples(self):
        x = torch.tensor([-1.0, -0.2, 0.0, 0.4, 2.0])
        assert round_to_fixed_point(x, 3, "linear").tolist() == [-1.0, 0.0, 0.0, 0.5, 1.5]
        assert round_to_fixed_point(x, 2, "minmax").tolist() == [-1.0, 0.0, 0.0, 0.0, 2.0]
        logs = round_to_fixed_point(torch.tensor([0.3, 1.1, -4.0, 0.0, 0.6, 1.5]), 3, "log")
        torch.testing.assert_close(logs, torch.tensor([0.0, 1.0, -4.0, 0.0, 1.0, 2.0]))
        tanh = round_to_fixed_point(torch.tensor([-30.0, 0.1, 30.0]), 4, "tanh")
        torch.testing.assert_close(tanh, torch.tensor([-30.0, 0.0, 30.0]))

    @pytest.mark.parametrize("method", METHODS)
    def test_empty_all_zero_and_constant_tensors(self, method):
        assert round_to_fixed_point(torch.zeros(0, 3), 8, method).shape == (0, 3)
        zero = fixed_point_grid(torch.zeros(4), 8, method)
        assert zero.round(torch.ones(2)).tolist() == [0, 0]
        assert zero.num_overflow(torch.ones(2)) == 2
        constant = torch.full((2, 2), 0.3)
        torch.testing.assert_close(
            round_to_fixed_point(constant, 8, method), constant, atol=2e-3, rtol=0
        )

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_type_and_shape_stay(self, method, dtype):
        x = torch.randn(2, 3, dtype=dtype)
        y = round_to_fixed_point(x, 8, method)
        assert (y.dtype, y.shape) == (dtype, x.shape)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("bits", [8, 24])
    def test_what_comes_later_may_be_infinite_or_nan(self, method, bits):
        grid = fixed_point_grid(torch.linspace(-3, 3, 50), bits, method)
        y = grid.round(torch.tensor([math.nan, math.inf, -math.inf, 0.0]))
        assert y[0].isnan()
        torch.testing.assert_close(y[1:].abs(), torch.tensor([3.0, 3.0, 0.0]), rtol=0.4, atol=0)

    @quick
    @given(tensors, tensors, bits, methods)
    def test_union_holds_both_ranges(self, x, z, b, method):
        a, c = fixed_point_grid(x, b, method), fixed_point_grid(z, b, method)
        both = a.union(c)
        assert both == c.union(a)
        assert both.high == max(a.high, c.high)
        if method != "linear":
            assert both.num_overflow(torch.cat([x, z])) == 0

    @pytest.mark.parametrize("bad", [1, 33, 8.0, True, "8"])
    def test_bits_are_refused(self, bad):
        with pytest.raises(ValueError, match="bits is .*a whole number from 2 to 32"):
            fixed_point_grid(torch.ones(2), bad)

    def test_other_arguments_are_refused(self):
        with pytest.raises(ValueError, match="method is 'float'.*'linear', 'minmax'"):
            fixed_point_grid(torch.ones(2), 8, "float")
        for rate in (1.0, -0.1, "0", float("nan"), True):
            with pytest.raises(ValueError, match="overflow_rate is .*a share"):
                fixed_point_grid(torch.ones(2), 8, overflow_rate=rate)
        for value in (math.nan, math.inf):
            with pytest.raises(ValueError, match="NaN or infinite"):
                fixed_point_grid(torch.tensor([0.0, value]), 8)
        for low, high in ((1.0, 2.0), (-1.0, math.inf), (math.nan, 1.0)):
            with pytest.raises(ValueError, match="the range of a 'minmax' grid is"):
                FixedPointGrid("minmax", 8, low, high)
        with pytest.raises(ValueError, match="'tanh' grid has no fractional bits"):
            _ = fixed_point_grid(torch.ones(2), 8, "tanh").fractional_bits


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.drop = nn.Dropout()
        self.head = nn.Linear(8, 5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.act(self.bn(self.conv(x))).mean((2, 3))))


def built(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net()
    for _ in range(3):
        net(torch.randn(8, 3, 6, 6))
    return net.eval()


def batches(num: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 6, 6, generator=generator) for _ in range(num)]


def relative(y: Tensor, of: Tensor) -> float:
    return float((y - of).norm() / of.norm())


class TestNetwork:
    @pytest.mark.parametrize("method", METHODS)
    def test_error_falls_with_bits(self, method):
        x = batches()[0]
        errors = []
        for b in (3, 8, 16, 32):
            net = built()
            with torch.no_grad():
                y = net(x)
                quantize_fixed_point(net, FixedPoint(method, b, b, b), batches())
                errors.append(relative(net(x), y))
        assert errors == sorted(errors, reverse=True)
        assert errors[1] < 0.2
        assert errors[2] < 3e-3
        assert errors[3] < 1e-4

    def test_what_is_rounded(self):
        net = built()
        rounding = quantize_fixed_point(net, FixedPoint(), batches())
        tensors = {t.name: t for t in rounding.record.tensors}
        names = {k: [n for n, t in tensors.items() if t.kind == k] for k in ("running_stat",)}
        assert names["running_stat"] == ["bn.running_mean", "bn.running_var"]
        assert {n for n, t in tensors.items() if t.kind == "activation"} == {
            "conv", "bn", "act", "head",
        }  # fmt: skip
        for name, parameter in net.named_parameters():
            steps = parameter.detach() * 2.0 ** tensors[name].grid.fractional_bits
            assert torch.equal(steps, steps.round())
            assert steps.abs().max() <= 128
        assert tensors["bn.running_var"].grid.bits == 16
        assert tensors["act"].num_values == 2 * 8 * 8 * 16
        with torch.no_grad():
            out = net(batches()[0]) * 2.0 ** tensors["head"].grid.fractional_bits
        assert torch.equal(out, out.round())
        assert "bn.running_var" in str(rounding.record)
        assert len(str(rounding.record).splitlines()) == 1 + len(tensors)

    def test_none_leaves_tensors_as_they_are(self):
        net, old = built(), built()
        rounding = quantize_fixed_point(net, FixedPoint("linear", None, 4, None))
        assert torch.equal(net.conv.weight, old.conv.weight)
        assert not torch.equal(net.bn.running_var, old.bn.running_var)
        assert {t.kind for t in rounding.record.tensors} == {"running_stat"}

    def test_overflow_is_counted_in_each_tensor(self):
        net = built()
        with torch.no_grad():
            net.conv.weight.view(-1)[:3] = 50.0
        rounding = quantize_fixed_point(net, FixedPoint("tanh", overflow_rate=0.02), batches())
        tensors = {t.name: t for t in rounding.record.tensors}
        assert tensors["conv.weight"].num_overflow == 4  # of 216, the share allowed
        assert tensors["conv.weight"].num_values == 216
        assert 0 < tensors["conv"].num_overflow <= 0.02 * tensors["conv"].num_values * 1.5
        assert net.conv.weight.max() < 1

    @pytest.mark.parametrize("method", METHODS)
    def test_zeros_stay_zero(self, method):
        net = built()
        with torch.no_grad():
            net.conv.weight[::2] = 0
        mask = net.conv.weight != 0
        quantize_fixed_point(net, FixedPoint(method), batches())
        assert (net.conv.weight[~mask] == 0).all()

    def test_state_dict_and_record_make_the_same_network_again(self, tmp_path):
        net, x = built(), batches()[0]
        rounding = quantize_fixed_point(net, FixedPoint("log", overflow_rate=0.01), batches())
        stored = {"state_dict": net.state_dict(), "record": rounding.record.to_plain()}
        torch.save(stored, tmp_path / "net.pt")
        loaded = torch.load(tmp_path / "net.pt", weights_only=True)
        other = built(seed=5)
        other.load_state_dict(loaded["state_dict"])
        record = FixedPointRecord.from_plain(loaded["record"])
        assert record == rounding.record
        assert record == FixedPointRecord.from_plain(json.loads(json.dumps(record.to_plain())))
        apply_fixed_point(other, record)
        with torch.no_grad():
            assert torch.equal(other(x), net(x))

    def test_remove_stops_the_rounding_of_activations(self):
        net, x = built(), batches()[0]
        with torch.no_grad():
            float_output = net(x)
            rounding = quantize_fixed_point(net, FixedPoint("linear", 32, 32, 2), batches())
            assert relative(net(x), float_output) > 0.1
            rounding.remove()
            torch.testing.assert_close(net(x), float_output)
        apply_fixed_point(net, rounding.record)

    def test_copies_and_pickles_round_too(self):
        net, x = built(), batches()[0]
        quantize_fixed_point(net, FixedPoint("linear", 4, 8, 3), batches())
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(net)(x), net(x))
            assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))

    def test_gradients_pass_rounded_activations(self):
        net = built()
        quantize_fixed_point(net, FixedPoint("linear", 8, 8, 4), batches())
        net(batches()[0]).square().sum().backward()
        assert net.conv.weight.grad.abs().sum() > 0

    def test_nested_outputs_and_modes(self):
        class Recurrent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.lstm = nn.LSTM(3, 4, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.lstm(x)[0]

        net = Recurrent().train()
        x = torch.randn(2, 5, 3)
        quantize_fixed_point(net, FixedPoint(), [{"x": x}], lambda m, batch: m(batch["x"]))
        assert net.training
        assert len(net(x).detach().unique()) < 40

    def test_a_failure_changes_nothing(self):
        net, old = built(), built()
        x = batches()[0]
        x[0, 0, 0, 0] = math.nan
        with pytest.raises(ValueError, match="'the output of conv'.*NaN or infinite"):
            quantize_fixed_point(net, FixedPoint(), [x])
        with pytest.raises(ValueError, match="batches is empty"):
            quantize_fixed_point(net, FixedPoint())
        with pytest.raises(RuntimeError, match="channels"):
            quantize_fixed_point(net, FixedPoint(), [torch.randn(2, 4, 6, 6)])
        for name, value in net.state_dict().items():
            assert torch.equal(value, old.state_dict()[name]), name
        assert not any(m._forward_hooks for m in net.modules())
        with torch.no_grad():
            net.head.bias[0] = math.inf
        with pytest.raises(ValueError, match="'head.bias' cannot be rounded"):
            quantize_fixed_point(net, FixedPoint(), batches())
        assert torch.equal(net.conv.weight, old.conv.weight)

    def test_twice_or_on_another_network_is_refused(self):
        net = built()
        rounding = quantize_fixed_point(net, FixedPoint(), batches())
        with pytest.raises(ValueError, match="'conv' are rounded to fixed point already"):
            quantize_fixed_point(net, FixedPoint(), batches())
        with pytest.raises(ValueError, match="'conv', which this Sequential lacks"):
            apply_fixed_point(nn.Sequential(nn.Linear(2, 2)), rounding.record)

    def test_settings_are_checked(self):
        with pytest.raises(ValueError, match="param_bits is 1, expected a whole number"):
            FixedPoint(param_bits=1)
        with pytest.raises(ValueError, match="activation_bits is 8.5"):
            FixedPoint(activation_bits=8.5)
        with pytest.raises(ValueError, match="all None, so nothing is rounded"):
            FixedPoint("linear", None, None, None)
        with pytest.raises(ValueError, match="overflow_rate is 2"):
            FixedPoint(overflow_rate=2)
        for plain in ({}, [], {"fixed_point": {"bits": 3}, "tensors": []}, None):
            with pytest.raises(ValueError, match="no fixed-point record"):
                FixedPointRecord.from_plain(plain)

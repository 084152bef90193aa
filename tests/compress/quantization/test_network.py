"""Quantizers come, work, travel and go, and leave a network what it was."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves

from lit_compress.compress.quantization.network import (
    attach,
    calibrate,
    is_quantized,
    prepare,
    quantization_record,
    quantized_network,
    remove_quantization,
    without_quantizers,
)
from lit_compress.compress.quantization.quantizers import ActivationQuantizer
from lit_compress.compress.quantization.scheme import QuantizationScheme
from tests.compress.quantization.nets import (
    EPS,
    NETS,
    Nested,
    Residual,
    call,
    first_tensor,
    head,
    made,
    plain,
    small_variances,
)


def quantized(name: str, *, seed: int = 0, **scheme: Any) -> tuple[nn.Module, Any]:
    net, inputs = made(name, seed)
    prepare(net, QuantizationScheme(**scheme), lambda n: call(n, inputs))
    calibrate(net, lambda n, b: call(n, b), [inputs], ranges="minmax")
    return net, inputs


def equal(a: Any, b: Any) -> bool:
    left, right = tree_leaves(a), tree_leaves(b)
    pairs = zip(left, right, strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


# --- Prepared, and nothing rounded ----------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_prepared_is_the_same_to_the_bit(name, training):
    net, inputs = made(name)
    other = copy.deepcopy(net)
    state = copy.deepcopy(net.state_dict())
    random = torch.get_rng_state()
    prepare(net, QuantizationScheme(), lambda n: call(n, inputs))
    assert equal(random, torch.get_rng_state())
    assert equal(state, {k: v for k, v in net.state_dict().items() if "quantization" not in k})
    for observing in (False, True):  # that alone changes nothing either
        quantized_network(net).set_mode(observing=observing, quantizing=False)
        results = []
        for each in (net.train(training), other.train(training)):
            torch.manual_seed(5)
            results.append(call(each, inputs))
        assert equal(*results)
        own = {k: v for k, v in net.named_buffers() if "quantization" not in k}
        assert equal(own, dict(other.named_buffers()))


def test_prepared_with_another_eps_and_small_variances_is_the_same():
    net, x = small_variances()
    with torch.no_grad():
        before = net(x)
        prepare(net, QuantizationScheme(), lambda n: n(x))
        assert torch.equal(net(x), before)


def folded_by_hand(net: nn.Sequential, eps: float | None = None) -> nn.Sequential:
    """The net of ``small_variances`` with its batch norms in its convolutions."""
    net = copy.deepcopy(net)
    for conv, norm in ((net[0], net[1]), (net[4], net[5])):
        assert norm.running_var.max() <= 1e-2
        factor = norm.weight / (norm.running_var + (norm.eps if eps is None else eps)).sqrt()
        bias = 0 if conv.bias is None else conv.bias
        with torch.no_grad():
            conv.weight.mul_(factor.reshape(-1, 1, 1, 1))
        conv.bias = nn.Parameter(((bias - norm.running_mean) * factor + norm.bias).detach())
    net[1] = net[5] = nn.Identity()
    return net


def test_quantized_differs_from_the_net_folded_by_hand_by_rounding_only():
    net, x = small_variances()
    folded = folded_by_hand(net)
    with torch.no_grad():
        exact = net(x)
        assert torch.allclose(folded(x), exact, atol=1e-5)
        for each in (net, folded):
            prepare(each, QuantizationScheme(), lambda n: n(x))
            calibrate(each, lambda n, b: n(b), [x], ranges="minmax")
        by_rounding = (folded(x) - exact).abs().max()
        assert 0 < by_rounding < 0.03 * exact.abs().max()
        assert (net(x) - folded(x)).abs().max() <= 0.25 * by_rounding
        # The eps that other tools put in its place is told apart by this bound.
        wrong = folded_by_hand(remove(net), eps=1e-5)
        assert (wrong(x) - exact).abs().max() > 5 * by_rounding


def remove(net: nn.Module) -> Any:
    remove_quantization(net)
    return net


# --- What quantization does -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_quantized_is_near_and_not_the_same(name):
    float_net, _ = made(name)
    net, inputs = quantized(name)
    with torch.no_grad():
        exact, rounded = first_tensor(call(float_net, inputs)), first_tensor(call(net, inputs))
    error = (exact - rounded).abs().max() / exact.abs().max()
    assert 0 < error < 0.1


def test_fewer_bits_err_more():
    errors = []
    for bits in (8, 6, 4, 2):
        float_net, inputs = made("plain")
        net, _ = quantized("plain", weight_bits=bits, activation_bits=bits)
        with torch.no_grad():
            errors.append(float((call(net, inputs) - call(float_net, inputs)).square().mean()))
    assert errors == sorted(errors)
    assert errors[-1] > 100 * errors[0]


def test_mixed_bits_go_to_the_layers_that_the_patterns_name():
    net, _ = quantized("plain", weight_bits=6, layer_bits={"0": 8, "4": 3, "?": 2})
    bits = {n: net.quantization.weight(n).grid.bits for n in ("0.weight", "4.weight", "10.weight")}
    assert bits == {"0.weight": 8, "4.weight": 3, "10.weight": 6}
    values = net.quantization.weight("4.weight")(net[4].weight)
    assert max(len(row.unique()) for row in values.flatten(1)) <= 7


def test_a_record_of_before_with_patterns_gives_the_same_bits():
    net, _ = quantized("plain", weight_bits=6, layer_bits={"0": 8, "*": 3}, ignored_layers=["4"])
    record = quantization_record(net)
    assert record["scheme"]["layer_bits"] == {"0": 8, "4": 3, "10": 3}
    of_before = {
        **record["scheme"],
        "layer_bits": {"0": 8, "*": 3},
        "ignored_layers": ["?[!0]", "4"],
    }
    other, _ = made("plain", 0)
    attach(other, {**record, "scheme": of_before})
    for name in ("0.weight", "10.weight"):
        ours, theirs = (n.quantization.weight(name).grid for n in (net, other))
        assert ours == theirs


def test_least_bits_rule_over_the_scheme_and_give_way_to_it():
    net, inputs = quantized("plain", weight_bits=2, layer_bits={"0": 6}, weight_ranges="mse")
    quantization = net.quantization
    two = {n: q.scale.clone() for n, q in quantization.weights.items()}
    with torch.no_grad():
        coarse = call(net, inputs)
        quantization.least_weight_bits = 8
        assert {q.grid.bits for q in quantization.weights.values()} == {8}
        assert not torch.equal(call(net, inputs), coarse)
        quantization.least_weight_bits = 4
        assert [q.grid.bits for q in quantization.weights.values()] == [6, 4, 4]
        quantization.least_weight_bits = 2
        assert [q.grid.bits for q in quantization.weights.values()] == [6, 2, 2]
        for name, quantizer in quantization.weights.items():
            assert torch.allclose(quantizer.scale, two[name], rtol=1e-5)


def test_zeros_stay_zero_and_equal_weights_equal():
    net, inputs = made("plain")
    names = ["0.weight", "4.weight"]
    with torch.no_grad():
        for name in names:
            weight = net.get_parameter(name)
            centroids = torch.tensor([-0.07, -0.02, 0.0, 0.011, 0.05])
            weight.copy_(centroids[torch.randint(0, 5, weight.shape)])
    prepare(net, QuantizationScheme(per_tensor_weights=names), lambda n: call(n, inputs))
    calibrate(net, lambda n, b: call(n, b), [inputs])
    for name in names:
        weight = net.get_parameter(name)
        rounded = net.quantization.weight(name)(weight)
        assert ((rounded == 0) == (weight == 0)).all()
        assert len(rounded.unique()) == 5
        for centroid in weight.unique():
            assert len(rounded[weight == centroid].unique()) == 1


@pytest.mark.parametrize("ranges", ["minmax", "mse", "learned"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_masked_weights_stay_masked(ranges, bits):
    net, inputs = made("residual")
    mask = torch.rand_like(net.conv2.weight) < 0.8
    with torch.no_grad():
        net.conv2.weight[mask] = 0
    prepare(net, QuantizationScheme(bits, 8, weight_ranges=ranges), lambda n: call(n, inputs))
    calibrate(net, lambda n, b: call(n, b), [inputs])
    rounded = net.quantization.weight("conv2.weight")(net.conv2.weight)
    assert (rounded[mask] == 0).all()
    assert (rounded[~mask] != 0).any()


# --- Calibration ----------------------------------------------------------------------------------


def test_calibration_leaves_modes_statistics_and_random_state():
    net, inputs = made("plain")
    prepare(net, QuantizationScheme(), lambda n: call(n, inputs))
    net.train()
    net[5].eval()
    state = {k: v.clone() for k, v in net.named_buffers() if "quantization" not in k}
    modes = [m.training for m in net.modules()]
    random = torch.get_rng_state()
    assert calibrate(net, lambda n, b: call(n, b), [inputs, inputs]) == 2
    assert equal(state, {k: v for k, v in net.named_buffers() if "quantization" not in k})
    assert modes == [m.training for m in net.modules()]
    assert torch.equal(random, torch.get_rng_state())
    assert net.quantization.quantizing
    assert not net.quantization.observing


def test_calibrating_again_starts_anew():
    net, inputs = quantized("plain")
    scales = [q.scale.clone() for q in net.quantization.activations.values()]
    calibrate(net, lambda n, b: n(b * 3), [inputs[0][0]], ranges="minmax")
    changed = [q.scale for q in net.quantization.activations.values()]
    assert torch.allclose(changed[0], 3 * scales[0])
    calibrate(net, lambda n, b: call(n, b), [inputs], ranges="minmax")
    assert equal(scales, [q.scale for q in net.quantization.activations.values()])


def test_no_batch_is_refused():
    net, inputs = made("plain")
    prepare(net, QuantizationScheme(), lambda n: call(n, inputs))
    with pytest.raises(ValueError, match="there was no calibration batch"):
        calibrate(net, lambda n, b: call(n, b), [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused_with_the_place(bad):
    net, inputs = made("plain")
    prepare(net, QuantizationScheme(), lambda n: call(n, inputs))
    images = inputs[0][0].clone()
    images[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="activation 'input:0'.*NaN or infinite"):
        calibrate(net, lambda n, b: n(b), [images])


def test_a_refused_calibration_leaves_a_quantized_network_as_it_was():
    net, _inputs = quantized("plain")
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="no calibration batch"):
        calibrate(net, lambda n, b: call(n, b), [])
    assert equal(state, net.state_dict())


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, second: bool = True) -> Tensor:
        x = torch.relu(x + 1)
        out = torch.relu(self.first(x))
        return out.mean() + torch.relu(self.second(x - 1)).mean() if second else out


def test_layers_that_no_batch_reaches_are_named():
    net, x = Choosing(), torch.randn(2, 3, 6, 6)
    prepare(net, QuantizationScheme(), lambda n: n(x))
    with pytest.raises(ValueError, match="no calibration batch reached ':sub:0'"):
        calibrate(net, lambda n, b: n(b, second=False), [x])


# --- Travelling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme",
    [
        {},
        {"weight_ranges": "learned", "activation_ranges": "learned", "weight_bits": 4},
        {"weight_ranges": "mse", "activation_bits": 5},
        {"activation_ranges": "dynamic"},
        {"activation_bits": None, "weight_bits": 3},
    ],
)
@pytest.mark.parametrize("name", ["plain", "nested", "transposed groups", "shared"])
def test_a_file_brings_a_fresh_network_to_the_same_results(name, scheme, tmp_path):
    net, inputs = quantized(name, **scheme)
    path = tmp_path / "net.pt"
    torch.save({"state": net.state_dict(), "record": quantization_record(net)}, path)
    loaded = torch.load(path, weights_only=True)
    other = NETS[name][0]().eval()
    attach(other, loaded["record"])
    other.load_state_dict(loaded["state"])
    assert quantization_record(other) == quantization_record(net)
    with torch.no_grad():
        assert equal(call(other, inputs), call(net, inputs))
    assert list(other.state_dict()) == list(net.state_dict())


def test_mode_and_bits_of_the_moment_are_in_the_state():
    net, inputs = quantized("plain", weight_bits=3, weight_ranges="mse")
    net.quantization.least_weight_bits = 5
    net.quantization.set_mode(observing=True, quantizing=True)
    other = plain().eval()
    attach(other, quantization_record(net)).set_mode(observing=False, quantizing=False)
    other.load_state_dict(net.state_dict())
    assert other.quantization.observing
    assert other.quantization.quantizing
    assert other.quantization.least_weight_bits == 5
    with torch.no_grad():
        assert torch.equal(call(other, inputs), call(net, inputs))
        net.quantization.least_weight_bits = other.quantization.least_weight_bits = 2
        assert torch.equal(call(other, inputs), call(net, inputs))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("name", ["plain", "nested"])
def test_copies_are_the_same_and_independent(name, copied):
    net, inputs = quantized(name)
    twin = copied(net)
    assert type(twin) is type(net)
    with torch.no_grad():
        expected = call(net, inputs)
        assert equal(call(twin, inputs), expected)
        for quantizer in twin.quantization.quantizers:
            quantizer.scale.mul_(3)
        remove_quantization(twin)
        next(twin.parameters()).add_(1)
        assert equal(call(net, inputs), expected)
    assert is_quantized(net)
    assert not is_quantized(twin)


def test_a_file_of_weights_only_holds_no_code():
    net, _ = quantized("plain", weight_ranges="learned")
    buffer = io.BytesIO()
    torch.save({"state": net.state_dict(), "record": quantization_record(net)}, buffer)
    buffer.seek(0)
    assert set(torch.load(buffer, weights_only=True)) == {"state", "record"}


# --- Coming off -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_removal_leaves_no_trace(name):
    net, inputs = made(name)
    kind, attributes = type(net), set(vars(net))
    with torch.no_grad():
        expected, state = call(net, inputs), copy.deepcopy(net.state_dict())
        prepare(net, QuantizationScheme(), lambda n: call(n, inputs))
        calibrate(net, lambda n, b: call(n, b), [inputs])
        call(net, inputs)
        remove_quantization(net)
        assert equal(call(net, inputs), expected)
    assert type(net) is kind
    assert set(vars(net)) == attributes
    assert equal(net.state_dict(), state)
    assert list(net.state_dict()) == list(state)
    assert quantization_record(net) is None


def test_without_quantizers_takes_all_of_them_off():
    outer = nn.ModuleDict({"a": quantized("plain")[0], "b": quantized("nested")[0]})
    assert without_quantizers(outer) is outer
    assert not any(is_quantized(part) for part in outer.modules())


def test_a_class_changed_since_is_refused():
    net, _ = quantized("nested")
    net.__class__ = type("Sharded", (type(net),), {})
    with pytest.raises(ValueError, match="was changed to Sharded after it was quantized"):
        remove_quantization(net)


# --- Refusals -------------------------------------------------------------------------------------


def test_what_is_quantized_is_not_prepared_again():
    net, inputs = quantized("plain")
    with pytest.raises(ValueError, match="Sequential is quantized already; remove_quantization"):
        prepare(net, QuantizationScheme(), lambda n: call(n, inputs))


def test_compiled_and_scripted_networks_are_refused():
    net, inputs = made("plain")
    with pytest.raises(ValueError, match="compiled by torch.compile"):
        prepare(torch.compile(net), QuantizationScheme(), lambda n: call(n, inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="is a TorchScript module"):
        prepare(scripted, QuantizationScheme(), lambda n: call(n, inputs))


def test_an_attribute_of_the_same_name_is_refused():
    net, inputs = made("nested")
    net.quantization = "int8"
    with pytest.raises(ValueError, match="has an attribute 'quantization'"):
        prepare(net, QuantizationScheme(), lambda n: call(n, inputs))


def test_a_forward_that_would_bypass_quantizers_is_refused():
    net, inputs = made("nested")
    net.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="forward of this Nested was replaced on the instance"):
        prepare(net, QuantizationScheme(), lambda n: call(n, inputs))


def test_a_forward_bound_to_the_instance_is_its_own():
    # Lightning's strategies leave it so.
    net, inputs = made("nested")
    net.forward = net.forward
    exact = call(net, inputs)["logits"]
    prepare(net, QuantizationScheme(), lambda n: call(n, inputs))
    calibrate(net, lambda n, b: call(n, b), [inputs])
    assert not torch.equal(call(net, inputs)["logits"], exact)
    net.forward = net.forward
    remove_quantization(net)
    assert torch.equal(call(net, inputs)["logits"], exact)


def test_a_network_without_quantizers_is_refused_where_they_are_needed():
    net, inputs = made("plain")
    for needs in (quantized_network, remove_quantization,
                  lambda n: calibrate(n, lambda n, b: call(n, b), [inputs])):  # fmt: skip
        with pytest.raises(ValueError, match="Sequential is not quantized; use prepare or attach"):
            needs(net)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {}, "has version None, expected 1"),
        (lambda r: None, "has version None, expected 1"),
        (lambda r: r | {"version": 2}, "has version 2, expected 1"),
        (lambda r: {"version": 1}, r"incomplete or has unknown parts \('scheme'\)"),
        (lambda r: r | {"scheme": r["scheme"] | {"colour": 1}}, "incomplete or has unknown parts"),
        (lambda r: r | {"placement": {"weights": {}}}, "a placement of quantizers has the parts"),
        (lambda r: r | {"scheme": r["scheme"] | {"weight_bits": 99}}, "weight_bits is 99"),
    ],
)
def test_records_that_are_none_are_refused(change, message):
    net, inputs = quantized("plain")
    record = change(quantization_record(net))
    before = call(net, inputs)
    with pytest.raises(ValueError, match=message):
        attach(net, record)
    assert torch.equal(call(net, inputs), before)


def test_a_record_of_another_network_is_refused():
    record = quantization_record(quantized("plain")[0])
    net = nn.Sequential(nn.Conv2d(3, 8, 3), *head(8))
    with pytest.raises(ValueError, match="record quantizes '4.weight', which Sequential does not"):
        attach(net, record)
    assert not is_quantized(net)


def test_attaching_replaces_what_is_there():
    net, inputs = quantized("plain")
    other, _ = quantized("plain", weight_bits=3)
    attach(net, quantization_record(other))
    net.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert torch.equal(call(net, inputs), call(other, inputs))
    assert type(net).__mro__[1] is nn.Sequential


# --- Sequences ------------------------------------------------------------------------------------


def test_a_quantized_sequential_is_the_sequence_that_it_was():
    net, inputs = made("plain")
    parts = list(net)
    prepare(net, QuantizationScheme(), lambda n: call(n, inputs))
    calibrate(net, lambda n, b: call(n, b), [inputs])
    assert isinstance(net, nn.Sequential)
    assert list(net) == parts
    assert len(net) == len(parts)
    assert net[-1] is parts[-1]
    assert net[0] is parts[0]
    with pytest.raises(IndexError):
        net[len(parts)]
    tail = net[7:]
    assert type(tail) is nn.Sequential
    assert list(tail) == parts[7:]
    assert type(net[:2]) is nn.Sequential


def test_a_network_that_runs_all_of_its_children_runs_quantizers_for_nothing():
    class Chain(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            for part in self._modules.values():
                x = part(x)
            return x

    torch.manual_seed(0)
    net, x = Chain([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)]), torch.randn(2, 3, 6, 6)
    exact = net(x)
    prepare(net, QuantizationScheme(), lambda n: n(x))
    assert torch.equal(net(x), exact)
    calibrate(net, lambda n, b: n(b), [x])
    assert 0 < (net(x) - exact).abs().max() < 0.05


# --- Training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_gradients_pass_through_rounding_nearly_as_without(name):
    cosines = {}
    for seed in range(3):  # in a small network a ReLU may open or close by rounding
        float_net, _ = made(name, seed)
        net, inputs = quantized(name, seed=seed)
        for each in (float_net, net):
            first_tensor(call(each, inputs)).square().sum().backward()
        for (key, exact), (_, got) in zip(
            float_net.named_parameters(), net.named_parameters(), strict=False
        ):
            assert got.grad is not None, key
            if exact.grad.norm() > 1e-3:
                cosine = torch.cosine_similarity(exact.grad.flatten(), got.grad.flatten(), 0)
                cosines.setdefault(key, []).append(float(cosine))
    assert {key: found for key, found in cosines.items() if max(found) <= 0.9} == {}


def test_learned_scales_get_gradients_and_train():
    net, inputs = quantized(
        "residual", weight_bits=3, activation_bits=4, weight_ranges="learned",
        activation_ranges="learned",
    )  # fmt: skip
    scales = dict(net.quantization.named_parameters())
    used = {name.replace(".", "/") for name in net.quantization.placement.activations.values()}
    weights = {n.replace(".", "/") for n in net.quantization.placement.weights.values()}
    assert set(scales) == {f"activations.{n}.scale" for n in used} | {
        f"weights.{n}.scale" for n in weights
    }
    before = {name: scale.detach().clone() for name, scale in scales.items()}
    optimizer = torch.optim.Adam(scales.values(), 1e-4)
    float_net, _ = made("residual")
    wanted = call(float_net, inputs).detach()
    losses = []
    for _ in range(30):
        loss = (call(net, inputs) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(scale.grad.abs().sum() > 0 for scale in scales.values())
    assert not any(torch.equal(before[name], scale) for name, scale in scales.items())
    assert losses[-1] < 0.9 * losses[0]


def test_ranges_move_only_where_observing_and_training():
    net, inputs = quantized("plain")
    wide = ((inputs[0][0] * 5,), {})

    def moved() -> bool:
        before = [q.scale.clone() for q in net.quantization.activations.values()]
        call(net, wide)
        return not equal(before, [q.scale for q in net.quantization.activations.values()])

    net.train()
    assert not moved()
    net.quantization.set_mode(observing=True, quantizing=True)
    assert moved()
    net.eval()
    assert not moved()


def test_dropout_does_not_widen_the_ranges_that_inference_has():
    net, inputs = quantized("plain")
    for quantizer in net.quantization.activations.values():
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.momentum = 1.0
    net.quantization.set_mode(observing=True, quantizing=True)
    net[1].eval()
    before = net.quantization.activation("2:relu:0").high.clone()
    net.train()[1].eval()
    call(net, inputs)
    # Dropout with p = 0.3 makes its largest values 1.43 times as great.
    assert torch.allclose(net.quantization.activation("2:relu:0").high, before, rtol=0.01)


def test_two_passes_before_one_backward():
    for scheme in ({}, {"weight_ranges": "learned", "activation_ranges": "learned"}):
        net, inputs = quantized("residual", **scheme)
        net.train().quantization.set_mode(observing=True, quantizing=True)
        loss = sum(call(net, ((inputs[0][0] * factor,), {})).square().mean() for factor in (1, 2))
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
        assert net.conv1.weight.grad.abs().sum() > 0


def test_bfloat16_autocast_rounds_and_trains():
    net, inputs = quantized("residual")
    net.train().quantization.set_mode(observing=True, quantizing=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(net, inputs)
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    assert net.conv1.weight.grad.abs().sum() > 0
    assert {q.scale.dtype for q in net.quantization.quantizers} == {torch.float32}
    with torch.no_grad():
        exact = call(net.eval(), inputs)
        assert (out.float() - exact).abs().max() < 2 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_stay_wide_where_the_network_is_cast(dtype):
    net, inputs = quantized("residual", weight_ranges="learned")
    before = copy.deepcopy(net.quantization.state_dict())
    exact = call(net, inputs)
    net.to(dtype)
    after = net.quantization.state_dict()
    assert equal(before, after)
    assert {v.dtype for v in after.values() if isinstance(v, Tensor)} == {
        torch.float32, torch.int32}  # fmt: skip
    out = call(net, ((inputs[0][0].to(dtype),), {}))
    assert out.dtype == dtype
    assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_networks_made_under_another_default_dtype_have_wide_scales():
    torch.set_default_dtype(torch.bfloat16)
    try:
        net, x = Residual().eval(), torch.randn(2, 3, 8, 8)
        prepare(net, QuantizationScheme(), lambda n: n(x))
    finally:
        torch.set_default_dtype(torch.float32)
    dtypes = {v.dtype for v in net.quantization.state_dict().values() if isinstance(v, Tensor)}
    assert dtypes == {torch.float32, torch.int32}


class Failing(Residual):
    fail = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.fail:
            raise RuntimeError("out of luck")
        return self.fc(self.conv1(x).mean((2, 3)))


def test_errors_in_forward_leave_nothing_behind():
    net, x = Failing().eval(), torch.randn(2, 3, 8, 8)
    prepare(net, QuantizationScheme(), lambda n: n(x))
    calibrate(net, lambda n, b: n(b), [x])
    expected = net(x)
    net.fail = True
    for attempt in (lambda: net(x), lambda: calibrate(net, lambda n, b: n(b), [x])):
        with pytest.raises(RuntimeError, match="out of luck"):
            attempt()
        assert not module_hooks._global_forward_hooks
        assert not module_hooks._global_forward_hooks_always_called
        assert not module_hooks._global_forward_pre_hooks
        assert _get_current_function_mode_stack() == []
    net.fail = False
    assert torch.equal(net(x), expected)


class Noisy(nn.Module):
    """Computes in training what it does not in evaluation, before a sum that is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.1 * torch.rand_like(x)
        return self.conv2(self.conv1(x) + x)


def test_calls_that_come_in_training_only_are_told():
    net, x = Noisy().eval(), torch.randn(2, 3, 8, 8)
    prepare(net, QuantizationScheme(), lambda n: n(x))
    calibrate(net, lambda n, b: n(b), [x])
    net.train()
    with pytest.warns(UserWarning, match="Noisy calls add 2 times in training and 1 times in"):
        net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x)  # once
        quantized("plain")[0].train()(torch.randn(2, 3, 8, 8))


# --- Networks of others ---------------------------------------------------------------------------


# The more layers with random weights, the more each one's rounding grows in the next.
@pytest.mark.parametrize(
    ("name", "likeness"),
    [("resnet18", 0.9), ("mobilenet_v3_small", 0.9), ("efficientnet_b0", 0.6)],
)
def test_networks_of_torchvision(name, likeness):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    net, x = getattr(models, name)(num_classes=10).eval(), torch.randn(6, 3, 64, 64)
    for norm in net.modules():  # statistics without which random weights give next to nothing
        if isinstance(norm, nn.BatchNorm2d):
            norm.train().momentum = 1.0
    with torch.no_grad():
        net(x)
        net.eval()
        exact = net(x)
        prepare(net, QuantizationScheme(), lambda n: n(x))
        assert torch.equal(net(x), exact)
        calibrate(net, lambda n, b: n(b), [x], ranges="minmax")
        rounded = net(x)
        assert torch.cosine_similarity(rounded.flatten(), exact.flatten(), 0) > likeness
        assert not torch.equal(rounded, exact)
        other = getattr(models, name)(num_classes=10).eval()
        attach(other, quantization_record(net))
        other.load_state_dict(net.state_dict())
        assert torch.equal(other(x), rounded)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(net.quantization.placement.weights) == len(layers)
    assert not net.quantization.placement.floating


def test_attributes_and_methods_of_the_network_stay():
    class Net(Nested):
        num_classes = 4

        def features(self) -> str:
            return "features"

    net, (args, kwargs) = Net(), made("nested")[1]
    prepare(net, QuantizationScheme(), lambda n: n(*args, **kwargs))
    assert isinstance(net, Net)
    assert type(net).__name__ == "Net"
    assert net.num_classes == 4
    assert net.features() == "features"
    assert EPS == 1e-3


# --- Ranges of all activations at once ------------------------------------------------------------


@pytest.mark.parametrize("also_learned", [False, True])
@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_ranges_are_changed_at_once_and_scales_follow(ranges, also_learned):
    net, _ = quantized("residual", activation_ranges=ranges)
    quantization = quantized_network(net)
    quantizers = list(quantization.activations.values())
    before = [(q.low.clone(), q.high.clone(), q.scale.detach().clone()) for q in quantizers]
    seen = []

    def twice(ends):
        seen.append(ends.shape)
        return 2 * ends

    quantization.map_ranges(twice, also_learned)
    assert any(q.learned for q in quantizers) == (ranges == "learned")
    changed = [also_learned or not quantizer.learned for quantizer in quantizers]
    assert seen == [(2, sum(changed))] * any(changed)
    for quantizer, (low, high, scale), doubled in zip(quantizers, before, changed, strict=True):
        times = 2 if doubled else 1
        assert torch.equal(quantizer.low, low * times)
        assert torch.equal(quantizer.high, high * times)
        assert torch.allclose(quantizer.scale, scale * times)
        assert quantizer.ready


def test_ranges_of_nothing_observed_are_left_alone():
    net, _ = quantized("residual", activation_ranges="dynamic")
    quantized_network(net).map_ranges(lambda ends: pytest.fail("there are none"))
    assert is_quantized(net)

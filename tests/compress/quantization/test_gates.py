"""Sigmoids, SiLU and hardswish: gates rounded between 0 and 1, and written in integers."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_compress.compress.quantization.affine import Grid, fake_quantize
from lit_compress.compress.quantization.calls import record_calls
from lit_compress.compress.quantization.gates import GATES, PRODUCTS, gated, operator_of
from lit_compress.compress.quantization.integers import Spelling, integer_network
from lit_compress.compress.quantization.network import (
    attach,
    calibrate,
    prepare,
    quantization_record,
    quantized_network,
)
from lit_compress.compress.quantization.placement import Placement, place
from lit_compress.compress.quantization.quantizers import ActivationQuantizer, GateQuantizer
from lit_compress.compress.quantization.scheme import QuantizationScheme
from tests.compress.quantization.nets import conv_bn, head

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2
ACTIVATIONS = {"silu": nn.SiLU, "hardswish": nn.Hardswish}
SIGMOIDS = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}


class SqueezeExcite(nn.Module):
    def __init__(self, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(*conv_bn(3, 8), act())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.act, self.gate = act(), gate()
        self.project = nn.Sequential(*conv_bn(8, 8), act(), *head(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.project(self.gate(self.excite(self.act(self.squeeze(self.pool(x))))) * x)


def block(op: str, gate: str = "sigmoid") -> nn.Module:
    return SqueezeExcite(ACTIVATIONS[op], SIGMOIDS[gate]).eval()


def placed(net: nn.Module, x: Tensor = IMAGES, **scheme: Any) -> Placement:
    return place(net, record_calls(net, lambda n: n(x)), QuantizationScheme(**scheme))


def quantized(net: nn.Module, x: Tensor = IMAGES, **scheme: Any) -> nn.Module:
    prepare(net, QuantizationScheme(**scheme), lambda n: n(x))
    calibrate(net, lambda n, batch: n(batch), [x])
    return net


# --- Where they are -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(PRODUCTS))
def test_products_have_a_gate_between_two_grids(op):
    net = nn.Sequential(*conv_bn(3, 4), ACTIVATIONS[op](inplace=True), *conv_bn(4, 4))
    plan = placed(net)
    assert plan.gates == {f"2:{op}:0": "1:batch_norm:0"}
    assert {f"2:{op}:0", "1:batch_norm:0"} <= set(plan.activations)
    assert placed(net, activation_ranges="dynamic").gates == {}
    assert placed(net, activation_bits=None).gates == {}


@pytest.mark.parametrize("gate", sorted(SIGMOIDS))
@pytest.mark.parametrize("op", sorted(PRODUCTS))
def test_squeeze_and_excite(op, gate):
    net = quantized(block(op, gate))
    quantization = quantized_network(net)
    assert quantization.placement.gates == {
        f"stem.2:{op}:0": "stem.1:batch_norm:0",
        f"act:{op}:0": "squeeze:conv2d:0",
        f"gate:{gate}:0": "excite:conv2d:0",
        f"project.2:{op}:0": "project.1:batch_norm:0",
    }
    assert set(quantization.gates) == {f"stem/2:{op}:0", f"act:{op}:0", f"project/2:{op}:0"}
    # The gate of the block is what the product takes; those of products are inside of them.
    assert isinstance(quantization.activation(f"gate:{gate}:0"), GateQuantizer)
    assert isinstance(quantization.activation(f"act:{op}:0"), ActivationQuantizer)
    for call in quantization.placement.gates:
        quantizer = quantization.gate(call)
        assert quantizer.ready
        assert float(quantizer.scale) == pytest.approx(1 / 255)
        assert int(quantizer.zero_point) == 0


def test_sums_before_a_gate_are_of_integers():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.silu(self.a(x) + self.b(x)))

    plan = placed(Residual())
    assert plan.gates == {":silu:0": ":add:0"}


def test_what_takes_real_numbers_or_reaches_no_layer_is_none():
    normed = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 2))
    assert placed(normed, torch.zeros(2, 8)).gates == {}
    assert placed(nn.Sequential(nn.Conv2d(3, 1, 3), nn.Sigmoid())).gates == {}
    layers = nn.Sequential(nn.Linear(8, 8), nn.Hardswish(), nn.Dropout(), nn.Linear(8, 2))
    assert placed(layers, torch.zeros(2, 8)).gates == {"1:hardswish:0": "0:linear:0"}


def test_operators_are_read_from_names():
    assert operator_of("features.0.2:silu:1") == "silu"
    assert operator_of(":sigmoid:0") == "sigmoid"


# --- What they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize("op", sorted(PRODUCTS))
def test_a_product_with_a_gate_that_is_not_rounded_is_the_activation(op):
    x = torch.linspace(-8, 8, 401)
    assert torch.allclose(gated(op, x, lambda g: g), getattr(F, op)(x), atol=1e-6)
    assert set(GATES) == {*SIGMOIDS, *PRODUCTS}


@pytest.mark.parametrize("op", sorted(PRODUCTS))
def test_the_network_rounds_its_gates_only_where_it_rounds(op):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), ACTIVATIONS[op](), nn.Conv2d(4, 2, 1)).eval()
    dense = copy.deepcopy(net)
    quantization = prepare(net, QuantizationScheme(), lambda n: n(IMAGES))
    assert torch.equal(net(IMAGES), dense(IMAGES))
    calibrate(net, lambda n, batch: n(batch), [IMAGES])
    seen = {}
    net[2].register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    net[0].register_forward_hook(lambda _, args, out: seen.update(given=out))
    net(IMAGES)
    place_of = quantization.placement.activations
    gate = fake_quantize(
        GATES[op](seen["given"]), torch.tensor(1 / 255), torch.tensor(0), Grid(8, signed=False)
    )
    expected = quantization.activation(place_of[f"1:{op}:0"])(seen["given"] * gate)
    assert torch.equal(seen["x"], expected)


@pytest.mark.parametrize("op", sorted(PRODUCTS))
@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_gradients_go_through(op, ranges):
    net = quantized(block(op, "hardsigmoid"), activation_ranges=ranges).train()
    net(IMAGES).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all()
    assert float(net.stem[0].weight.grad.abs().sum()) > 0
    # Of the gate itself nothing is learned.
    gates = [m for m in quantized_network(net).modules() if isinstance(m, GateQuantizer)]
    assert gates
    assert not any(parameter.requires_grad for m in gates for parameter in m.parameters())


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("spelling", ["sigmoids", "sums", "steps"])
@pytest.mark.parametrize(("op", "gate"), [("silu", "sigmoid"), ("hardswish", "hardsigmoid")])
def test_each_spelling_computes_what_the_network_computes(op, gate, spelling, signed, bits):
    net = quantized(block(op, gate), activation_bits=bits)
    written = integer_network(net, Spelling(signed_activations=signed, gates=spelling))
    with torch.no_grad():
        ours, theirs = net(IMAGES), written(IMAGES)
    step = float(ours.max() - ours.min()) / (2**bits - 1)
    assert float((ours - theirs).abs().max()) <= 2 * step
    assert float((ours - theirs).abs().median()) <= 0.2 * step


# --- Records --------------------------------------------------------------------------------------


def test_a_record_comes_back():
    net = quantized(block("silu"))
    record = json.loads(json.dumps(quantization_record(net)))
    again = block("silu")
    attach(again, record)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval()(IMAGES), net.eval()(IMAGES))


def test_a_record_from_before_gates_computes_as_it_did():
    """Its ranges of sigmoids were observed, and SiLU was as exact as torch's."""
    net = block("silu")
    record = prepare(net, QuantizationScheme(), lambda n: n(IMAGES)) and quantization_record(net)
    del record["placement"]["gates"]
    old = block("silu")
    quantization = attach(old, record)
    calibrate(old, lambda n, batch: n(batch), [IMAGES])
    assert quantization.placement.gates == {}
    assert not list(quantization.gates)
    quantizer = quantization.activation("gate:sigmoid:0")
    assert isinstance(quantizer, ActivationQuantizer)
    assert float(quantizer.high) < 1
    assert "quantization.gates" not in "".join(old.state_dict())
    seen = {}
    old.project[3].register_forward_pre_hook(lambda _, args: seen.update(pooled=args[0]))
    old.project[1].register_forward_hook(lambda _, args, out: seen.update(given=out))
    old(IMAGES)
    given = quantization.activation("project.1:batch_norm:0")(seen["given"])
    expected = quantization.activation("project.2:silu:0")(F.silu(given))
    assert torch.equal(seen["pooled"], expected)
    written = integer_network(old, Spelling(gates="sums"))
    assert torch.nn.functional.cosine_similarity(
        written(IMAGES).flatten(), old(IMAGES).flatten(), 0
    ) > 0.9999  # fmt: skip


def test_only_records_from_before_may_lack_them():
    plain = Placement().to_plain()
    assert Placement.from_plain({k: v for k, v in plain.items() if k != "gates"}) == Placement()
    with pytest.raises(ValueError, match="a placement of quantizers has the parts"):
        Placement.from_plain({k: v for k, v in plain.items() if k != "weights"})


class InPlace(nn.Module):
    """Activations as statements, whose results nobody takes."""

    def __init__(self, act: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.act = nn.Conv2d(8, 4, 1), act

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            x = layer(x)
            if self.act == "sigmoid":
                x.sigmoid_()
            else:
                getattr(F, self.act)(x, inplace=True)
        return self.head(x)


@pytest.mark.parametrize("act", ["silu", "hardswish", "sigmoid", "relu"])
@pytest.mark.parametrize("gates", ["whole", "table", "product"])
def test_activations_in_place_change_what_later_calls_read(act, gates):
    network = InPlace(act).eval()
    expected = network(IMAGES).detach()
    prepare(network, QuantizationScheme(), lambda net: net(IMAGES))
    calibrate(network, lambda net, batch: net(batch), [IMAGES])
    rounded = network(IMAGES).detach()
    assert float((rounded - expected).abs().max()) < 0.05 * float(expected.abs().max())
    spelled = {"whole": Spelling()}.get(gates) or Spelling(gates=gates)
    integers = integer_network(network, spelled)(IMAGES).detach()
    assert float((integers - rounded).abs().max()) < 0.03 * float(expected.abs().max())
    network.train()(IMAGES).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in InPlace.parameters(network)
               if p.requires_grad)  # fmt: skip


def test_a_weight_of_a_convolution_and_a_transposed_one_stays_in_float():
    tied, transposed = nn.Conv2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3)
    transposed.weight = tied.weight
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), tied, nn.ReLU(), transposed, nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    quantization = prepare(network, QuantizationScheme(), lambda net: net(IMAGES))
    reasons = set(quantization.placement.floating.values())
    assert "its weight is a convolution's and a transposed convolution's" in reasons
    calibrate(network, lambda net, batch: net(batch), [IMAGES])
    rounded = network(IMAGES)
    integers = integer_network(network, Spelling())(IMAGES)
    assert float((integers - rounded).abs().max()) < 1e-3 * float(rounded.abs().max())

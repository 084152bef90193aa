import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lit_compress.compress.quantization.affine import Grid
from lit_compress.compress.quantization.corrections.bias_correction import correct_bias
from lit_compress.compress.quantization.corrections.layer_runs import run_layers
from lit_compress.compress.quantization.corrections.layer_samples import gather_samples
from lit_compress.compress.quantization.corrections.rounding import round_adaptively
from lit_compress.compress.quantization.corrections.soft_rounding import SoftRounding
from lit_compress.compress.quantization.integers import integer_layers, integer_network
from lit_compress.compress.quantization.network import calibrate, prepare, remove_quantization
from lit_compress.compress.quantization.scheme import QuantizationScheme


def images(seed: int = 1, n: int = 8) -> Tensor:
    return torch.rand(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.same = nn.Conv2d(8, 8, (3, 2), padding="same", dilation=2, groups=2)
        self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.shared = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = F.relu6(self.depthwise(x))
        x = self.same(x) + self.reflected(x)
        return self.head(self.up(self.shared(self.shared(x))).mean((2, 3)))


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


BATCHES = [images(1), images(2)]
QUICK = {"num_iterations": 30, "num_samples": 400}


def float_net() -> Net:
    torch.manual_seed(0)
    net = Net()
    for _ in range(5):
        net(torch.rand(16, 4, 8, 8))
    return net.eval()


def quantized(net: nn.Module, ranges: str = "mse", bits: int = 3, **kwargs) -> nn.Module:
    scheme = QuantizationScheme(weight_bits=bits, weight_ranges=ranges, **kwargs)
    prepare(net, scheme, lambda model: model(BATCHES[0]))
    calibrate(net, forward, BATCHES)
    return net


def integers(net: nn.Module) -> dict[str, Tensor]:
    return {call: layer.values for call, layer in integer_layers(net).items()}


@pytest.fixture(scope="module")
def rounded():
    net = quantized(float_net())
    nearest = copy.deepcopy(net)
    return net, nearest, round_adaptively(net, forward, BATCHES, num_iterations=200)


def test_outputs_come_nearer_to_those_of_the_float_network(rounded):
    net, nearest, result = rounded
    with torch.no_grad():
        expected = float_net()(images(7, 64))
        errors = [(model(images(7, 64)) - expected).norm() for model in (net, nearest)]
    assert errors[0] < 0.9 * errors[1]
    assert all(layer.error_after <= layer.error_before for layer in result.layers)
    assert sum(layer.error_after < layer.error_before for layer in result.layers) >= 3
    assert any(layer.flipped > 0 for layer in result.layers)


def test_layers_come_in_forward_order_and_the_rest_says_why(rounded):
    net, _, result = rounded
    assert [layer.layer for layer in result.layers] == [
        "conv", "depthwise", "same", "reflected", "head"
    ]  # fmt: skip
    assert result.left_alone == {
        "shared": "several calls share its weight",
        "up": "transposed convolutions are rounded to the nearest",
    }
    assert "depthwise" in str(result)
    assert "up skipped: transposed" in str(result)
    assert "float_weights" not in repr(result)
    original = float_net()
    for name, value in result.float_weights.items():
        assert torch.equal(value, original.get_parameter(name))
    kept = {n for n, p in net.named_parameters() if torch.equal(p, original.get_parameter(n))}
    assert kept == dict(original.named_parameters()).keys() - result.float_weights.keys()


def test_each_weight_is_on_the_integer_below_or_above(rounded):
    net, _, result = rounded
    for name, value in result.float_weights.items():
        quantizer, weight = net.quantization.weight(name), net.get_parameter(name)
        scale = quantizer.scale.reshape(-1, *[1] * (value.dim() - 1))
        steps = (value / scale).clamp(quantizer.grid.low, quantizer.grid.high)
        assert ((weight / scale - steps).abs() <= 1 + 1e-4).all()
        assert torch.allclose(weight / scale, torch.round(weight / scale), atol=1e-4)
        assert torch.allclose(quantizer(weight), weight, atol=1e-6)


def test_integer_network_agrees(rounded):
    net, _, _ = rounded
    x = images(9)
    with torch.no_grad():
        assert torch.allclose(integer_network(net)(x), net(x), atol=0.05)


@pytest.mark.parametrize("ranges", ["mse", "minmax", "learned"])
def test_scales_stay_and_zeros_stay_zero(ranges):
    net = float_net()
    with torch.no_grad():
        net.same.weight.mul_(net.same.weight.abs() > net.same.weight.abs().median())
        net.conv.weight[3] = 0
    zeros = net.same.weight == 0
    quantized(net, ranges)
    scales = {n: q.scale.detach().clone() for n, q in net.quantization.weights.items()}
    before = integers(net)
    round_adaptively(net, forward, BATCHES, **QUICK)
    after = integers(net)  # follows the largest magnitude where that is what ranges do
    assert any(not torch.equal(before[call], after[call]) for call in before)
    for name, quantizer in net.quantization.weights.items():
        assert torch.allclose(quantizer.scale, scales[name], rtol=1e-6, atol=0)
    assert (net.same.weight[zeros] == 0).all()
    assert (net.conv.weight[3] == 0).all()


def test_the_same_seed_gives_the_same_integers():
    found = []
    for seed in (3, 3, 4):
        net = quantized(float_net())
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        round_adaptively(net, forward, BATCHES, seed=seed, **QUICK)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(integers(net))
    assert all(torch.equal(found[0][call], found[1][call]) for call in found[0])
    assert any(not torch.equal(found[0][call], found[2][call]) for call in found[0])


def test_clusters_and_modes_are_left_as_they_are():
    net = quantized(float_net(), per_tensor_weights=["head.weight"]).train()
    weight = net.head.weight.detach().clone()
    result = round_adaptively(net, forward, BATCHES, num_iterations=1, num_samples=16)
    assert result.left_alone["head"].startswith("its equal weights are to stay equal")
    assert torch.equal(net.head.weight, weight)
    assert net.training
    assert net.quantization.quantizing
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_bias_correction_afterwards_knows_the_float_weights(rounded):
    net, nearest, result = rounded
    net = copy.deepcopy(net)
    means: dict[bool, Tensor] = {}
    correct_bias(net, forward, [BATCHES[0]], float_weights=result.float_weights)
    for model, is_rounded in ((nearest, False), (net, True)):

        def note(call, is_rounded=is_rounded):
            given = call.result()
            if call.name.startswith("same"):
                means[is_rounded] = given.mean((0, 2, 3))
            return given

        run_layers(model, forward, BATCHES[0], note, rounded=is_rounded)
    assert torch.allclose(means[True], means[False], atol=1e-3)  # biases are rounded, too


@pytest.mark.parametrize("layer", ["conv", "depthwise", "same", "reflected", "head"])
def test_samples_are_what_the_layer_reads(rounded, layer):
    _, nearest, _ = rounded
    call = next(c for c in nearest.quantization.placement.weights if c.startswith(f"{layer}:"))
    generator = torch.Generator().manual_seed(0)
    samples = gather_samples(nearest, forward, BATCHES, call, {}, 100, 2**20, generator)
    module = nearest.get_submodule(layer)
    groups = getattr(module, "groups", 1)
    rows = module.weight.detach().flatten(1).reshape(groups, -1, samples.patches.shape[2])
    y = torch.einsum("gsi,goi->sgo", samples.patches, rows).flatten(1)
    y = y if samples.bias is None else y + samples.bias
    error = (y - samples.outputs).square().mean() / samples.outputs.square().mean()
    assert float(error) < 1e-2  # inputs are rounded to 8 bits, and layers before to 3
    assert len(samples.outputs) <= 100


def test_samples_are_bounded_by_bytes(rounded):
    _, nearest, _ = rounded
    generator = torch.Generator().manual_seed(0)
    found = gather_samples(nearest, forward, BATCHES, "conv:conv2d:0", {}, 10**6, 10**5, generator)
    assert 4 * (found.patches.numel() + found.outputs.numel()) <= 10**5
    assert gather_samples(nearest, forward, BATCHES, "none:conv2d:0", {}, 9, 9, generator) is None


@settings(deadline=None, max_examples=30)
@given(
    bits=st.integers(2, 8),
    seed=st.integers(0, 1000),
    keep_greatest=st.booleans(),
    per_tensor=st.booleans(),
)
def test_soft_rounding_starts_with_nothing_rounded(bits, seed, keep_greatest, per_tensor):
    grid = Grid(bits, signed=True)
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    weight[0, :3] = 0
    scale = weight.abs().amax() if per_tensor else weight.abs().amax(1)
    scale = scale * (1.0 if keep_greatest else 0.7) / grid.high
    rounding = SoftRounding(weight, scale, grid, keep_greatest)
    wide = scale.reshape(-1, 1)
    soft = rounding.soft(rounding.up(rounding.start()))
    clipped = torch.clamp(weight, grid.low * wide, grid.high * wide)
    assert torch.allclose(soft, clipped, atol=1e-5)
    hard = rounding.hard(rounding.start())
    assert rounding.flipped(rounding.nearest) == 0
    off = (hard / wide - clipped / wide).abs()
    assert (off <= 0.5 + 1e-3).all()
    for variable in (torch.full((4, 6), -9.0), torch.full((4, 6), 9.0)):
        extreme = rounding.hard(variable)
        assert (extreme[0, :3] == 0).all()
        assert (extreme.abs() <= grid.high * wide * (1 + 1e-5)).all()
        if keep_greatest and not per_tensor:
            assert torch.allclose(extreme.abs().amax(1), weight.abs().amax(1), rtol=1e-5)
        assert float(rounding.undecided(rounding.up(variable), 2.0)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_iterations": 0}, "num_iterations is 0; give a whole number from 1"),
        ({"num_samples": 1.5}, "num_samples is 1.5; give a whole number"),
        ({"max_bytes": True}, "max_bytes is True; give a whole number"),
        ({"lr": 0.0}, "lr is 0.0; give a number above 0"),
        ({"regularization": "much"}, "regularization is 'much'; give a number above 0"),
        ({"lr": float("nan")}, "lr is nan; give a number above 0"),
    ],
)
def test_arguments_out_of_range_are_refused(rounded, arguments, message):
    with pytest.raises(ValueError, match=message):
        round_adaptively(rounded[1], forward, BATCHES, **arguments)


def test_refusals():
    net = quantized(float_net())
    with pytest.raises(ValueError, match="no batch to learn the rounding from; give at least one"):
        round_adaptively(net, forward, [])
    with pytest.raises(ValueError, match="outputs of 'conv' are NaN or infinite"):
        round_adaptively(net, forward, [BATCHES[0] * torch.nan])
    remove_quantization(net)
    with pytest.raises(ValueError, match="is not quantized"):
        round_adaptively(net, forward, BATCHES)

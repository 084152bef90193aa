import copy

import pytest
import torch
from torch import Tensor, nn

from lit_compress.compress.quantization.corrections.bias_correction import correct_bias
from lit_compress.compress.quantization.corrections.layer_runs import run_layers
from lit_compress.compress.quantization.integers import integer_network
from lit_compress.compress.quantization.network import calibrate, prepare, remove_quantization
from lit_compress.compress.quantization.scheme import QuantizationScheme


def images(seed: int = 1, n: int = 8) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-2)
        self.biased = nn.Conv2d(8, 8, 3)
        self.norm_behind = nn.BatchNorm2d(8)
        self.bare = nn.Conv2d(8, 8, 1, bias=False)
        self.shared = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.norm_behind(self.biased(x)).relu()
        x = self.shared(self.shared(self.bare(x)).relu()).relu()
        return self.head(self.up(x).mean((2, 3)))


def forward(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch)


def quantized(batches: list[Tensor], seed: int = 0, bits: int = 3) -> Net:
    torch.manual_seed(seed)
    net = Net()
    for _ in range(5):
        net(torch.rand(16, 3, 8, 8))
    with torch.no_grad():
        net.norm.weight.uniform_(-2, 2)
    net.eval()
    scheme = QuantizationScheme(weight_bits=bits, activation_bits=6)
    prepare(net, scheme, lambda model: model(batches[0]))
    calibrate(net, forward, batches)
    return net


def means(net: nn.Module, batches: list[Tensor], rounded: bool) -> dict[str, Tensor]:
    """Mean of each channel of each layer's output over all batches."""
    found: dict[str, list[Tensor]] = {}

    def note(call):
        result = call.result()
        channels_first = result.transpose(0, 1).flatten(1)
        found.setdefault(call.name, []).append(channels_first.mean(1))
        return result

    for batch in batches:
        run_layers(net, forward, batch, note, rounded=rounded)
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


EXPECTED = {"conv:conv2d:0": "norm.bias", "biased:conv2d:0": "biased.bias",
            "up:conv_transpose2d:0": "up.bias", "head:linear:0": "head.bias"}  # fmt: skip


def test_on_one_batch_the_means_become_those_of_the_float_network():
    batches = [images()]
    net = quantized(batches)
    float_means, before = means(net, batches, False), means(net, batches, True)
    untouched = copy.deepcopy(net)
    result = correct_bias(net, forward, batches)
    after = means(net, batches, True)
    assert {layer.layer: layer.parameter for layer in result.layers} == {
        name.partition(":")[0]: parameter for name, parameter in EXPECTED.items()
    }
    for name in ("biased:conv2d:0", "up:conv_transpose2d:0", "head:linear:0"):
        error = (after[name] - float_means[name]).abs().max()
        # Up to the rounding of the bias itself, half of input scale times weight scale.
        assert error < 1e-3 < (before[name] - float_means[name]).abs().max()
    changed = {n for n, p in net.named_parameters()
               if not torch.equal(p, untouched.get_parameter(n))}  # fmt: skip
    assert changed == set(EXPECTED.values())
    assert all(
        torch.equal(value, untouched.get_buffer(name)) for name, value in net.named_buffers()
    )


def test_the_batch_norm_behind_a_layer_takes_its_correction():
    batches = [images()]
    net = quantized(batches)
    reference = copy.deepcopy(net)
    correct_bias(net, forward, batches)
    shift = (
        means(reference, batches, False)["conv:conv2d:0"]
        - means(reference, batches, True)["conv:conv2d:0"]
    )
    factor = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    assert torch.allclose(net.norm.bias - reference.norm.bias, shift * factor, atol=1e-6)


def test_over_several_batches_next_to_nothing_is_left():
    batches = [images(seed, n) for seed, n in ((1, 16), (2, 16), (3, 16), (4, 16))]
    net = quantized(batches)
    float_means, before = means(net, batches, False), means(net, batches, True)
    result = correct_bias(net, forward, iter(batches))
    after = means(net, batches, True)
    assert result.num_batches == 4
    for name in ("biased:conv2d:0", "head:linear:0"):
        left = (after[name] - float_means[name]).norm() / (before[name] - float_means[name]).norm()
        assert left < 0.1
    shifts = {layer.layer: layer.shift for layer in result.layers}
    assert all(0 < shift < 1 for shift in shifts.values())


def test_what_is_left_alone_says_why():
    batches = [images()]
    result = correct_bias(quantized(batches), forward, batches)
    assert result.left_alone == {
        "bare": "neither it nor a batch norm behind it has a bias",
        "shared": "several calls share shared.bias",
    }
    assert "norm.bias" in str(result)
    assert "shared skipped: several calls share" in str(result)


def test_integers_have_the_corrected_biases_and_modes_stay():
    batches = [images()]
    net = quantized(batches, bits=8).train()
    correct_bias(net, forward, batches)
    assert net.training
    assert net.norm.training
    assert net.quantization.quantizing
    net.eval()
    with torch.no_grad():
        expected = net(batches[0])
        assert torch.allclose(integer_network(net)(batches[0]), expected, atol=0.05)


def test_float_weights_stand_for_those_that_were_changed():
    batches = [images()]
    net = quantized(batches)
    expected = copy.deepcopy(net)
    correct_bias(expected, forward, batches)
    weight = net.biased.weight.detach().clone()
    with torch.no_grad():
        net.biased.weight.copy_(net.quantization.weight("biased.weight")(weight))
    correct_bias(net, forward, batches, float_weights={"biased.weight": weight})
    assert torch.allclose(net.biased.bias, expected.biased.bias, atol=1e-6)
    assert not torch.equal(net.biased.weight, weight)


def test_refusals():
    batches = [images()]
    net = quantized(batches)
    with pytest.raises(ValueError, match="there was no batch to take means from; give at least"):
        correct_bias(net, forward, [])
    with pytest.raises(
        ValueError, match=r"outputs of 'conv' are NaN or infinite. Look at the input"
    ):
        correct_bias(net, forward, [batches[0] * torch.nan])
    remove_quantization(net)
    with pytest.raises(ValueError, match="is not quantized"):
        correct_bias(net, forward, batches)
    prepare(net, QuantizationScheme(), lambda model: model(batches[0]))
    with pytest.raises(ValueError, match="no ranges yet; calibrate it first"):
        correct_bias(net, forward, batches)

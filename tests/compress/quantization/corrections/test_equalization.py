import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lit_compress.compress.quantization.corrections.equalization import equalize
from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme


def images(n: int = 4, channels: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


def spread_out(net: nn.Module, seed: int = 0) -> nn.Module:
    """Weights and batch norms of very different channels, statistics away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.copy_(uniform(module.running_mean, -1, 1))
                module.running_var.copy_(uniform(module.running_var, 0.1, 2))
                if module.weight is not None:
                    module.weight.copy_(uniform(module.weight, -2, 2))
                    module.bias.copy_(uniform(module.bias, -1, 1))
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                for parameter in module.parameters():
                    size = torch.exp(uniform(parameter[:, ..., :1] if parameter.dim() > 1
                                             else parameter, -2, 2))  # fmt: skip
                    parameter.copy_(uniform(parameter, -1, 1) * size)
    return net.eval()


def mobile() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 1), nn.LeakyReLU(0.1), nn.MaxPool2d(2), nn.Dropout(),
        nn.Conv2d(12, 12, 1, groups=3), nn.BatchNorm2d(12, eps=0.1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10), nn.PReLU(10), nn.Linear(10, 5),
    )  # fmt: skip


def relative_error(one: Tensor, other: Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


@pytest.mark.parametrize("balance", ["activations", "weights"])
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000))
def test_the_function_stays_the_same(balance, seed):
    net = spread_out(mobile(), seed)
    x, expected = images(seed=seed), copy.deepcopy(net)
    result = equalize(net, lambda model: model(x), balance=balance)
    with torch.no_grad():
        assert relative_error(net(x), expected(x)) <= 1e-5
    assert [(p.first, p.second) for p in result.pairs] == [
        ("0", "3"), ("3", "6"), ("6", "10"), ("10", "15"), ("15", "17")
    ]  # fmt: skip
    assert list(result.left_alone) == ["17"]
    assert not torch.equal(net[3].weight, expected[3].weight)


def test_batch_norm_goes_on_as_it_would_have():
    net, original = spread_out(mobile()), spread_out(mobile())
    equalize(net, lambda model: model(images()))
    assert torch.equal(net[1].running_mean, original[1].running_mean)
    assert torch.equal(net[1].running_var, original[1].running_var)
    assert torch.equal(net[0].weight, original[0].weight)
    for model in (net, original):
        model.train()
        model[9].p = 0.0
    assert relative_error(net(images(seed=2)), original(images(seed=2))) <= 1e-5
    assert torch.allclose(net[1].running_var, original[1].running_var)


def ranges_of_inputs(weight: Tensor, groups: int = 1) -> Tensor:
    by_group = weight.detach().abs().flatten(2).amax(2).unflatten(0, (groups, -1))
    return by_group.amax(1).flatten()


def test_weights_in_balance_have_equal_ranges_on_both_sides():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2))
    spread_out(net)
    equalize(net, lambda model: model(images()), balance="weights")
    written = net[0].weight.detach().abs().flatten(1).amax(1)
    read = ranges_of_inputs(net[2].weight, groups=2)
    ratio = read / written
    assert torch.allclose(ratio, ratio.mean().expand(6), rtol=1e-4)


def test_a_depthwise_reader_gets_an_even_activation():
    net = spread_out(mobile())
    with torch.no_grad():
        before = net[:3](images()).amax((0, 2, 3))
        result = equalize(net, lambda model: model(images()))
        after = net[:3](images()).amax((0, 2, 3))
    alive = before > before.max() / 128
    assert before[alive].max() / before[alive].min() > 2
    assert torch.allclose(after[alive], after[alive].mean().expand(int(alive.sum())), rtol=1e-4)
    assert torch.allclose(after[~alive], before[~alive])
    assert result.pairs[0].activation_spread[1] < result.pairs[0].activation_spread[0]
    assert "0 -> 3" in str(result)
    assert "17 skipped: the network returns what it gives" in str(result)


def test_dead_channels_stay_as_they_are():
    net = spread_out(mobile())
    with torch.no_grad():
        net[0].weight[2] = 0
        net[1].weight[3] = 0
        net[1].bias[3] = -1
        net[6].weight[:, 5] = 0
    original = copy.deepcopy(net)
    for balance in ("weights", "activations"):
        equalize(net, lambda model: model(images()), balance=balance)
        with torch.no_grad():
            assert relative_error(net(images()), original(images())) <= 1e-5
    assert torch.equal(net[1].bias[3], original[1].bias[3])
    assert torch.equal(net[4].weight[5], original[4].weight[5])
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_zeros_stay_zero():
    net = spread_out(mobile())
    with torch.no_grad():
        masks = [p.abs() > p.abs().median() for p in net.parameters()]
        for parameter, mask in zip(net.parameters(), masks, strict=True):
            parameter.mul_(mask)
    equalize(net, lambda model: model(images()))
    for parameter, mask in zip(net.parameters(), masks, strict=True):
        assert (parameter[~mask] == 0).all()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.clipped = nn.Conv2d(6, 6, 1)
        self.bent = nn.Conv2d(6, 6, 1)
        self.twice = nn.Conv2d(6, 6, 1)
        self.normed = nn.Conv2d(6, 6, 1)
        self.norm = nn.BatchNorm2d(6, affine=False)
        self.tied = nn.Conv2d(6, 6, 1)
        self.looked_at = nn.Conv2d(6, 6, 1)
        self.wide = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6 * 64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.two(F.relu(self.one(x))))
        x = F.silu(self.bent(F.relu6(self.clipped(x))))
        x = self.twice(F.relu(self.twice(x)))
        x = F.conv2d(F.relu(self.norm(self.normed(x))), self.tied.weight * 1.0)
        x = F.relu(self.looked_at(x)) + self.looked_at.weight.square().sum()
        return self.head(self.wide(x).flatten(1))


def test_what_is_left_alone_says_why():
    net = spread_out(Branches())
    original = copy.deepcopy(net)
    result = equalize(net, lambda model: model(images()))
    reasons = {
        "stem": "2 calls take",
        "two": "add does not let",
        "clipped": "relu6 clips",
        "bent": "silu does not let",
        "twice": "shares twice.weight",
        "normed": "no weights",
        ":conv2d:0": "computed in forward",
        "looked_at": "shares looked_at.weight",
        "wide": "flatten does not let",
        "head": "returns",
    }
    assert list(result.left_alone) == list(reasons)
    for name, reason in reasons.items():
        assert reason in result.left_alone[name]
    assert [(p.first, p.second) for p in result.pairs] == [("one", "two")]
    changed = {
        n for n, p in net.named_parameters() if not torch.equal(p, original.get_parameter(n))
    }
    assert changed == {"one.weight", "one.bias", "two.weight"}


def test_tokens_between_linear_layers():
    net = spread_out(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4)))
    x, original = torch.randn(2, 5, 6), copy.deepcopy(net)
    assert len(equalize(net, lambda model: model(x)).pairs) == 1
    assert relative_error(net(x), original(x)) <= 1e-5


def test_quantized_depthwise_nets_come_nearer_to_the_float_one():
    errors = {}
    for equalized in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6))
        with torch.no_grad():
            factors = (2.0 ** torch.arange(6)).reshape(-1, 1, 1, 1)
            net[0].weight.div_(factors)
            net[2].weight.mul_(factors)
            expected = net(images(64, seed=5))
        if equalized:
            equalize(net, lambda model: model(images(64)))
        prepare(net, QuantizationScheme(activation_bits=5), lambda model: model(images()))
        calibrate(net, lambda model, batch: model(batch), [images(64)], ranges="minmax")
        with torch.no_grad():
            errors[equalized] = relative_error(net(images(64, seed=5)), expected)
    assert errors[True] < 0.5 * errors[False]


def test_refusals():
    net = spread_out(mobile())
    with pytest.raises(ValueError, match="balance is 'both'; choose one of activations, weights"):
        equalize(net, lambda model: model(images()), balance="both")
    for value in (0, True, 1.5):
        with pytest.raises(ValueError, match=r"max_iterations is .*; give a whole number from 1"):
            equalize(net, lambda model: model(images()), max_iterations=value)
    with pytest.raises(ValueError, match="must call the network itself"):
        equalize(net, lambda model: None)
    with pytest.raises(ValueError, match="NaN or infinite. Look at the weights and at the inputs"):
        equalize(net, lambda model: model(images() * torch.nan))
    prepare(net, QuantizationScheme(), lambda model: model(images()))
    with pytest.raises(ValueError, match="is quantized already.*equalize it before prepare"):
        equalize(net, lambda model: model(images()))

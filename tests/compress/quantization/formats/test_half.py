import copy
import io
import json
import pickle

import pytest
import torch
from torch import Tensor, nn

from lit_compress.compress.quantization.formats.half import HalfPrecision, apply_half, to_half

DTYPES = [torch.float16, torch.bfloat16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.norm = nn.GroupNorm(4, 16)
        self.attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 5)
        self.register_buffer("mask", torch.full((3,), -torch.inf))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, list[Tensor]]:
        x = self.norm(self.bn(self.conv(x)).relu())
        x = self.attention(x.flatten(2).transpose(1, 2)).mean(1)
        logits = self.head(x) if scale is None else self.head(x) * scale
        return {"logits": [logits, logits.argmax(1)]}


def built(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net()
    net(torch.randn(4, 3, 6, 6))
    return net.eval()


def logits(net: nn.Module, **kwargs: Tensor) -> Tensor:
    with torch.no_grad():
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
        return net(x, **kwargs)["logits"][0]


def stored_bytes(net: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    return len(file.getvalue())


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_goes_in_and_out_and_the_result_is_near(dtype):
    net = built()
    expected = logits(net)
    to_half(net, dtype)
    result = net(torch.randn(4, 3, 6, 6))["logits"]
    assert (result[0].dtype, result[1].dtype) == (torch.float32, torch.long)
    error = (logits(net) - expected).norm() / expected.norm()
    assert 0 < error < (2e-3 if dtype == torch.float16 else 3e-2)
    scaled = logits(net, scale=torch.tensor(2.0))
    torch.testing.assert_close(scaled, 2 * logits(net), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_with_statistics_stay_and_all_else_is_half(dtype):
    net = built()
    record = to_half(net, dtype)
    kept = {"bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"}
    assert set(record.kept) == kept
    for name, value in net.state_dict().items():
        if value.is_floating_point():
            assert value.dtype == (torch.float32 if name in kept else dtype), name
    assert net.count.dtype == torch.long
    assert torch.isinf(net.mask).all()


def test_size_halves():
    net = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    dense = stored_bytes(net)
    to_half(net)
    assert stored_bytes(net) < 0.52 * dense


def test_training_mode_updates_statistics_in_float32():
    net = built().train()
    to_half(net, torch.bfloat16)
    before = net.bn.running_var.clone()
    net(torch.randn(4, 3, 6, 6))["logits"][0].sum().backward()
    assert net.bn.running_var.dtype == torch.float32
    assert not torch.equal(net.bn.running_var, before)
    assert torch.isfinite(net.conv.weight.grad).all()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.InstanceNorm1d(6, affine=True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_norms_take_half_inputs(norm, dtype):
    net = nn.Sequential(nn.Conv1d(2, 6, 3), copy.deepcopy(norm)).eval()
    x = torch.randn(3, 2, 9)
    expected = net(x)
    to_half(net, dtype)
    torch.testing.assert_close(net(x), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
def test_record_and_state_dict_make_the_same_network_again(tmp_path, dtype):
    net = built()
    record = to_half(net, dtype)
    torch.save({"state_dict": net.state_dict(), "record": record.to_plain()}, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=True)
    other = built(seed=5)
    again = HalfPrecision.from_plain(json.loads(json.dumps(loaded["record"])))
    assert again == record
    apply_half(other, again)
    other.load_state_dict(loaded["state_dict"])
    assert torch.equal(logits(other), logits(net))


def test_copies_and_pickles_work():
    net = built()
    to_half(net, torch.bfloat16)
    assert torch.equal(logits(copy.deepcopy(net)), logits(net))
    assert torch.equal(logits(pickle.loads(pickle.dumps(net))), logits(net))


def test_parameters_stay_the_same_objects_and_tied_ones_tied():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    first = net[0].weight
    net(torch.ones(1, 4)).sum().backward()
    to_half(net, torch.bfloat16)
    assert net[0].weight is net[1].weight is first
    assert first.dtype == torch.bfloat16
    assert first.grad is None


def test_values_beyond_the_range_are_refused_and_nothing_changes():
    net = built()
    with torch.no_grad():
        net.head.weight[1, 2] = -7e4
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"'head.weight' holds -70000, .*65504.*torch.bfloat16"):
        to_half(net)
    for name, value in net.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert to_half(net, torch.bfloat16).dtype == "bfloat16"


def test_values_too_small_are_counted():
    net = nn.Linear(4, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1e-9, 0.0, 1.0, -1e-12]]))
        net.bias.zero_()
    assert to_half(net).num_flushed == {"weight": 2}
    assert net.weight.tolist() == [[0, 0, 1, 0]]


def test_nan_is_refused():
    net = built()
    with torch.no_grad():
        net.conv.weight[0] = torch.nan
    with pytest.raises(ValueError, match="'conv.weight' holds NaN"):
        to_half(net)


def test_other_types_and_a_second_time_are_refused():
    net = built()
    for dtype in (torch.float32, torch.int8, "float16"):
        with pytest.raises(ValueError, match="expected torch.float16 or torch.bfloat16"):
            to_half(net, dtype)
    to_half(net)
    with pytest.raises(ValueError, match="Net is in half precision already"):
        to_half(net)


@pytest.mark.parametrize("plain", [{}, None, [], {"dtype": "int8", "kept": [], "num_flushed": {}}])
def test_what_is_no_record_is_refused(plain):
    with pytest.raises(ValueError, match="no record of half precision"):
        HalfPrecision.from_plain(plain)

"""Checkpoints in packed files: the same outputs bit by bit, in as many bytes as integers need."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_compress import load_compressed
from lit_compress.compress.packing.checkpoint import write_packed_checkpoint
from lit_compress.compress.packing.packed_file import read_packed, write_packed
from lit_compress.compress.quantization.network import calibrate, prepare, quantized_network
from lit_compress.compress.quantization.post_training import (
    PostTrainingScheme,
    quantize_after_training,
)
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.compress.weight_files import load_checkpoint, read_checkpoint
from tests.slim_nets import chain, cut, widths


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    """A ResNet of one stage."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(torch.relu(self.bn(self.stem(x)))).mean((2, 3)))


def images(seed: int = 1) -> Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained(seed: int = 0, width: int = 24) -> Residual:
    torch.manual_seed(seed)
    net = Residual(width)
    net(images(seed=5))
    return net.eval()


def loaded(path, width: int = 24) -> Residual:
    net = trained(seed=9, width=width)
    assert load_compressed(path, net) is net
    return net.eval()


@pytest.mark.parametrize(
    ("scheme", "least_ratio"),
    [
        (PostTrainingScheme(), 2.8),
        (PostTrainingScheme(weight_bits=4), 5.0),
        (PostTrainingScheme("dynamic", weight_bits=3), 6.0),
        (PostTrainingScheme("weight_only", weight_bits=2), 8.0),
        (PostTrainingScheme("bfloat16"), 1.8),
        (PostTrainingScheme("fixed_point"), 2.8),
    ],
    ids=lambda value: f"{value.method}{value.weight_bits}" if hasattr(value, "method") else "",
)
def test_outputs_come_back_bit_by_bit(scheme, least_ratio, tmp_path):
    net = trained()
    floats = write_packed_checkpoint(tmp_path / "float.packed", net)
    assert torch.equal(loaded(tmp_path / "float.packed")(images()), net(images()))
    quantize_after_training(net, scheme, [images(2), images(3)])
    size = write_packed_checkpoint(tmp_path / "q.packed", net)
    assert size == (tmp_path / "q.packed").stat().st_size
    assert floats / size > least_ratio
    again = loaded(tmp_path / "q.packed")
    assert torch.equal(again(images()), net(images()))
    # What was loaded packs into the same bytes of content.
    assert write_packed_checkpoint(tmp_path / "again.packed", again) == pytest.approx(
        size, rel=0.01
    )
    assert torch.equal(loaded(tmp_path / "again.packed")(images()), net(images()))


@pytest.mark.parametrize("ranges", ["minmax", "learned"])
def test_trained_quantizers_come_back_bit_by_bit(ranges, tmp_path):
    net = trained()
    activations = "learned" if ranges == "learned" else "observed"
    scheme = QuantizationScheme(5, 8, weight_ranges=ranges, activation_ranges=activations)
    prepare(net, scheme, lambda n: n(images()))
    calibrate(net, lambda n, x: n(x), [images(2)])
    write_packed_checkpoint(tmp_path / "q.packed", net)
    again = loaded(tmp_path / "q.packed")
    assert torch.equal(again(images()), net(images()))
    assert torch.equal(again.fc.weight, quantized_network(net).weight("fc.weight")(net.fc.weight))
    packed = read_packed(tmp_path / "q.packed")
    assert {i.bits for i in packed.integers.values()} == {5}
    assert set(packed.integers) == {n for n, p in net.named_parameters() if p.dim() > 1}


def test_sparse_weights_take_less(tmp_path):
    sizes = {}
    for sparsity in (0.0, 0.8):
        net = trained()
        with torch.no_grad():
            for p in net.parameters():
                if p.dim() > 1:
                    p.mul_(
                        torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) >= sparsity
                    )
        quantize_after_training(net, PostTrainingScheme(), [images(2)])
        sizes[sparsity] = write_packed_checkpoint(tmp_path / "q.packed", net)
        again = loaded(tmp_path / "q.packed")
        assert torch.equal(again(images()), net(images()))
        assert bool((again.fc.weight[net.fc.weight == 0] == 0).all())
    assert sizes[0.8] < 0.45 * sizes[0.0]


def test_a_slim_network_comes_back_slim(tmp_path):
    x = torch.randn(4, 1, 6, 6)
    net, fresh = chain().eval(), chain().eval()
    cut(net, 4, 5)
    quantize_after_training(net, PostTrainingScheme(), [x])
    write_packed_checkpoint(tmp_path / "q.packed", net)
    load_compressed(tmp_path / "q.packed", fresh)
    assert widths(fresh) == (4, 5)
    assert torch.equal(fresh(x), net(x))


def test_weights_that_are_used_in_floating_point_too_are_kept(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 16)
            self.mix = nn.Linear(16, 16)
            self.out = nn.Linear(16, 10, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(torch.relu(self.mix(self.embed(tokens))))

    tokens = torch.arange(10)
    torch.manual_seed(0)
    net, fresh = Tied().eval(), Tied().eval()
    quantize_after_training(net, PostTrainingScheme(weight_bits=4), [tokens])
    write_packed_checkpoint(tmp_path / "q.packed", net)
    assert set(read_packed(tmp_path / "q.packed").integers) == {"mix.weight"}
    load_compressed(tmp_path / "q.packed", fresh)
    assert torch.equal(fresh(tokens), net(tokens))


def test_a_network_that_is_not_rounding_keeps_its_weights(tmp_path):
    net = trained()
    quantize_after_training(net, PostTrainingScheme(), [images(2)])
    quantized_network(net).set_mode(observing=False, quantizing=False)
    write_packed_checkpoint(tmp_path / "q.packed", net)
    again = loaded(tmp_path / "q.packed")
    assert torch.equal(again.fc.weight, net.fc.weight)
    assert torch.equal(again(images()), net(images()))


def test_a_packed_file_loads_under_a_prefix(tmp_path):
    net = trained()
    quantize_after_training(net, PostTrainingScheme(), [images(2)])
    write_packed_checkpoint(tmp_path / "q.packed", nn.ModuleDict({"model": net}))
    assert torch.equal(loaded(tmp_path / "q.packed")(images()), net(images()))


# --- What is refused ------------------------------------------------------------------------------


def test_weights_on_kernels_of_torchao(tmp_path):
    net = trained()
    quantize_after_training(net, PostTrainingScheme("int8_dynamic_linear"))
    with pytest.raises(ValueError, match=r"'fc.weight' is a Int8Tensor, .* save a checkpoint"):
        write_packed_checkpoint(tmp_path / "q.packed", net)
    assert not list(tmp_path.iterdir())


def test_a_class_that_a_packed_file_does_not_know_how_to_build(tmp_path):
    write_packed_checkpoint(tmp_path / "q.packed", trained())
    with pytest.raises(ValueError, match="does not say how to build a LightningModule. Build one"):
        load_compressed(tmp_path / "q.packed", LightningModule)


def test_integers_without_scales(tmp_path):
    net = trained()
    quantize_after_training(net, PostTrainingScheme(), [images(2)])
    write_packed_checkpoint(tmp_path / "q.packed", net)
    content = read_packed(tmp_path / "q.packed")
    write_packed(tmp_path / "bare.packed", content.state_dict, content.integers)
    with pytest.raises(ValueError, match="as integers and no scales for them"):
        read_checkpoint(tmp_path / "bare.packed")


def test_a_damaged_file_is_named_and_left_alone(tmp_path):
    net, path = trained(), tmp_path / "q.packed"
    quantize_after_training(net, PostTrainingScheme(), [images(2)])
    write_packed_checkpoint(path, net)
    whole = path.read_bytes()
    for length in (len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"q.packed' cannot be read"):
            load_compressed(path, trained())
        assert path.read_bytes() == whole[:length]


def test_a_packed_file_of_another_network(tmp_path):
    net = trained()
    quantize_after_training(net, PostTrainingScheme(), [images(2)])
    write_packed_checkpoint(tmp_path / "q.packed", net)
    other = trained(width=16)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"do not fit Residual: 'stem.weight' has shape"):
        load_checkpoint(other, read_checkpoint(tmp_path / "q.packed"), "q.packed", "")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())

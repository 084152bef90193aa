"""The first convolution on blocks of pixels computes what it did with a stride."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.deploy import export, load_file
from lit_compress.deploy.onnx_stem import on_blocks, put_stem_on_blocks
from tests.deploy.nets import small_net


def space_to_depth(x, size):
    """ONNX's operator: channels in the order row in the block, column in the block, channel."""
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // size, size, w // size, size)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(n, c * size * size, h // size, w // size)


def padded(x, pads):
    top, left, bottom, right = pads
    return F.pad(x, (left, right, top, bottom))


@settings(deadline=None, max_examples=60)
@given(
    stride=st.integers(2, 4),
    kernel=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    pads=st.tuples(*[st.integers(0, 4)] * 4),
    blocks=st.tuples(st.integers(3, 6), st.integers(3, 6)),
    channels=st.integers(1, 4),
)
def test_the_same_sums(stride, kernel, pads, blocks, channels):
    size = [count * stride for count in blocks]
    x = torch.randint(-9, 10, (2, channels, *size)).double()
    weight = torch.randint(-9, 10, (5, channels, *kernel)).double()
    if any(length + pads[d] + pads[d + 2] < kernel[d] for d, length in enumerate(size)):
        return
    expected = F.conv2d(padded(x, pads), weight, stride=stride)
    folded, new_pads = on_blocks(weight, stride, pads, size)
    found = F.conv2d(padded(space_to_depth(x, stride), new_pads), folded)
    assert torch.equal(found, expected)
    assert folded.count_nonzero() == weight.count_nonzero()


def test_the_stem_of_resnets_gets_four_by_four_weights():
    folded, pads = on_blocks(torch.randn(64, 3, 7, 7), 2, [3, 3, 3, 3], [224, 224])
    assert folded.shape == (64, 12, 4, 4)
    assert pads == [2, 2, 1, 1]
    folded, pads = on_blocks(torch.randn(32, 3, 3, 3), 2, [1, 1, 1, 1], [224, 224])
    assert folded.shape == (32, 12, 2, 2)
    assert pads == [1, 1, 0, 0]


def quantized(stem, pixels=12):
    net = small_net()
    net.conv1 = stem
    x = torch.randn(8, stem.in_channels, pixels, pixels, generator=torch.Generator().manual_seed(3))
    prepare(net, QuantizationScheme(), lambda network: network(x))
    calibrate(net, lambda network, batch: network(batch), [x])
    return net, x


def written(stem, tmp_path, monkeypatch=None, pixels=12):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    net, x = quantized(stem, pixels)
    path = export(net, "ort-int8", tmp_path / "net.onnx", x).path
    return onnx.load(str(path)), path, x


@pytest.mark.parametrize(
    "stem",
    [
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(3, 8, 7, stride=2, padding=3),
        nn.Conv2d(1, 8, 4, stride=4),
    ],
)
def test_a_file_is_rewritten_and_gives_the_same_bits(stem, tmp_path, monkeypatch):
    from lit_compress.deploy import onnx as onnx_route
    from lit_compress.deploy.onnx import fused_operators

    torch.manual_seed(0)
    model, path, x = written(stem, tmp_path)
    assert [node.op_type for node in model.graph.node].count("SpaceToDepth") == 1
    assert fused_operators(path)["QLinearConv"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(onnx_route, "put_stem_on_blocks", lambda graph: False)
        (tmp_path / "plain").mkdir()
        plain, plain_path, _ = written(stem, tmp_path / "plain")
    assert "SpaceToDepth" not in [node.op_type for node in plain.graph.node]
    with load_file(path) as folded, load_file(plain_path) as strided:
        assert torch.equal(folded((x,))[0], strided((x,))[0])


@pytest.mark.parametrize(
    ("stem", "pixels"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 12),  # no stride
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), 13),  # blocks do not divide the images
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), 12),  # enough channels as it is
        (nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2), 12),
        (nn.Conv2d(3, 8, (3, 3), stride=(2, 1), padding=1), 12),
        (nn.Conv2d(3, 8, 1, stride=2), 12),  # most of the blocks would be multiplied by zero
    ],
)
def test_others_are_left_as_they_are(stem, pixels, tmp_path):
    model, _, _ = written(stem, tmp_path, pixels=pixels)
    assert "SpaceToDepth" not in [node.op_type for node in model.graph.node]
    before = model.SerializeToString()
    assert put_stem_on_blocks(model.graph) is False
    assert model.SerializeToString() == before

"""The first convolution on blocks of pixels computes what it did with a stride."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.deploy import export
from lit_compress.deploy.onnx_stem import on_blocks, put_stem_on_blocks
from tests.deploy.nets import images, small_net


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


def model_of(stem, pixels=12):
    """A quantized image, a convolution with int8 weights, a quantized result; as ONNX."""
    onnx = pytest.importorskip("onnx")
    make, kinds = onnx.helper.make_node, onnx.TensorProto
    out, channels = stem.out_channels, stem.in_channels
    weight = torch.randint(-64, 65, stem.weight.shape, dtype=torch.int8)  # none saturate
    (top, left), (kh, kw) = stem.padding, stem.kernel_size
    settings = {
        "kernel_shape": [kh, kw],
        "strides": list(stem.stride),
        "pads": [top, left, top, left],
        "dilations": list(stem.dilation),
        "group": stem.groups,
    }
    nodes = [
        make("QuantizeLinear", ["image", "xs", "xz"], ["q"]),
        make("DequantizeLinear", ["q", "xs", "xz"], ["x"]),
        make("DequantizeLinear", ["weight", "ws", "wz"], ["w"], axis=0),
        make("Conv", ["x", "w"], ["y"], **settings),
        make("QuantizeLinear", ["y", "ys", "yz"], ["yq"]),
        make("DequantizeLinear", ["yq", "ys", "yz"], ["out"]),
    ]
    tensor = onnx.helper.make_tensor
    constants = [
        tensor("weight", kinds.INT8, weight.shape, weight.numpy().tobytes(), raw=True),
        tensor("ws", kinds.FLOAT, [out], [0.01] * out),
        tensor("wz", kinds.INT8, [out], [0] * out),
        tensor("xs", kinds.FLOAT, [], [0.03]),
        tensor("xz", kinds.UINT8, [], [120]),
        tensor("ys", kinds.FLOAT, [], [0.1]),
        tensor("yz", kinds.UINT8, [], [128]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "stem",
        [value("image", kinds.FLOAT, ["batch", channels, pixels, pixels])],
        [value("out", kinds.FLOAT, ["batch", out, "height", "width"])],
        constants,
    )
    versions = [onnx.helper.make_opsetid("", 18)]
    return onnx.helper.make_model(graph, opset_imports=versions, ir_version=9)


def kinds_of(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize(
    "stem",
    [
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(3, 8, 7, stride=2, padding=3),
        nn.Conv2d(1, 8, (4, 5), stride=4, padding=(0, 2)),
    ],
)
def test_a_graph_is_rewritten_and_gives_the_same_bits(stem):
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = model_of(stem)
    x = torch.randn(3, stem.in_channels, 12, 12).numpy()

    def run():
        onnx.checker.check_model(model, full_check=True)
        session = runtime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        return torch.from_numpy(session.run(None, {"image": x})[0])

    expected = run()
    assert put_stem_on_blocks(model.graph) is True
    assert kinds_of(model)[0] == "SpaceToDepth"
    assert torch.equal(run(), expected)
    assert expected.unique().numel() > 10
    assert put_stem_on_blocks(model.graph) is False  # once is enough


@pytest.mark.parametrize(
    ("stem", "pixels"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 12),  # no stride
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), 13),  # blocks do not divide the images
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), "side"),  # of a size that is not known
        (nn.Conv2d(6, 8, 3, stride=2, padding=1), 12),  # enough channels as it is
        (nn.Conv2d(3, 9, 3, stride=2, padding=1, groups=3), 12),
        (nn.Conv2d(3, 8, 3, stride=2, padding=2, dilation=2), 12),
        (nn.Conv2d(3, 8, (3, 3), stride=(2, 1), padding=1), 12),
        (nn.Conv2d(3, 8, 1, stride=2), 12),  # most of the blocks would be multiplied by zero
    ],
)
def test_others_are_left_as_they_are(stem, pixels):
    model = model_of(stem, pixels)
    before = model.SerializeToString()
    assert put_stem_on_blocks(model.graph) is False
    assert model.SerializeToString() == before


@pytest.mark.parametrize("reader", ["q", "x", "w", "weight"])
def test_what_something_else_reads_too_stays(reader):
    model = model_of(nn.Conv2d(3, 8, 3, stride=2, padding=1))
    other = type(model.graph.node[0])(op_type="Identity", input=[reader], output=["other"])
    model.graph.node.append(other)
    assert put_stem_on_blocks(model.graph) is False


def test_an_exported_network_begins_with_blocks(tmp_path):
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    from lit_compress.deploy.onnx import fused_operators

    net = small_net()
    net.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    x = images(8)
    prepare(net, QuantizationScheme(), lambda network: network(x))
    calibrate(net, lambda network, batch: network(batch), [x])
    done = export(net, "ort-int8", tmp_path / "net.onnx", x)
    assert done.parity.cosine > 0.999
    assert kinds_of(onnx.load(str(done.path)))[0] == "SpaceToDepth"
    kernels = fused_operators(done.path)
    assert kernels["QLinearConv"] == 3
    assert "Conv" not in kernels

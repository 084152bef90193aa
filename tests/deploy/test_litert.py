"""LiteRT: results of quantized layers that lie on no grid."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_compress.deploy import export, load_file
from tests.deploy.nets import SmallUNet, images, quantized, quantized_net

pytestmark = pytest.mark.slow


def kinds_and_weights(path):
    """Kind of each operator and the dtype of its second input."""
    from ai_edge_litert.interpreter import Interpreter

    loaded = Interpreter(str(path))
    dtypes = {t["index"]: t["dtype"].__name__ for t in loaded.get_tensor_details()}
    return [
        (op["op_name"], dtypes.get(op["inputs"][1]) if len(op["inputs"]) > 1 else None)
        for op in loaded._get_ops_details()
    ]


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    pytest.importorskip("litert_torch")
    net = quantized_net()
    path = tmp_path_factory.mktemp("litert") / "net"
    return net, export(net, "litert", path, images(4))


def test_logits_beyond_those_of_calibration_are_not_clipped(logits):
    net, done = logits
    far = 4 * images(4, seed=5)  # what the input's grid holds of it is larger than what was seen
    with torch.no_grad():
        expected = net(far)
    low = copy.deepcopy(net).quantization.activation("head:linear:0")
    ends = torch.stack([low.low, low.high])
    assert (expected < ends[0]).any() or (expected > ends[1]).any()
    with load_file(done.path) as file:
        got = file((far,))[0]
    assert got.dtype == torch.float32
    assert F.cosine_similarity(got.flatten(), expected.flatten(), 0) > 0.999
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()


def test_weights_of_logits_are_stored_as_integers(logits):
    _net, done = logits
    assert ("FULLY_CONNECTED", "int8") in kinds_and_weights(done.path)


@pytest.mark.parametrize("last", ["conv", "grouped", "twice"])
def test_convolutions_at_the_end_are_not_clipped_either(last, tmp_path):
    pytest.importorskip("litert_torch")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    grouped = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=2))
    net = {"conv": SmallUNet(), "grouped": grouped, "twice": Twice()}[last]
    done = export(quantized(net, x), "litert", tmp_path / "net", x, check_inputs=[x, 2 * x])
    assert done.parity.cosine > 0.9999
    assert done.parity.max_relative_error < 0.01


class Twice(nn.Module):
    """One layer called twice, with integers behind it and with none."""

    def __init__(self):
        super().__init__()
        self.first, self.both = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return self.both(F.relu(self.both(F.relu(self.first(x)))))

"""Int8 files compute the same on processors whose kernels saturate, whatever runs these tests."""

import copy

import pytest
import torch
from torch import nn

from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.deploy import ParityTolerance, export, load_file
from lit_compress.tasks import build_model
from tests.deploy.nets import images, small_net

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ANY = ParityTolerance(cosine=0, argmax_agreement=0, max_error=1)


def quantized(net, batches, **scheme):
    net = copy.deepcopy(net).eval()
    prepare(net, QuantizationScheme(**scheme), lambda n: n(batches[0]))
    calibrate(net, lambda n, x: n(x), batches)
    return net


def positive(net):
    """All products have one sign: as much as can saturate does."""
    for name, parameter in net.named_parameters():
        if name.endswith("weight"):
            parameter.data.abs_()
    return net


def linear_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


NETS = {
    "convolutions": (small_net, lambda seed: images(8, seed)),
    "linear": (linear_layers, lambda seed: torch.rand(
        16, 32, generator=torch.Generator().manual_seed(seed))),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("scheme", "assume_vnni", "right"),
    [({}, False, True), ({"avoid_saturation": False}, False, True),
     ({"avoid_saturation": False}, True, False), ({"weight_bits": 4}, True, True)],
)  # fmt: skip
def test_on_any_processor(name, scheme, assume_vnni, right, tmp_path):
    from tests.deploy.avx2_kernels import run_on_avx2

    build, make = NETS[name]
    net = quantized(positive(build()), [make(1), make(2)], **scheme)
    x = make(3)
    done = export(net, "ort-int8", tmp_path / "net", x, tolerance=ANY, assume_vnni=assume_vnni)
    with torch.no_grad():
        expected = net(x)
    largest = expected.abs().max()
    exact = run_on_avx2(done.path, x, saturate=False)
    assert (exact - expected).abs().max() < 0.005 * largest
    simulated = run_on_avx2(done.path, x)
    assert ((simulated - expected).abs().max() < 0.005 * largest) == right
    if right:  # here, too
        with load_file(done.path) as file:
            assert (file((x,))[0] - expected).abs().max() < 0.005 * largest
    unsafe = "avoid_saturation" in scheme
    assert bool(done.slow_layers) == (unsafe and not assume_vnni)
    assert bool(done.needs_vnni) == (unsafe and assume_vnni)
    assert done.cpu
    assert ("any processor" in str(done)) == (not done.needs_vnni)
    assert ("avoid_saturation=True" in str(done)) == bool(done.slow_layers)


@pytest.mark.parametrize("name", ["resnet20", pytest.param("mobilenet_v1", marks=pytest.mark.slow)])
def test_networks(name, tmp_path):
    from tests.deploy.avx2_kernels import run_on_avx2

    torch.manual_seed(0)
    net = build_model(name, num_classes=10)
    batches = [torch.randn(4, 3, 32, 32) for _ in range(4)]
    for batch in batches[:3]:  # statistics of batch norms
        net.train()(batch)
    net = quantized(net, batches[:2])
    done = export(net, "ort-int8", tmp_path / "net", batches[3][:1], tolerance=ANY)
    assert not done.slow_layers
    x = batches[3][:1]
    exact, simulated = (run_on_avx2(done.path, x, saturate=s) for s in (False, True))
    assert torch.equal(exact, simulated)
    with torch.no_grad():
        assert torch.cosine_similarity(net(x), simulated).min() > 0.998


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [{}, {"avoid_saturation": False}])
@pytest.mark.parametrize(
    ("target", "package"),
    [("executorch", "executorch"), ("litert", "litert_torch"), ("inductor", "torch")],
)
def test_other_runtimes_are_right_on_this_processor(target, package, scheme, tmp_path):
    """XNNPACK adds in 32 bits; AOTInductor would saturate, and gets floats for such layers."""
    pytest.importorskip(package)
    net = quantized(positive(small_net()), [images(8, 1), images(8, 2)], **scheme)
    x = images(8, 3)
    done = export(net, target, tmp_path / "net", x, tolerance=ANY)
    assert done.parity.max_relative_error < 0.005
    assert bool(done.slow_layers) == (target == "inductor" and bool(scheme))

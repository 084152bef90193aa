"""Files written, run in their runtimes and compared; what is refused leaves no file."""

import builtins
import os

import pytest
import torch
from torch import nn

from lit_compress.compress.quantization.integers import integer_network
from lit_compress.deploy import (
    ExportError,
    MissingExtra,
    ParityError,
    ParityTolerance,
    export,
    load_file,
    recognize,
)
from lit_compress.deploy.flat_call import flat_inputs
from lit_compress.deploy.runtimes import ROUTES
from tests.deploy.nets import Nested, images, quantized_net, small_net

NEEDS = {
    "onnx": ("onnxruntime", "onnxscript"),
    "ort-int8": ("onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
    "executorch": ("executorch.runtime",),
    "litert": ("litert_torch", "ai_edge_litert"),
    "inductor": (),
}


def runtimes(*quick, slow=("executorch", "litert", "inductor")):
    return [*quick, *(pytest.param(target, marks=pytest.mark.slow) for target in slow)]


def need(target):
    for module in NEEDS[target]:
        pytest.importorskip(module)


@pytest.mark.parametrize("target", runtimes("onnx", "openvino"))
def test_a_float_network(target, tmp_path):
    need(target)
    net, x = small_net().train(), images(2)
    done = export(net, target, tmp_path / "net", x, check_inputs=[images(4), images(5, 7)])
    assert net.training
    assert done.path == tmp_path / f"net{ROUTES[target].suffix}"
    assert {*os.listdir(tmp_path)} == {f.name for f in ROUTES[target].files_of(done.path)}
    assert not done.integers
    assert done.batch_size == (None if target in ("onnx", "openvino") else 2)
    assert done.parity.cosine == pytest.approx(1, abs=1e-6)
    assert done.parity.max_abs_error < 1e-4
    assert done.parity.num_examples == 10
    sizes = [file.stat().st_size for file in ROUTES[target].files_of(done.path)]
    assert done.size_bytes == sum(sizes) > done.compressed_size_bytes
    assert "target" in str(done)
    assert recognize(done.path) == target
    with load_file(done.path) as loaded, torch.no_grad():
        assert torch.allclose(loaded((x,))[0], net.eval()(x), atol=1e-4)
        with pytest.raises(ValueError, match=r"takes \((any|2), 3, 12, 12\); came \(2, 3, 8, 8\)"):
            loaded((x[..., :8, :8],))


@pytest.mark.parametrize("target", runtimes("ort-int8", "openvino"))
def test_a_quantized_network(target, tmp_path):
    need(target)
    net, x = quantized_net(), images(1)
    before = {name: value.clone() for name, value in net.state_dict().items()
              if isinstance(value, torch.Tensor)}  # fmt: skip
    done = export(net, target, tmp_path / "net", x, check_inputs=[images(6, 5)])
    assert done.integers
    assert done.parity.cosine > 0.999
    after = net.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    spelled = integer_network(net, ROUTES[target].spelling)
    with load_file(done.path) as loaded, torch.no_grad():
        ours, theirs = spelled(x), loaded((x,))[0]
    assert torch.allclose(ours, theirs, atol=0.02 * float(ours.abs().max()))


def test_every_layer_becomes_an_integer_kernel(tmp_path):
    need("onnx")
    from lit_compress.deploy.onnx import fused_operators

    done = export(quantized_net(), "ort-int8", tmp_path / "net", images(1))
    assert done.batch_size is None
    kernels = fused_operators(done.path)
    assert kernels["QLinearConv"] == 3
    assert kernels.get("QGemm", 0) + kernels.get("QLinearMatMul", 0) == 1
    assert kernels["QLinearAdd"] == 1
    assert not {"Conv", "Gemm", "MatMul", "Add", "Relu", "Clip"} & set(kernels)


def test_threads_are_given_on(tmp_path):
    need("onnx")
    done = export(small_net(), "onnx", tmp_path / "net.onnx", images(), num_threads=2)
    with load_file(done.path, num_threads=2) as loaded:
        assert loaded._runner._loaded.get_session_options().intra_op_num_threads == 2


def test_nested_arguments_and_results(tmp_path):
    need("onnx")
    inputs = {"image": images(3), "scales": {"gain": torch.rand(3), "shift": torch.rand(3)}}
    done = export(Nested(), "onnx", tmp_path / "net", inputs)
    assert done.batch_size is None
    with load_file(done.path) as loaded:
        mean, whole, total = loaded(flat_inputs(inputs))
    expected = Nested()(**inputs)
    assert torch.allclose(mean, expected["mean"], atol=1e-5)
    assert torch.allclose(whole, expected["all"][0], atol=1e-5)
    assert torch.allclose(total, expected["all"][1], rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_network_that_fixes_its_batch_says_so(batch, tmp_path):
    need("onnx")

    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(batch, 3, 12, 12) + 1

    with pytest.warns(UserWarning, match=f"takes batches of {batch} only: Fixed itself"):
        done = export(Fixed(), "onnx", tmp_path / "net", images(batch))
    assert done.batch_size == batch


def test_float_networks_do_not_go_into_an_integer_file(tmp_path):
    with pytest.raises(ValueError, match="network of floats.*lit-compress quantize"):
        export(small_net(), "ort-int8", tmp_path / "net", images())
    assert os.listdir(tmp_path) == []


def test_beyond_the_tolerance_nothing_is_left_and_the_old_file_stays(tmp_path):
    need("onnx")

    class Modal(nn.Module):
        """Computes something else while it is exported."""

        def forward(self, x):
            return x.mean((2, 3)) * (-1 if torch.compiler.is_exporting() else 1)

    old = tmp_path / "net.onnx"
    old.write_bytes(b"old")
    with pytest.raises(ParityError, match=r"net\.onnx \(onnx\) does not compute.*not kept"):
        export(Modal(), "onnx", tmp_path / "net", images())
    assert os.listdir(tmp_path) == ["net.onnx"]
    assert old.read_bytes() == b"old"
    loose = ParityTolerance(cosine=0.0, argmax_agreement=0.0)
    with pytest.raises(ParityError, match="cosine -1"):
        export(Modal(), "onnx", tmp_path / "net", images(), tolerance=loose)


def test_what_a_runtime_cannot_take_is_named(tmp_path):
    need("onnx")

    class Branching(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ExportError, match="Branching cannot be written for onnx; its exporter"):
        export(Branching(), "onnx", tmp_path / "net", images())
    assert os.listdir(tmp_path) == []


def test_bad_calls(tmp_path):
    with pytest.raises(ValueError, match="target='tensorrt'; choose one of onnx, ort-int8"):
        export(small_net(), "tensorrt", tmp_path / "net", images())
    with pytest.raises(ValueError, match=r"SmallNet raised RuntimeError.*conv1.*on example_inputs"):
        export(small_net(), "onnx", tmp_path / "net", torch.zeros(1, 5, 8, 8))
    with pytest.raises(ValueError, match="check_inputs holds no batch"):
        export(small_net(), "onnx", tmp_path / "net", images(), check_inputs=[])
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export(small_net(), "onnx", tmp_path / "folder", images())


@pytest.mark.parametrize(
    ("target", "package", "extra"),
    [("onnx", "onnx", "onnx"), ("openvino", "openvino", "openvino"),
     ("executorch", "executorch", "executorch"), ("litert", "litert_torch", "litert")],
)  # fmt: skip
def test_a_missing_extra_says_how_to_install_it(target, package, extra, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=rf'pip install "lit-compress\[{extra}\]"'):
        export(small_net(), target, tmp_path / "net", images())
    assert os.listdir(tmp_path) == []

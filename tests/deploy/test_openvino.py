"""Two files that belong together, integer kernels, shapes and names in OpenVINO."""

import os
from collections import Counter

import pytest
import torch
from torch import nn

from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme
from lit_compress.deploy import ExportError, ParityError, benchmark_files, export, load_file
from lit_compress.deploy.flat_call import flat_inputs
from tests.deploy.nets import Nested, images, quantized_net, small_net

openvino = pytest.importorskip("openvino")


def layers_of(path):
    from lit_compress.deploy.openvino import run_kernels

    kinds = ("Convolution", "FullyConnected")
    return Counter(kernel for kernel in run_kernels(path) if kernel[0] in kinds)


def test_every_layer_takes_integers(tmp_path):
    done = export(quantized_net(), "openvino", tmp_path / "net", images(1))
    assert layers_of(done.path) == {("Convolution", "u8"): 3, ("FullyConnected", "u8"): 1}
    plain = export(small_net(), "openvino", tmp_path / "float", images(1))
    assert layers_of(plain.path) == {("Convolution", "f32"): 3, ("FullyConnected", "f32"): 1}


@pytest.mark.parametrize("bits", [4, 7])
def test_few_bits_take_integers_too_and_are_exact(bits, tmp_path):
    """Pairs of 7-bit weights cannot saturate 16 bits, whatever the processor."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3)).eval()
    x = torch.randn(2, 3, 12, 12)
    prepare(net, QuantizationScheme(weight_bits=bits), lambda network: network(x))
    calibrate(net, lambda network, batch: network(batch), [x])
    done = export(net, "openvino", tmp_path / "net", x)
    assert layers_of(done.path) == {("Convolution", "u8"): 2}
    assert done.parity.cosine > 0.9999


def test_settings_of_the_runtime(tmp_path):
    done = export(small_net(), "openvino", tmp_path / "net.xml", images(), num_threads=2)
    for threads in (1, 2):
        with load_file(done.path, threads) as loaded:
            compiled = loaded._runner._compiled
            assert compiled.get_property("INFERENCE_NUM_THREADS") == threads
            assert compiled.get_property("NUM_STREAMS") == 1
            assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
            assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_nested_arguments_keep_shapes_and_names(tmp_path):
    inputs = {"image": images(3), "scales": {"gain": torch.rand(3), "shift": torch.rand(3)}}
    done = export(Nested(), "openvino", tmp_path / "net", inputs)
    assert done.batch_size is None
    with load_file(done.path) as loaded:
        assert loaded.input_shapes == ((None, 3, 12, 12), (None,), (None,))
        mean, whole, total = loaded(flat_inputs(inputs))
    expected = Nested()(**inputs)
    assert torch.allclose(mean, expected["mean"], atol=1e-5)
    assert torch.allclose(whole, expected["all"][0], atol=1e-5)
    assert torch.allclose(total, expected["all"][1], rtol=1e-4)


def test_results_do_not_change_with_the_next_call(tmp_path):
    done = export(small_net(), "openvino", tmp_path / "net", images())
    with load_file(done.path) as loaded:
        (first,) = loaded((images(2, 7),))
        kept = first.clone()
        loaded((images(2, 8),))
    assert torch.equal(first, kept)


def test_a_failed_export_leaves_the_older_pair(tmp_path):
    class Modal(nn.Module):
        """Computes something else while it is exported."""

        def forward(self, x):
            return x.mean((2, 3)) * (-1 if torch.compiler.is_exporting() else 1)

    class Branching(nn.Module):
        def forward(self, x):
            return x if float(x.sum()) > 0 else -x

    old = {f"net.{end}": end.encode() for end in ("xml", "bin")}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)
    for net, error in ((Modal(), ParityError), (Branching(), ExportError)):
        with pytest.raises(error):
            export(net, "openvino", tmp_path / "net", images())
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
    export(small_net(), "openvino", tmp_path / "net", images())
    assert {*os.listdir(tmp_path)} == {*old}
    assert load_file(tmp_path / "net.xml").batch_size is None


def test_weights_of_something_else_are_not_overwritten(tmp_path):
    (tmp_path / "net.bin").write_bytes(b"a checkpoint")
    with pytest.raises(ValueError, match=r"net\.bin exists and would be overwritten.*another name"):
        export(small_net(), "openvino", tmp_path / "net", images())
    assert (tmp_path / "net.bin").read_bytes() == b"a checkpoint"


def test_missing_and_cut_off_weights_are_named(tmp_path):
    done = export(small_net(), "openvino", tmp_path / "net", images())
    weights = tmp_path / "net.bin"
    weights.write_bytes(weights.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"net\.xml cannot be loaded.*damaged.*export it again"):
        load_file(done.path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"its weights, net\.bin, are not beside it"):
        load_file(done.path)


def test_timed_beside_an_onnx_file(tmp_path):
    pytest.importorskip("onnxruntime")
    files = [
        export(small_net(), target, tmp_path / "net", images()).path
        for target in ("openvino", "onnx")
    ]
    result = benchmark_files(files, images(1), threads=1, batch_sizes=(1, 3), rounds=2, warmup=1)
    sizes = [p.stat().st_size for p in (*files, tmp_path / "net.bin")]
    assert [f.target for f in result.files] == ["openvino", "onnx"]
    assert [f.size_bytes for f in result.files] == [sizes[0] + sizes[2], sizes[1]]
    assert len(result.rows) == 4
    assert "openvino" in result.setting

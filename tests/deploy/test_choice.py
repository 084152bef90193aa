"""Forms of a quantized network, of which the fastest is kept."""

import os

import pytest
import torch
from torch.nn import functional as F

import lit_compress.deploy.choice as choice
from lit_compress.compress.quantization.integers import integer_network
from lit_compress.deploy import (
    ExportedFile,
    Parity,
    ParityError,
    ParityTolerance,
    export,
    export_fastest,
    load_file,
)
from lit_compress.deploy.benchmark_result import BenchmarkResult, FileLatency
from lit_compress.deploy.runtimes import ROUTES
from tests.deploy.nets import deep_gated_net, gated_net, images, quantized_net, small_net


def need_onnx():
    for module in ("onnxruntime", "onnxscript"):
        pytest.importorskip(module)


SAME = Parity(1.0, 0.0, 0.0, argmax_agreement=1.0, num_examples=1, num_positions=1)


@pytest.fixture
def stubs(monkeypatch):
    """Files of a byte or two, by form, and the form that is the fastest or beyond the tolerance."""
    said = {"fastest": "integers", "refused": ()}

    def export_as(network, target, path, example_inputs, spelling, **_):
        if path.name in said["refused"]:
            raise ParityError(f"{path.name} differs")
        file = path.with_suffix(".onnx")
        file.write_bytes(path.name.encode())
        return ExportedFile(file, target, spelling is not None, None, 1, 1, SAME, 0.0)

    def benchmark(files, example_inputs, *, threads, batch_sizes, **_):
        slow = [f.stem != said["fastest"] for f in files]
        setting = threads[0], batch_sizes[0]
        rows = [
            FileLatency(f.name, *setting, 1.0 + s, *[1.0] * 6)
            for f, s in zip(files, slow, strict=True)
        ]
        return BenchmarkResult((), tuple(rows), {})

    monkeypatch.setattr(choice, "export_as", export_as)
    monkeypatch.setattr(choice, "benchmark_files", benchmark)
    return said


@pytest.mark.parametrize("form", ["integers", "activations in float", "float"])
def test_the_fastest_form_is_kept(form, stubs, tmp_path):
    stubs["fastest"] = form.replace(" ", "_")
    done = export_fastest(gated_net(), "ort-int8", tmp_path / "new" / "net", images(2))
    assert done.form == form
    assert list(done.median_ms) == ["integers", "activations in float", "float"]
    assert done.file.path == tmp_path / "new" / "net.onnx"
    assert os.listdir(tmp_path / "new") == ["net.onnx"]
    assert done.file.path.read_bytes() == stubs["fastest"].encode()
    assert done.file.integers == (form != "float")
    assert f"{form} (kept)" in str(done)
    assert "timed on this machine" in str(done)


def test_a_form_beyond_the_tolerance_is_not_kept(stubs, tmp_path):
    stubs.update(fastest="float", refused=["float"])
    done = export_fastest(gated_net(), "ort-int8", tmp_path / "net", images(2))
    assert done.form == "integers"
    assert "float" not in done.median_ms
    assert "float was not timed: float differs" in str(done)
    stubs["refused"] = ["integers", "activations_in_float", "float"]
    with pytest.raises(ParityError, match="integers differs"):
        export_fastest(gated_net(), "ort-int8", tmp_path / "no", images(2))
    assert os.listdir(tmp_path) == ["net.onnx"]


def test_without_gates_there_are_two_forms(stubs, tmp_path):
    done = export_fastest(quantized_net(), "ort-int8", tmp_path / "net", images(1))
    assert set(done.median_ms) == {"integers", "float"}


def test_this_machine_times_them(tmp_path):
    need_onnx()
    net, x = gated_net(), images(2)
    done = export_fastest(net, "ort-int8", tmp_path / "net.onnx", x, rounds=2)
    assert done.form == min(done.median_ms, key=done.median_ms.get)
    assert done.refused == {}
    with load_file(done.file.path) as file, torch.no_grad():
        assert F.cosine_similarity(file((x,))[0].flatten(), net(x).flatten(), 0) > 0.99


def test_networks_of_floats_have_one_form(tmp_path):
    with pytest.raises(ValueError, match="a network of floats, of which there is one form"):
        export_fastest(small_net(), "onnx", tmp_path / "net", images(2))


@pytest.mark.parametrize("target", ROUTES)
def test_every_target_has_three_forms(target):
    forms = choice.forms_for(target)
    assert forms["float"] is None
    assert forms["activations in float"].gates == "whole"
    assert forms["integers"] == ROUTES[target].spelling


@pytest.mark.parametrize("target", ROUTES)
def test_no_target_leaves_the_rounding_of_gates_out(target):
    net, x = deep_gated_net()
    with torch.no_grad():
        expected = net(x)
        spellings = choice.forms_for(target)
        got, whole = (
            integer_network(net, spellings[form])(x)
            for form in ("integers", "activations in float")
        )
    assert 10 * (got - expected).abs().mean() < (whole - expected).abs().mean()


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize(
    "target",
    [
        "openvino",
        pytest.param("executorch", marks=pytest.mark.slow),
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
def test_gates_are_rounded_in_files(target, soft, tmp_path):
    pytest.importorskip({"inductor": "torch"}.get(target, target))
    net, x = deep_gated_net(soft)
    done = export(net, target, tmp_path / "net", x, tolerance=ParityTolerance(cosine=0.9999))
    assert done.parity.max_relative_error < 0.01


def test_activations_with_gates_run_in_integers(tmp_path):
    need_onnx()
    from lit_compress.deploy.onnx import fused_operators

    for soft in (True, False):
        done = export(gated_net(soft), "ort-int8", tmp_path / f"{soft}", images(1))
        assert done.batch_size is None
        assert done.parity.cosine > 0.999
        kernels = fused_operators(done.path)
        assert kernels["QLinearMul"] == 4  # three activations, one block
        assert kernels["QLinearSigmoid" if soft else "QLinearAdd"] == 4
        assert kernels["QLinearGlobalAveragePool"] == 2
        assert not {
            "Sigmoid", "HardSigmoid", "HardSwish", "Mul", "Add", "Conv", "ReduceMean",
            "DequantizeLinear",
        } & set(kernels)  # fmt: skip

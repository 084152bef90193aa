"""The benchmark of files beside the peers': its subjects, its arithmetic, and what is committed."""

import copy
import json
import sys
import time

import pytest
import runtime_latency
import runtime_support
import torch
from runtime_networks import KINDS, NETWORKS, Network, batches, build, images
from runtime_timing import time_in_turns
from torch import nn

from lit_compress.compress.quantization.network import is_quantized


def tiny_network():
    """Big enough to have a stem, batch norms and a head."""

    def make():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, 20),
        )

    return Network("tiny", 32, make)


def test_networks_are_the_same_each_time_and_tell_kinds_apart():
    network = tiny_network()
    model, again = build(network), build(network)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert not model.training
    x, kinds = images(5 * KINDS, network.pixels, seed=77)
    with torch.no_grad():
        logits = model(x)
    assert (logits.argmax(1) == kinds).float().mean() > 0.3  # by chance: 0.1
    assert logits.std(0).mean() > 0.1 * logits.std()  # they depend on the image


def test_images_have_a_kind_and_something_of_their_own():
    x, kinds = images(2 * KINDS, 16, seed=1)
    assert x.shape == (2 * KINDS, 3, 16, 16)
    assert kinds.tolist() == [*range(KINDS)] * 2
    flat = x.flatten(1)
    alike = torch.cosine_similarity(flat[:KINDS], flat[KINDS:]).mean()
    others = torch.cosine_similarity(flat[:KINDS], flat[KINDS:].roll(1, 0)).mean()
    assert others < alike < 0.99


def test_turns_are_counted_and_timed():
    order = []

    def call(name, seconds):
        def run():
            order.append(name)
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass

        return run

    times = time_in_turns({"a": call("a", 0.002), "b": call("b", 0.004)}, rounds=6, warmup=2)
    rounds = ["".join(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(rounds) == 8
    assert set(rounds) == {"ab", "ba"}
    assert 2 <= times["a"]["median_ms"] < times["b"]["median_ms"]
    assert times["b"]["p25_ms"] <= times["b"]["median_ms"] <= times["b"]["p75_ms"]
    assert times["b"]["wall_median_ms"] >= 4


def measured(**changes):
    """A result that misses no bar, but for the changes."""
    row = {"median_ms": 1.0, "p25_ms": 0.9, "p75_ms": 1.1, "wall_median_ms": 1.0, "size_bytes": 1}
    row["argmax_agreement"] = 0.95
    files = {
        "float": row | {"cosine_with_float": 1.0, "cosine_with_own_torch": 1.0},
        "ptq": row | {"cosine_with_float": 0.99, "cosine_with_own_torch": 0.999},
        "qat": row | {"cosine_with_float": 0.5, "cosine_with_own_torch": 0.999},
        "ort": row | {"cosine_with_float": 0.99},
        "openvino": row | {"cosine_with_float": 0.991},
    }
    ratios = {f"{o}_vs_{p}": 1.0 for o in runtime_latency.OURS for p in runtime_latency.PEERS}
    for kind, row_changes in changes.pop("files", {}).items():
        files[kind] |= row_changes
    trained = copy.deepcopy(files)
    del trained["qat"]
    return {
        "networks": {"net": {"pixels": 8, "files": files, "ratios": ratios | changes}},
        "trained": {"net": {"pixels": 8, "files": trained, "ratios": {"ptq_vs_ort": 2.0}}},
    }


def test_the_bars():
    assert runtime_latency.check(measured()) == []
    (slow,) = runtime_latency.check(measured(qat_vs_openvino=1.06))
    assert "net, qat_vs_openvino: takes 1.060 times as long" in slow
    missed = runtime_latency.check(measured(files={"ptq": {"cosine_with_float": 0.9885}}))
    assert len(missed) == 2  # of random and of trained weights
    assert all("openvino" in line for line in missed)
    (own,) = runtime_latency.check(measured(files={"qat": {"cosine_with_own_torch": 0.98}}))
    assert "qat" in own
    assert runtime_latency.check(measured(ptq_vs_ort=float("nan")))


def test_the_table_has_a_line_for_each_file():
    lines = runtime_latency.table(measured()).splitlines()
    assert len(lines) == 2 + 5 + 4
    assert len({line.count("|") for line in lines}) == 1


def test_check_decides_the_exit_status(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        runtime_latency, "measure_all", lambda quick: measured(ptq_vs_ort=2.0 if quick else 1.0)
    )
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["x", "--check", "--output", str(out)])
    assert runtime_latency.main() == 0
    assert json.loads(out.read_text()) == measured()
    assert "ratio_vs_ort_net=1.000" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["x", "--check", "--quick"])
    assert runtime_latency.main() == 1
    monkeypatch.setattr(sys, "argv", ["x", "--quick"])
    assert runtime_latency.main() == 0


def test_training_with_quantizers_gives_another_quantized_network(tmp_path):
    network = tiny_network()
    model = build(network)
    before = copy.deepcopy(model.state_dict())
    trained = runtime_latency.trained_with_quantizers(model, network.pixels, tmp_path)
    assert is_quantized(trained)
    assert not is_quantized(model)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    assert not torch.equal(trained[0].weight, model[0].weight)


@pytest.mark.slow
def test_a_tiny_network_beside_the_peers():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    result = runtime_latency.measure(
        runtime_latency.Subject.of(tiny_network()), rounds=3, with_training=True
    )
    assert list(result["files"]) == ["float", "ptq", "qat", "ort", "openvino"]
    for kind, row in result["files"].items():
        assert row["median_ms"] > 0
        assert row["size_bytes"] > 500
        # Training moved the weights: its file is as its own network is.
        assert row["cosine_with_own_torch" if kind == "qat" else "cosine_with_float"] > 0.95, kind
    assert result["files"]["float"]["cosine_with_float"] > 0.9999
    assert set(result["ratios"]) == set(result["wall_ratios"])
    assert len(result["ratios"]) == 4


def test_a_case_that_fails_says_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setitem(runtime_support.NETWORKS, "tiny", tiny_network())
    monkeypatch.setattr(runtime_support, "export", refuse)
    rows = runtime_support.run_case("tiny", "onnxruntime", rounds=2)
    assert rows == {kind: {"error": "RuntimeError: no such operator"} for kind in ("float", "int8")}
    text = runtime_support.table({"cases": {"tiny onnxruntime": rows}})
    assert "- tiny, onnxruntime, int8: RuntimeError: no such operator" in text
    assert "| tiny, 32 px | onnxruntime | fails | fails |" in text


def test_a_case_in_the_runtime(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(runtime_support.NETWORKS, "tiny", tiny_network())
    rows = runtime_support.run_case("tiny", "onnxruntime", rounds=2)
    assert rows["float"]["cosine"] > 0.9999
    assert rows["int8"]["cosine"] > 0.99
    assert rows["int8"]["median_ms"] > 0
    line = runtime_support.table({"cases": {"tiny onnxruntime": rows}}).splitlines()[2]
    assert line.startswith("| tiny, 32 px | onnxruntime | ")


def test_a_process_that_dies_is_a_row(monkeypatch, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import os, sys; print('boom', file=sys.stderr); os._exit(7)")
    monkeypatch.setattr(runtime_support, "__file__", str(script))
    rows = runtime_support.run_apart("resnet20", "litert")
    assert rows["int8"]["error"] == "the process ended with 7: boom"


@pytest.mark.skipif(not runtime_latency.RESULTS.exists(), reason="not measured yet")
def test_committed_results_hold_the_bars():
    results = runtime_latency.read_results()
    assert set(results["networks"]) == set(runtime_latency.SUBJECTS)
    assert runtime_latency.check(results) == []
    for network in results["networks"].values():
        assert set(network["ratios"]) == {"ptq_vs_ort", "ptq_vs_openvino", "qat_vs_ort",
                                          "qat_vs_openvino"}  # fmt: skip


@pytest.mark.skipif(not runtime_support.RESULTS.exists(), reason="not measured yet")
def test_committed_support_is_complete():
    cases = runtime_support.read_results()["cases"]
    assert set(cases) == {f"{n} {r}" for n in NETWORKS for r in runtime_support.RUNTIMES}
    for case, rows in cases.items():
        for kind in ("float", "int8"):
            assert "error" in rows[kind] or rows[kind]["cosine"] >= 0.95, (case, kind)


def test_batches_are_of_the_network_s_size():
    (first, second) = batches(NETWORKS["resnet20"], 2, seed=5)
    assert first.shape == second.shape == (10, 3, 32, 32)
    assert not torch.equal(first, second)

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
from runtime_peers import PEERS
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

    found = time_in_turns({"a": call("a", 0.002), "b": call("b", 0.004)}, rounds=6, warmup=2)
    assert {len(times.processor) for times in found.values()} == {6}
    assert {len(times.wall) for times in found.values()} == {6}
    times = {name: one.summary() for name, one in found.items()}
    rounds = ["".join(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert len(rounds) == 8
    assert set(rounds) == {"ab", "ba"}
    assert 2 <= times["a"]["median_ms"] < times["b"]["median_ms"]
    assert times["b"]["p25_ms"] <= times["b"]["median_ms"] <= times["b"]["p75_ms"]
    assert times["b"]["wall_median_ms"] >= 4


def files_as_fast_as(**median_ms):
    """Files that are right and equally close to the float network, as fast as said."""
    own = {"float": 1.0, "ort-int8": 0.999, "qat ort-int8": 0.999}
    return {
        kind: {
            **{"median_ms": median, "p25_ms": median, "p75_ms": median, "wall_median_ms": median},
            **{"size_bytes": 1, "argmax_agreement": 0.95, "cosine_with_float": 0.99},
            **({"cosine_with_own_torch": own[kind]} if kind in own else {}),
        }
        for kind, median in (dict.fromkeys((*own, *PEERS), 1.0) | median_ms).items()
    }


def ratio(estimate, width=0.0):
    low, high = estimate - width / 2, estimate + width / 2
    return {"ratio": estimate, "low": low, "high": high, "rounds": 40}


def measured(changes=None, ratios=None, small=None, **median_ms):
    """A result that misses no bar, but for the changes of rows and ratios.

    Args:
        changes: By file, of resnet18's row.
        ratios: By pair of files.
        small: By file, of resnet20's row.
        median_ms: By file.
    """

    def network(weights, changes):
        files = files_as_fast_as(**median_ms)
        for kind, change in (changes or {}).items():
            files[kind] |= change
        found = {f"{ours} / {peer}": ratio(1.0) for ours in runtime_latency.OURS for peer in PEERS}
        return {
            "pixels": 8,
            "weights": weights,
            "files": files,
            "ratios": found | (ratios or {}),
        }

    networks = {"resnet18": network("random", changes), "resnet20": network("trained", small)}
    return {"machine": {}, "weights": "", "rounds": 40, "networks": networks}


def cosine(value):
    return {"cosine_with_float": value}


def test_all_bars_hold():
    assert runtime_latency.check(measured()) == []
    assert [bar.verdict for bar in runtime_latency.time_bars(measured())] == ["holds"]


@pytest.mark.parametrize(
    ("found", "num_missed"),
    [
        ({"small": {"ort-int8": cosine(0.9885), "nncf-safe": cosine(0.991)}}, 1),
        ({"small": {"ort-int8": cosine(0.9895), "nncf-safe": cosine(0.991)}}, 0),
        ({"small": {"ort-int8": cosine(0.9)}}, len(PEERS)),
        ({"small": {"ort-int8": {"cosine_with_own_torch": 0.9975}}}, 1),
        ({"changes": {"qat ort-int8": {"cosine_with_own_torch": 0.9975}}}, 1),
        ({"changes": {"ort-int8": cosine(float("nan"))}}, len(PEERS)),
        ({"changes": {"qat ort-int8": cosine(0.3)}}, 0),  # training moved its weights
    ],
)
def test_files_have_to_be_right(found, num_missed):
    assert len(runtime_latency.check(measured(**found))) == num_missed


FAST = {"ort": 0.5, "ort-safe": 0.7, "nncf": 0.6, "nncf-safe": 0.8}


@pytest.mark.parametrize(
    ("wrong", "peer"),
    [
        ((), "ort"),
        (("ort",), "nncf"),
        (("ort", "nncf"), "ort-safe"),
        (("ort", "nncf", "ort-safe"), "nncf-safe"),
    ],
)
def test_only_peers_that_are_right_count_as_fast(wrong, peer):
    pair = f"ort-int8 / {peer}"
    changes = {kind: cosine(0.9) for kind in wrong}
    for value, verdict in (
        (ratio(1.06), "missed"),
        (ratio(1.06, width=0.1), "not decided"),
        (ratio(1.0, width=0.01), "holds"),
    ):
        found = measured(changes, {pair: value}, **FAST)
        (bar,) = runtime_latency.time_bars(found)
        assert (bar.verdict, bar.ratio.estimate) == (verdict, value["ratio"])
        assert len(runtime_latency.check(found)) == (verdict == "missed")


def test_without_a_right_file_nothing_is_said_of_speed():
    (no_peer,) = runtime_latency.time_bars(measured({kind: cosine(0.9) for kind in PEERS}))
    own = {"ort-int8": {"cosine_with_own_torch": 0.9}}
    (not_ours,) = runtime_latency.time_bars(measured(own, {"ort-int8 / ort": ratio(9.0)}))
    assert no_peer.verdict == not_ours.verdict == "not decided"
    assert len(runtime_latency.check(measured(own))) == 1


def test_another_route_of_ours_is_judged_with_the_first(monkeypatch):
    monkeypatch.setitem(runtime_latency.OURS, "other", "ours, another route")
    right = {"cosine_with_own_torch": 0.999}
    found = measured({"other": right}, {"other / ort": ratio(1.01)}, {"other": right}, other=0.8)
    (bar,) = runtime_latency.time_bars(found)
    assert bar.ratio.estimate == 1.01
    found["networks"]["resnet18"]["files"]["other"] |= {"cosine_with_own_torch": 0.9}
    assert runtime_latency.reference(found["networks"]["resnet18"]) == "ort-int8"
    assert len(runtime_latency.check(found)) == 1


def test_the_table_has_a_line_for_each_file():
    lines = runtime_latency.table(measured({"nncf": cosine(0.9)})).splitlines()
    assert len(lines) == 2 + 2 * (3 + len(PEERS))
    assert len({line.count("|") for line in lines}) == 1
    assert sum("wrong here" in line for line in lines) == 1


def test_files_of_earlier_runs_are_read():
    names = {"float": "float", "ptq": "ort-int8", "qat": "qat ort-int8", "ort": "ort"}
    names["openvino"] = "nncf"
    found = files_as_fast_as()
    old_ratios = {"ptq_vs_ort": 1.1, "ptq_vs_openvino": 1.2, "qat_vs_ort": 1.0}
    old = {"pixels": 8, "files": {o: found[n] for o, n in names.items()}, "ratios": old_ratios}
    results = {"machine": {}, "weights": "", "rounds": 9, "load_average": 1.0}
    results |= {"networks": {"resnet18": old}, "trained": {"resnet20": old}}
    now = runtime_latency.current(results)
    assert {n: one["weights"] for n, one in now["networks"].items()} == {
        "resnet18": "random",
        "resnet20": "trained",
    }
    assert set(now["networks"]["resnet18"]["files"]) == set(names.values())
    (bar,) = runtime_latency.time_bars(now)
    assert (bar.verdict, bar.ratio.estimate) == ("missed", 1.1)
    assert len(runtime_latency.not_in(now)) == 3  # two peers, and intervals
    assert runtime_latency.not_in(measured()) == []
    assert runtime_latency.current(measured()) == measured()


def test_check_decides_the_exit_status(monkeypatch, tmp_path):
    slow = {f"ort-int8 / {peer}": ratio(2.0) for peer in PEERS}
    monkeypatch.setattr(
        runtime_latency, "measure_all", lambda quick: measured(ratios=slow if quick else None)
    )
    monkeypatch.setattr(runtime_latency, "say_duration", lambda *_: None)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["x", "--check", "--output", str(out)])
    assert runtime_latency.main() == 0
    assert json.loads(out.read_text()) == measured()
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
        runtime_latency.Subject.of(tiny_network()), rounds=7, with_training=True
    )
    ours = [*runtime_latency.OURS]
    assert list(result["files"]) == ["float", *ours, runtime_latency.QAT, *PEERS]
    for row in result["files"].values():
        assert row["median_ms"] > 0
        assert row["size_bytes"] > 500
    assert result["files"]["float"]["cosine_with_float"] > 0.9999
    for kind in ("ort-safe", "nncf-safe"):  # right on every processor
        assert result["files"][kind]["cosine_with_float"] > 0.95, kind
    pairs = {f"{kind} / {peer}" for kind in (*ours, runtime_latency.QAT) for peer in PEERS}
    assert result["ratios"].keys() == pairs
    assert {one["rounds"] for one in result["ratios"].values()} == {7}


def test_a_case_that_fails_says_so(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such operator\nand more")

    monkeypatch.setitem(runtime_support.NETWORKS, "tiny", tiny_network())
    monkeypatch.setattr(runtime_support, "export", refuse)
    rows = runtime_support.run_case("tiny", "onnxruntime", rounds=2)
    assert rows == {kind: {"error": "RuntimeError: no such operator"} for kind in ("float", "int8")}


@pytest.mark.slow
def test_a_case_in_the_runtime(monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(runtime_support.NETWORKS, "tiny", tiny_network())
    rows = runtime_support.run_case("tiny", "onnxruntime", rounds=2)
    assert rows["float"]["cosine"] > 0.9999
    assert rows["int8"]["cosine"] > 0.95  # without VNNI sums of products may saturate
    assert rows["int8"]["median_ms"] > 0


def test_where_integers_are_slower_the_table_says_what_is_kept():
    def shown(int8_ms, **more):
        rows = {"float": {"median_ms": 10.0}, "int8": {"median_ms": int8_ms}, **more}
        return runtime_support.is_slower(rows), runtime_support._kept(rows)

    times = {"integers": 12.0, "activations in float": 8.0, "float": 10.0}
    assert shown(10.1) == (False, "integers")
    assert shown(12.0) == (True, "")  # measured before this was
    kept = {"form": "activations in float", "median_ms": times, "refused": []}
    assert shown(12.0, fastest=kept) == (True, "activations in float, 1.25")
    assert shown(12.0, fastest={"error": "ParityError: no"}) == (True, "fails")


def test_a_process_that_dies_is_a_row(monkeypatch, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import os, sys; print('boom', file=sys.stderr); os._exit(7)")
    monkeypatch.setattr(runtime_support, "__file__", str(script))
    rows = runtime_support.run_apart("resnet20", "litert")
    assert rows["int8"]["error"] == "the process ended with 7: boom"


@pytest.mark.skipif(not runtime_latency.RESULTS.exists(), reason="not measured yet")
def test_committed_results_hold_the_bars():
    results = runtime_latency.read_results()
    asked = {*runtime_latency.SUBJECTS, *runtime_latency.SMALL_SUBJECTS}
    assert set(results["networks"]) == asked
    assert runtime_latency.check(results) == []
    for network in results["networks"].values():
        assert network["files"].keys() >= {"float", "ort-int8"}  # the page says what is missing


@pytest.mark.skipif(not runtime_support.RESULTS.exists(), reason="not measured yet")
def test_committed_support_is_complete():
    cases = runtime_support.read_results()["cases"]
    measured = {case.partition(" ")[2] for case in cases}
    assert {"onnxruntime", "executorch", "litert", "inductor"} <= measured
    assert measured <= set(runtime_support.RUNTIMES)
    assert set(cases) == {f"{n} {r}" for n in NETWORKS for r in measured}
    for case, rows in cases.items():
        for kind in ("float", "int8"):
            assert "error" in rows[kind] or rows[kind]["cosine"] >= 0.95, (case, kind)


def test_batches_are_of_the_network_s_size():
    (first, second) = batches(NETWORKS["resnet20"], 2, seed=5)
    assert first.shape == second.shape == (10, 3, 32, 32)
    assert not torch.equal(first, second)

"""The study measures what it says, goes on where it stopped, and the how-to agrees with it."""

import copy
import json
import multiprocessing.dummy
from collections import Counter
from dataclasses import asdict
from statistics import mean
from types import SimpleNamespace

import pytest
import quantization_corrections as corrections
import torch
from quantization_corrections import Point, Settings, points

from lit_compress.tasks import build_model

TINY = Settings(num_iterations=30, num_samples=300)


def made_up(left_out=(), **top1):
    """Results of the whole study; every correction scores 80 % where nothing else is said."""
    scores = {"bias_correction": 0.7, "adaround": 0.85} | top1
    return {
        "settings": asdict(Settings()),
        "float": dict.fromkeys(corrections.MODELS, 0.9),
        "points": [
            asdict(p)
            | {"top1": scores.get(p.correction.replace(" ", "_"), 0.8) + p.seed / 100}
            | {"cpu_seconds": 10.0 * p.seed}
            for p in reversed(points())
            if p not in left_out
        ],
    }


def test_points_are_all_there_once_with_the_seeds_in_turn():
    found = points()
    assert len(set(found)) == len(found)
    assert [p.seed for p in found] == sorted(p.seed for p in found)
    num = Counter(p.seed for p in found)
    assert set(num) == set(corrections.SEEDS)
    assert len(set(num.values())) == 1
    assert {p.ranges for p in found if p.weight_bits == 8} == set(corrections.RANGES)
    adaround = {(p.weight_bits, p.activation_bits) for p in found if p.correction == "adaround"}
    assert adaround == set(corrections.ADAROUND_BITS)
    assert all(p.correction == "none" for p in found if p.ranges != "mse")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_model("digits_cnn", num_classes=10, width=4).eval()


@pytest.fixture(scope="module")
def batches():
    images = torch.rand(2, 32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return [(batch, torch.arange(32) % 10) for batch in images]


def changed(network, batches, correction):
    """Which parameters a correction leaves other than calibration alone does."""
    point = Point("digits_cnn", 3, 8, correction, "mse", 1)
    before = copy.deepcopy(network.state_dict())
    found = corrections.quantized(network, batches, point, TINY)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    parameters = dict(found.named_parameters())
    return {n for n, p in network.named_parameters() if not torch.equal(p, parameters[n])}


def test_each_correction_changes_what_it_should(network, batches):
    weights = {n for n, p in network.named_parameters() if p.dim() > 1}
    assert changed(network, batches, "none") == set()
    assert weights == changed(network, batches, "adaround")
    biases = changed(network, batches, "bias correction")
    assert biases
    assert all(name.endswith("bias") for name in biases)
    for balance in ("weights", "activations"):
        assert changed(network, batches, f"equalization ({balance})") & weights
    assert weights | biases <= changed(network, batches, "all")


def test_bits_and_ranges_reach_the_network(network, batches):
    images = batches[0][0]

    def error(bits, ranges):
        point = Point("digits_cnn", *bits, "none", ranges, 1)
        with torch.no_grad():
            return (corrections.quantized(network, batches, point, TINY)(images) - exact).norm()

    with torch.no_grad():
        exact = network(images)
    assert error((8, 8), "mse") < error((3, 8), "mse")
    assert error((8, 8), "mse") < error((8, 3), "mse")
    assert error((8, 8), "mse") != error((8, 8), "minmax")


def test_top1_is_the_share_of_right_answers():
    images = torch.eye(4)
    batches = [(images, torch.tensor([0, 1, 2, 0])), (images[:1], torch.tensor([0]))]
    assert corrections.top1(torch.nn.Identity(), batches) == 0.8


# --- Results --------------------------------------------------------------------------------------


def test_gains_are_seed_by_seed():
    results = made_up()
    for point in results["points"]:
        if point["correction"].startswith("equalization"):
            point["top1"] += 0.05 if point["seed"] == 1 else -0.01
    gains = corrections.gains(
        results, "equalization (weights)", model="resnet20", weight_bits=4, activation_bits=8
    )
    assert gains == pytest.approx([5.0, -1.0, -1.0])


def test_a_seed_that_lacks_a_point_is_not_shown():
    last = points()[-1]
    partial = made_up(left_out=[last])
    assert corrections.complete_seeds(made_up()) == [1, 2, 3]
    assert corrections.complete_seeds(partial) == [1, 2]
    one = {name: value for name, value in asdict(last).items() if name != "seed"}
    one["correction"] = "none"
    assert corrections.scores(partial, **one) == pytest.approx([81.0, 82.0])
    assert f"{last} is missing" in corrections.check(partial, {"none": 0.8, **GOOD})


GOOD = {"adaround": 0.85, "all": 0.8}


@pytest.mark.parametrize("correction", GOOD)
def test_adaround_must_not_lose_on_digits(correction):
    assert corrections.check(made_up(), {"none": 0.8, **GOOD}) == []
    (line,) = corrections.check(made_up(), {"none": 0.8, **GOOD, correction: 0.79})
    assert line == f"digits at 3 bits score 0.7900 with {correction}, below 0.8000 without"


def test_the_committed_results_are_what_the_how_to_says():
    results = corrections.read_results()
    assert len(corrections.complete_seeds(results)) > 1

    def gain(correction, model, *bits):
        what = {"weight_bits": bits[0], "activation_bits": bits[1], "model": model}
        return mean(corrections.gains(results, correction, **what))

    def lost(model, *bits):
        what = {"weight_bits": bits[0], "activation_bits": bits[1], "model": model}
        scores = corrections.scores(results, correction="none", ranges="mse", **what)
        return 100 * results["float"][model] - mean(scores)

    cheap = corrections.CORRECTIONS[1:4]
    few = ((4, 8), (3, 8))
    assert all(abs(gain(c, m, 8, 8)) < 0.5 for c in cheap for m in corrections.MODELS)
    assert all(
        gain("adaround", m, *bits) > lost(m, *bits) / 2 for m in corrections.MODELS for bits in few
    )
    for bits in (*few, (4, 4)):
        assert gain("bias correction", "mobilenet_v1", *bits) > lost("mobilenet_v1", *bits) / 2
    assert gain("bias correction", "resnet20", 3, 8) < -20
    assert gain("bias correction", "resnet20", 4, 4) < -2
    for bits in ((4, 8), (4, 4)):
        assert gain("equalization (activations)", "mobilenet_v1", *bits) > 2
    for bits in corrections.BITS:
        assert abs(gain("equalization (activations)", "resnet20", *bits)) < 2
    above = [gain("all", m, *b) - gain("adaround", m, *b) for m in corrections.MODELS for b in few]
    assert min(above) < 0 < max(above)


# --- The script -----------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A results file of our own, and points that cost nothing, measured in threads."""
    monkeypatch.setattr(corrections, "RESULTS", tmp_path / "results" / "corrections.json")
    monkeypatch.setattr(corrections, "be_quiet", lambda threads: None)
    monkeypatch.setattr(corrections, "MODELS", ("digits_cnn",))
    monkeypatch.setattr(corrections, "LABELS", {"digits_cnn": "digits"})
    monkeypatch.setattr(corrections, "BITS", ((8, 8), (3, 8)))
    monkeypatch.setattr(corrections, "SEEDS", (1, 2))
    in_threads = SimpleNamespace(get_context=lambda method: multiprocessing.dummy)
    monkeypatch.setattr(corrections, "multiprocessing", in_threads)
    network = torch.nn.Identity()
    images = torch.eye(10)
    monkeypatch.setattr(corrections, "_float_network", lambda model: network)
    monkeypatch.setattr(
        corrections, "_batches", lambda settings, seed: ([], [(images, torch.arange(10))])
    )
    asked = []

    def quantized(network, batches, point, settings):
        asked.append(point)
        return network

    monkeypatch.setattr(corrections, "quantized", quantized)
    return asked


def test_a_run_goes_on_where_it_was_stopped(study):
    corrections.run_all(TINY, workers=1, threads=1)
    whole = corrections.read_results()
    assert study == points()
    assert whole["float"] == {"digits_cnn": 1.0}
    assert {p["top1"] for p in whole["points"]} == {1.0}
    assert whole["machine"].keys() >= {"processor", "vnni", "load_average"}
    assert corrections.complete_seeds(whole) == [1, 2]

    study.clear()
    corrections.run_all(TINY, workers=1, threads=1)
    assert study == []
    stopped = whole | {"points": whole["points"][3:]}
    corrections.RESULTS.write_text(json.dumps(stopped))
    corrections.run_all(TINY, workers=1, threads=1)
    assert len(study) == 3
    assert {p.__class__ for p in study} == {Point}
    keys = [{k: v for k, v in p.items() if k != "cpu_seconds"} for p in whole["points"]]
    again = corrections.read_results()["points"]
    assert [{k: v for k, v in p.items() if k != "cpu_seconds"} for p in again] == keys


def test_results_of_other_settings_are_left_alone(study):
    corrections.run_all(TINY, workers=1, threads=1)
    before = corrections.RESULTS.read_text()
    with pytest.raises(SystemExit, match=r"was made with other settings; move it away first"):
        corrections.run_all(Settings(), workers=1, threads=1)
    assert corrections.RESULTS.read_text() == before


@pytest.mark.assets
def test_images_are_as_many_as_said_and_of_every_class():
    settings = Settings(num_calibration_batches=1, test_images=100)
    calibration, test = corrections._batches(settings, 1)
    assert [len(labels) for _, labels in calibration] == [settings.batch_size]
    labels = torch.cat([labels for _, labels in test])
    assert torch.bincount(labels, minlength=10).tolist() == [10] * 10

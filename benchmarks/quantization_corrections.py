"""What corrections and ranges do for post-training quantization, without any training.

Networks are the trained ones of the quantization study; calibration images come from the training
split, again for each seed. Every point starts from the float network and is scored on the same part
of the test split. Corrections:

- ``none``: calibrated only;
- ``equalization (weights)``, ``equalization (activations)``: ``equalize`` before;
- ``bias correction``: ``correct_bias`` after calibration;
- ``adaround``: ``round_adaptively`` after calibration;
- ``all``: equalization (activations), then AdaRound, then bias correction.

There are no bars: this says what pays where. ``--check`` looks for points that are missing, and
trains one AdaRound on scikit-learn's digits at 3 bits, which must not lose.

    python benchmarks/quantization_corrections.py [--assets DIR] [--workers 2] [--threads 1]
    python benchmarks/quantization_corrections.py --quick --check

The full run adds to ``docs/results/quantization_corrections.json`` point by point, and goes on
where it was stopped. ``--quick`` reads that file and does the digits only.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import lightning.pytorch as pl
import torch
from machine import machine, say_duration
from quantization_training import LABELS, be_quiet, quiet_trainer, spread, trained_module
from torch import Tensor, nn

from lit_compress.compress.quantization.corrections.bias_correction import correct_bias
from lit_compress.compress.quantization.corrections.equalization import equalize
from lit_compress.compress.quantization.corrections.rounding import round_adaptively
from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme, WeightRanges
from lit_compress.tasks import CIFAR10JPEGDataModule, DigitsDataModule, ImageClassifier

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "quantization_corrections.json"
MODELS = ("resnet20", "mobilenet_v1")
SEEDS = (1, 2, 3)
QUICK_UNITS = 100.0  # of training steps, see machine.py
BITS = ((8, 8), (4, 8), (3, 8), (4, 4))
CORRECTIONS = (
    "none",
    "equalization (weights)",
    "equalization (activations)",
    "bias correction",
    "adaround",
    "all",
)
RANGES = ("minmax", "moving_average", "histogram", "percentile", "mse")
TIMED_BITS = (4, 8)
ADAROUND_BITS = ((4, 8), (3, 8))  # at 8 bits next to nothing is left to win, and it costs minutes

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """What all points share."""

    num_calibration_batches: int = 8
    batch_size: int = 128
    test_images: int = 2000
    num_iterations: int = 500
    num_samples: int = 10_000
    weight_ranges: WeightRanges = "mse"  # below 8 bits; at 8 bits "minmax"


@dataclass(frozen=True)
class Point:
    """One quantized network."""

    model: str
    weight_bits: int
    activation_bits: int
    correction: str
    ranges: str
    seed: int


def points() -> list[Point]:
    """All points of the study, the seeds in turn, so that a partial run is balanced."""
    found: dict[Point, None] = {}
    for seed in SEEDS:
        for model in MODELS:
            found |= {Point(model, 8, 8, "none", ranges, seed): None for ranges in RANGES}
            for bits in BITS:
                for correction in CORRECTIONS:
                    if correction in ("adaround", "all") and bits not in ADAROUND_BITS:
                        continue
                    found[Point(model, *bits, correction, "mse", seed)] = None
    return sorted(found, key=lambda p: (p.seed, p.correction in ("adaround", "all")))


def quantized(
    network: nn.Module, batches: list[Batch], point: Point, settings: Settings
) -> nn.Module:
    """A copy of a float network, quantized as the point says."""
    network = copy.deepcopy(network).eval()
    what = CORRECTIONS[2:5] if point.correction == "all" else (point.correction,)

    def run(model: nn.Module) -> Any:
        return model(batches[0][0])

    def forward(model: nn.Module, batch: Batch) -> Any:
        return model(batch[0])

    if "equalization (activations)" in what:
        equalize(network, run)
    elif "equalization (weights)" in what:
        equalize(network, run, balance="weights")
    scheme = QuantizationScheme(
        weight_bits=point.weight_bits,
        activation_bits=point.activation_bits,
        weight_ranges=settings.weight_ranges if point.weight_bits < 8 else "minmax",
    )
    prepare(network, scheme, run)
    calibrate(network, forward, batches, ranges=point.ranges)  # type: ignore[arg-type]
    float_weights = None
    if "adaround" in what:
        rounding = round_adaptively(
            network,
            forward,
            batches,
            num_iterations=settings.num_iterations,
            num_samples=settings.num_samples,
            seed=point.seed,
        )
        float_weights = rounding.float_weights
    if "bias correction" in what:
        correct_bias(network, forward, batches, float_weights=float_weights)
    return network


@torch.no_grad()
def top1(network: nn.Module, batches: list[Batch]) -> float:
    """Share of the images that are classified rightly."""
    network.eval()
    right = sum(int((network(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


# --- The study ------------------------------------------------------------------------------------


@cache
def _batches(settings: Settings, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Of the training split, for calibration, and of the test split, every class alike."""
    needed = settings.num_calibration_batches * settings.batch_size
    data = CIFAR10JPEGDataModule(
        batch_size=settings.batch_size, seed=seed, max_train_per_class=needed // 10 + 1
    )
    data.prepare_data()
    data.setup("fit")
    drawn = zip(range(settings.num_calibration_batches), data.train_dataloader(), strict=False)
    images, labels = data.splits["test"]
    chosen = slice(None, None, max(len(labels) // settings.test_images, 1))
    data.splits["test"] = images[chosen], labels[chosen]
    return [batch for _, batch in drawn], list(data.test_dataloader())


@cache
def _float_network(model: str) -> nn.Module:
    return trained_module(model).model


def measure(point: Point, settings: Settings) -> dict[str, Any]:
    """Quantize and score one point."""
    calibration, test = _batches(settings, point.seed)
    network = _float_network(point.model)
    began = time.process_time()
    changed = quantized(network, calibration, point, settings)
    seconds = time.process_time() - began
    return asdict(point) | {"top1": top1(changed, test), "cpu_seconds": round(seconds, 1)}


def read_results() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def run_all(settings: Settings, workers: int, threads: int) -> None:
    """Measure every point that is not in the results yet; write after each."""
    done: dict[str, Any] = {"settings": asdict(settings), "float": {}, "points": []}
    if RESULTS.exists():
        done = read_results()
    if done["settings"] != asdict(settings):
        raise SystemExit(f"{RESULTS} was made with other settings; move it away first.")
    done["machine"] = machine()
    for model in MODELS:
        if model not in done["float"]:
            done["float"][model] = top1(_float_network(model), _batches(settings, SEEDS[0])[1])
    finished = {_point(p) for p in done["points"]}
    todo = [(point, settings) for point in points() if point not in finished]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=be_quiet, initargs=(threads,)) as pool:
        for result in pool.imap_unordered(_measure, todo):
            done["points"].append(result)
            done["points"].sort(key=lambda p: tuple(map(str, asdict(_point(p)).values())))
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(done, indent=2) + "\n")
            print(json.dumps(result), flush=True)


def _measure(arguments: tuple[Point, Settings]) -> dict[str, Any]:
    return measure(*arguments)


def _point(result: dict[str, Any]) -> Point:
    return Point(**{name: result[name] for name in Point.__dataclass_fields__})


# --- What came out --------------------------------------------------------------------------------


def complete_seeds(results: dict[str, Any]) -> list[int]:
    """Seeds of which no point is missing. All that is shown is over these."""
    finished = {_point(p) for p in results["points"]}
    return [s for s in SEEDS if all(p in finished for p in points() if p.seed == s)]


def scores(results: dict[str, Any], **what: Any) -> list[float]:
    """Top-1 in percent of the points that are as said, one for each complete seed in turn."""
    return [100 * p["top1"] for p in _shown(results, **what)]


def gains(results: dict[str, Any], correction: str, **what: Any) -> list[float]:
    """Points of a correction above ``none``, seed by seed."""
    after = scores(results, correction=correction, ranges="mse", **what)
    before = scores(results, correction="none", ranges="mse", **what)
    return [a - b for a, b in zip(after, before, strict=bool(after))]


def _shown(results: dict[str, Any], **what: Any) -> list[dict[str, Any]]:
    seeds = complete_seeds(results)
    found = [
        p
        for p in results["points"]
        if p["seed"] in seeds and all(p[name] == value for name, value in what.items())
    ]
    return sorted(found, key=lambda p: int(p["seed"]))


def table(results: dict[str, Any]) -> str:
    """Corrections as a Markdown table: mean and standard deviation over the seeds."""
    names = [_name(*bits) for bits in BITS]
    lines = [
        f"| network | correction | {' | '.join(names)} | seconds, {_name(*TIMED_BITS)} |",
        "| --- | --- |" + " --- |" * (len(BITS) + 1),
    ]
    for model in MODELS:
        name = f"{LABELS[model]}, float {100 * results['float'][model]:.2f}"
        for correction in CORRECTIONS:
            what = {"model": model, "correction": correction, "ranges": "mse"}
            cells = [spread(scores(results, **_bits(*bits), **what)) for bits in BITS]
            timed = [p["cpu_seconds"] for p in _shown(results, **_bits(*TIMED_BITS), **what)]
            cells.append(f"{mean(timed):.0f}" if timed else "–")
            lines.append(f"| {name} | {correction} | {' | '.join(cells)} |")
            name = ""
    return "\n".join(lines)


def gains_table(results: dict[str, Any]) -> str:
    """What helped and what hurt on every seed, and by how many points on average, as Markdown."""
    lines = ["| network | bits | better on every seed | worse on every seed |"]
    lines.append("| --- | --- | --- | --- |")
    for model in MODELS:
        for bits in BITS:
            found = {c: gains(results, c, model=model, **_bits(*bits)) for c in CORRECTIONS[1:]}
            ranked = sorted((c for c in found if found[c]), key=lambda c: -mean(found[c]))
            better = [f"{c} {mean(found[c]):+.2f}" for c in ranked if min(found[c]) > 0]
            worse = [f"{c} {mean(found[c]):+.2f}" for c in ranked[::-1] if max(found[c]) < 0]
            cells = [LABELS[model], _name(*bits), ", ".join(better) or "–", ", ".join(worse) or "–"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ranges_table(results: dict[str, Any]) -> str:
    """Ranges of activations at eight bits, likewise."""
    labels = [LABELS[model] for model in MODELS]
    lines = [f"| ranges (w8a8) | {' | '.join(labels)} |", "| --- |" + " --- |" * len(MODELS)]
    for ranges in RANGES:
        what = {"correction": "none", "ranges": ranges} | _bits(8, 8)
        cells = [spread(scores(results, model=model, **what)) for model in MODELS]
        lines.append(f"| `{ranges}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bits(weight_bits: int, activation_bits: int) -> dict[str, Any]:
    return {"weight_bits": weight_bits, "activation_bits": activation_bits}


def _name(weight_bits: int, activation_bits: int) -> str:
    return f"w{weight_bits}a{activation_bits}"


def digits_top1(settings: Settings) -> dict[str, float]:
    """Digits at 3 bits: float, calibrated, with AdaRound, and with everything."""
    pl.seed_everything(0, verbose=False)
    module = ImageClassifier("digits_cnn", lr=0.05)
    data = DigitsDataModule(batch_size=64)
    quiet_trainer(4, []).fit(module, data)
    calibration, test = list(data.train_dataloader())[:4], list(data.test_dataloader())
    found = {"float": top1(module.model, test)}
    for correction in ("none", "adaround", "all"):
        point = Point("digits_cnn", 3, 8, correction, "mse", 0)
        found[correction] = top1(quantized(module.model, calibration, point, settings), test)
    return found


def check(results: dict[str, Any], digits: dict[str, float]) -> list[str]:
    """What does not hold."""
    finished = {_point(p) for p in results["points"]}
    missed = [f"{point} is missing" for point in points() if point not in finished]
    missed += [
        f"digits at 3 bits score {digits[correction]:.4f} with {correction}, below "
        f"{digits['none']:.4f} without"
        for correction in ("adaround", "all")
        if digits[correction] < digits["none"]
    ]
    return missed


def main() -> int:
    """Run, print, and return the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="committed results, and the digits")
    parser.add_argument("--check", action="store_true", help="exit with 1 if something is missing")
    parser.add_argument("--assets", help="the folder that LIT_COMPRESS_ASSETS would name")
    parser.add_argument("--test_images", type=int, help="test images, for a new results file")
    parser.add_argument("--workers", type=int, default=1, help="points at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each of them")
    arguments = parser.parse_args()
    if arguments.assets:
        os.environ["LIT_COMPRESS_ASSETS"] = arguments.assets
    be_quiet(arguments.threads)
    settings = Settings(**({"test_images": arguments.test_images} if arguments.test_images else {}))
    if arguments.quick:
        say_duration(QUICK_UNITS)
    else:
        run_all(settings, arguments.workers, arguments.threads)
    results = read_results()
    print(table(results), gains_table(results), ranges_table(results), sep="\n\n")
    digits = digits_top1(settings)
    missed = check(results, digits)
    for line in missed:
        print(line)
    print(" ".join(f"digits_{name}={value:.4f}" for name, value in digits.items()))
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

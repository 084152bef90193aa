"""Quantization judged: accuracy after training and without it, size in files, batch norms' eps.

Bars:

- training (means over three seeds, see ``quantization_training.py``): ResNet-20 in 8 bits at most
  0.2 points below float fine-tuning with the same budget, with 4-bit weights within 1.5 of the
  float network; MobileNet-v1 (0.5) in 8 bits within 0.3 of the float network and at most 0.2 below
  its control, with one of two learning rates;
- after training (``quantization_after_training.py``), in 8 bits: ResNet-20 within 0.3 points of the
  float network, MobileNet-v1 within 1.0, in torch and in the file that ONNX Runtime runs; networks
  that were trained quantized lose at most 0.2 in such a file;
- sizes (``quantization_sizes.py``): ResNet-20 in 8 bits is 4 times smaller, and 9 times with 80 %
  zeros, in files that load and compute the same bit by bit;
- eps (``quantization_eps.py``): with eps = 1e-3 beside small variances, a prepared network computes
  what it did (1e-5), and batch norms folded into integers change nothing (1e-5) but what rounding
  does.

    python benchmarks/quantization_accuracy.py [--assets DIR] [--parts post_training ...]
    python benchmarks/quantization_accuracy.py --parts checkpoints --checkpoints DIR
    python benchmarks/quantization_accuracy.py --quick --check

The full run adds to ``docs/results/quantization_accuracy.json`` point by point, and goes on where
it was stopped. ``--quick`` reads what training gave and measures the rest again, on 1,000 test
images.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import quantization_after_training as after_training
import quantization_eps as eps
import quantization_sizes as sizes
import quantization_training as training
from machine import machine, say_duration
from quantization_after_training import QUICK, Settings

from lit_compress.tasks.assets import ASSETS_VARIABLE

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "quantization_accuracy.json"
QUICK_UNITS = 300.0  # of training steps, see machine.py
PARTS = ("training", "post_training", "checkpoints", "sizes", "eps")

Results = dict[str, Any]


# --- What came out --------------------------------------------------------------------------------


def training_results() -> Results:
    """What the training runs gave so far."""
    return training.read_results() if training.RESULTS.exists() else {"points": []}


def later_tries(floating: dict[str, float], trained: Results) -> str:
    """What came of the settings that were tried later, in words."""
    control = training.mean_score(trained, "mobilenet_v1", "control")
    lost = floating.get("mobilenet_v1", math.nan) - control
    tries = "; ".join(
        f"`{name}` ({', '.join(f'{key} {value}' for key, value in changed.items())})"
        for name, changed in training.LATER_TRIES.items()
    )
    outcomes = []
    for method in ("qat-w8a8", *(f"qat-w8a8-{name}" for name in training.LATER_TRIES)):
        bars = training.bars_of("mobilenet_v1", method)
        short = {bar: training.shortfall(bar, floating, trained) for bar in bars}
        misses = [f"{b.reference} − {b.points} by {s:.2f}" for b, s in short.items() if s != 0]
        outcome = f"misses {' and '.join(misses)}" if misses else "holds its bars"
        outcomes.append(f"`{method}` {outcome}")
    return f"""MobileNet-v1's float control loses {lost:.2f} points as the study began, without any
quantization. Other settings were tried, each when those before had been scored on these test
images, so the best of them is the best of {len(outcomes)} tries on them: {tries}. The last has no
float control of its own.
{"; ".join(outcomes)}."""


def section() -> str:
    """The part of the results page."""
    results, trained = read_results(), training_results()
    settings, errors = results["settings"], results["eps"]
    low, high = errors["running_var"]
    of_training = training.Settings()
    return f"""## Quantization: CIFAR-10 (JPEG)

Top-1 in percent on the 10,000 test images; mean ± standard deviation over the seeds.

### Quantization-aware training

All runs start from the same float network and train for {of_training.epochs} epochs on 45,000
images (SGD with a cosine, batch {of_training.batch_size}, {of_training.precision}). A control is
float fine-tuning with the same budget. `w4a8`: 4-bit weights, learned scales.

{training.table(results["float"], trained)}

{later_tries(results["float"], trained)}

Networks of seed 1 in the int8 file that is shipped:

{after_training.checkpoint_table(results["checkpoints"])}

### After training, without any

`PostTrainingQuantization` in 8 bits, {settings["num_calibration_batches"]} batches of
{settings["batch_size"]} training images, again for each seed.

{after_training.table(results)}

### Size

Zeros and clusters without any training; sizes hardly depend on it. Packed files are compressed in
themselves.

{sizes.table(results["sizes"])}

### eps

The first four blocks of MobileNet-v1 (0.25), random, with eps = {errors["eps"]:g} and running
variances from {low:.1g} to {high:.1g}. The last two rows are what rewriting eps to 1e-5, as
torchao's PT2E does, would do to it.

{eps.table(errors)}

JSON: [`results/quantization_accuracy.json`](results/quantization_accuracy.json) and
[`results/quantization_training.json`](results/quantization_training.json); made by
`python benchmarks/quantization_accuracy.py`."""


def check(results: Results, trained: Results) -> list[str]:
    """What does not hold."""
    missed = [f"{part} was not measured" for part in PARTS[1:] if not results.get(part)]
    missed += [f"{m} was not scored in float" for m in training.LABELS if m not in results["float"]]
    missed += training.missed(results["float"], trained)
    missed += after_training.missed(results)
    missed += after_training.missed_in_files(results.get("checkpoints", []))
    if results.get("sizes"):
        missed += sizes.missed(results["sizes"])
    if results.get("eps"):
        missed += eps.missed(results["eps"])
    return missed


def tables(results: Results, trained: Results) -> list[str]:
    """What was measured, as Markdown."""
    shown = [training.table(results["float"], trained)]
    if results.get("checkpoints"):
        shown.append(after_training.checkpoint_table(results["checkpoints"]))
    if results.get("post_training"):
        shown.append(after_training.table(results))
    if results.get("sizes"):
        shown.append(sizes.table(results["sizes"]))
    if results.get("eps"):
        shown.append(eps.table(results["eps"]))
    return shown


# --- The study ------------------------------------------------------------------------------------


def read_results() -> Results:
    """The committed results."""
    results: Results = json.loads(RESULTS.read_text())
    return results


def write(results: Results, path: Path) -> None:
    """Save as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


def run_parts(
    settings: Settings, parts: Sequence[str], path: Path, checkpoints: Path | None = None
) -> Results:
    """Measure the parts asked for and keep the others as they are in the results."""
    plain = json.loads(json.dumps(asdict(settings)))
    results: Results = read_results() if RESULTS.exists() else {"float": {}}
    if results.setdefault("settings", plain) != plain and path == RESULTS:
        raise SystemExit(f"{RESULTS} was made with other settings; move it away first.")
    results |= {"settings": plain, "machine": machine()}

    def keep(part: str, value: Any) -> None:
        results[part] = value
        write(results, path)

    if "eps" in parts:
        keep("eps", eps.measure())
    if "sizes" in parts:
        calibration, test = after_training.batches(settings, settings.seeds[0])
        dense = after_training.float_network("resnet20")
        keep("sizes", sizes.measure(dense, calibration[:2], test[0][0]))
    if "post_training" in parts:
        if settings.test_stride == 1:
            keep("float", after_training.float_top1(settings))
        points = results.get("post_training", []) if path == RESULTS else []
        after_training.measure(settings, points, lambda points: keep("post_training", points))
    if "checkpoints" in parts and checkpoints is not None:
        rows = after_training.checkpoint_rows(checkpoints, settings)
        if rows:  # without checkpoints, those of an earlier run stay
            keep("checkpoints", rows)
    return results


def main() -> int:
    """Run, print, and return the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1,000 test images, no training")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--assets", help="the folder that LIT_COMPRESS_ASSETS would name")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these")
    parser.add_argument("--checkpoints", type=Path, help="folder of checkpoints that training kept")
    parser.add_argument("--output", type=Path, help="where --quick writes JSON")
    parser.add_argument("--workers", type=int, default=1, help="training runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    arguments = parser.parse_args()
    if arguments.assets:
        os.environ["LIT_COMPRESS_ASSETS"] = arguments.assets
    training.be_quiet(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.quick:
            say_duration(QUICK_UNITS)
            path = arguments.output or Path(folder) / "quick.json"
            if os.environ.get(ASSETS_VARIABLE):
                results = run_parts(QUICK, ("eps", "sizes", "post_training"), path)
            else:  # what needs no trained weights; the rest is as committed
                results = run_parts(Settings(), ("eps",), path)
        else:
            keep = arguments.checkpoints or Path(folder)
            if "training" in arguments.parts:
                training.run_all(training.Settings(), arguments.workers, arguments.threads, keep)
            results = run_parts(Settings(), arguments.parts, RESULTS, keep)
    trained = training_results()
    missed = check(results, trained)
    print("\n\n".join(tables(results, trained)))
    for line in missed:
        print(line)
    print(f"missed_bars={len(missed)}")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Channel pruning: accuracy beside Torch-Pruning, the time of a cut, latency, sensitivity.

Bars:

- ResNet-20 on CIFAR-10 (JPEG) at half of the MACs: our best arm is on average at least as
  accurate as Torch-Pruning's, with the same data, budget and tuning;
- least-squares reconstruction gains before any tuning;
- one cut of ResNet-50, after the trace, takes no longer than a training step on 8 images of
  128 × 128, on one thread and in turns;
- a sensitivity point costs at most 10 % more than the evaluation of the same slim model.

    python benchmarks/channel_pruning.py [--assets DIR] [--workers 2] [--parts accuracy ...]
    python benchmarks/channel_pruning.py --pilot       # how the best arm was chosen
    python benchmarks/channel_pruning.py --quick --check

The full run adds to ``docs/results/channel_pruning.json`` run by run, and goes on where it was
stopped; times want an otherwise idle machine. ``--quick`` reads that file and measures a little of
everything again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import pruning_accuracy as accuracy
import pruning_cost
from bars import Ratio, TimeBar, missed
from machine import machine, say_duration

from lit_compress.tasks.assets import ASSETS_VARIABLE

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "channel_pruning.json"
PARTS = ("accuracy", "cut_time", "latency", "sensitivity")
CUT_BAR = 1.0
POINT_BAR = 1.10
QUICK_UNITS = 500.0  # of training steps, see machine.py
MEASURED = {"runs", "cut_time", "latency", "sensitivity"}


def read_results() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def write(results: dict[str, Any], path: Path) -> None:
    """Save as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n")


# --- Measuring ------------------------------------------------------------------------------------


def run_all(
    settings: accuracy.Settings, workers: int, parts: list[str], pilot: bool
) -> dict[str, Any]:
    """Measure the parts asked for and keep the others as they are in the results."""
    results: dict[str, Any] = read_results() if RESULTS.exists() else {}
    results.setdefault("settings", asdict(settings))
    results.setdefault("runs", [])
    if results["settings"] != asdict(settings):
        raise SystemExit(f"{RESULTS} was made with other settings; move it away first.")
    # Times first, while the machine is idle.
    measures: dict[str, Callable[[], Any]] = {
        "cut_time": lambda: pruning_cost.cut_time(repeats=9, num_traces=5),
        "latency": pruning_cost.latency,
        "sensitivity": pruning_cost.sensitivity_point,
    }
    for part, measure in measures.items():
        if part in parts:
            results[part] = measure()
            results["machine"] = machine()
            write(results, RESULTS)
            print(json.dumps(results[part]), flush=True)
    if "accuracy" in parts:
        jobs = (accuracy.pilot_jobs if pilot else accuracy.jobs)(settings)
        accuracy.run_missing(jobs, results["runs"], workers, lambda: write(results, RESULTS))
    return results


def quick() -> dict[str, Any]:
    """A little of everything; without the assets, what needs no trained weights."""
    settings = replace(
        accuracy.Settings(),
        epochs=1,
        max_train_per_class=50,
        test_stride=20,
        precision="32-true",  # bfloat16 is slow where the processor does not have it
    )
    runs = []
    if os.environ.get(ASSETS_VARIABLE):
        inside = [arm for arm in accuracy.untuned_arms() if not (arm.whole or arm.recalibrate)]
        runs = [accuracy.run(arm, 1, settings, tuned=False) for arm in inside[:2]]
        tuned = (accuracy.TORCH_PRUNING_INSIDE, accuracy.BEST)
        runs += [accuracy.run(arm, 1, settings) for arm in tuned]
    return {
        "settings": asdict(settings),
        "runs": runs,
        "cut_time": pruning_cost.cut_time(repeats=6, num_traces=1, image_size=64),
        "latency": pruning_cost.latency(quick=True),
        "sensitivity": pruning_cost.sensitivity_point(quick=True),
        "machine": machine(),
    }


# --- What came out --------------------------------------------------------------------------------

LABELS = {
    accuracy.DENSE: "dense control",
    accuracy.TORCH_PRUNING: "Torch-Pruning `MagnitudePruner`, all layers",
    accuracy.TORCH_PRUNING_INSIDE: "Torch-Pruning `MagnitudePruner`, inside of blocks",
    accuracy.TORCH_PRUNING_BELOW: "the same, not above half of the MACs",
    accuracy.UNIFORM: "`ChannelPruning(target_macs_ratio=0.5)`, all layers",
    accuracy.RECONSTRUCTED: "the same with reconstruction",
    accuracy.CONTRIBUTION: "`ChannelPruning`, inside of blocks, importance `contribution`",
    accuracy.BEST: "`ChannelPruning`, inside of blocks, importance `group`",
}


def accuracy_table(results: dict[str, Any]) -> str:
    """Accuracy after the cut and after tuning, as Markdown."""
    runs = study(results)
    lines = ["| | MACs ratio | after the cut | after tuning |", "| --- | --- | --- | --- |"]
    for arm, label in LABELS.items():
        cut, tuned = (accuracy.scores(runs, arm, what) for what in ("top1_after_cut", "top1"))
        if tuned:
            ratio = mean(r["macs_ratio"] for r in runs if accuracy.is_of(r, arm))
            spreads = f"{accuracy.spread(cut) if cut else '–'} | {accuracy.spread(tuned)}"
            lines.append(f"| {label} | {ratio:.3f} | {spreads} |")
    return "\n".join(lines)


def repair_table(results: dict[str, Any]) -> str:
    """Accuracy right after the cut, without any tuning, as Markdown."""
    lines = [
        "| cut | nothing | new BN statistics | reconstruction | both |",
        "| --- | --- | --- | --- | --- |",
    ]
    runs = study(results)
    for name in dict.fromkeys(arm.name for arm in accuracy.untuned_arms()):
        repairs = [arm for arm in accuracy.untuned_arms() if arm.name == name]
        cells = [accuracy.scores(runs, arm, "top1_after_cut") for arm in repairs]
        shown = [accuracy.spread(cell) if cell else "–" for cell in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def pilot_table(results: dict[str, Any]) -> str:
    """The pilot, as Markdown."""
    lines = ["| candidate | after the cut | after tuning |", "| --- | --- | --- |"]
    for run in results["runs"]:
        if run["split"] == "val":
            after_cut = run["top1_after_cut"]
            first = "–" if after_cut is None else f"{100 * after_cut:.2f}"
            cells = f"{first} | {100 * run['top1']:.2f}"
            lines.append(f"| {run['name']} | {cells} |")
    return "\n".join(lines)


def latency_table(results: dict[str, Any]) -> str:
    """Latency of slim MobileNet-v1, as Markdown."""
    lines = [
        "| | batch | MACs ratio | dense ms | slim ms | latency ratio (10–90 %) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['model']} | {row['batch_size']} | {row['macs_ratio']:.3f} "
        f"| {row['dense']['median_ms']:.2f} | {row['slim']['median_ms']:.2f} "
        f"| {row['latency_ratio']:.3f} ({row['latency_ratio_p10']:.3f}–"
        f"{row['latency_ratio_p90']:.3f}) |"
        for row in results["latency"]
    ]
    return "\n".join(lines)


def study(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that are not the pilot's."""
    return [run for run in results["runs"] if run["split"] == "test"]


def margin(results: dict[str, Any]) -> float:
    """Points that reconstruction gains before any tuning, the least of the cuts; NaN if unknown."""
    gains = []
    for arm in accuracy.untuned_arms():
        if not arm.recalibrate and not arm.reconstruct:
            without = accuracy.scores(study(results), arm, "top1_after_cut")
            repaired = replace(arm, reconstruct=True)
            with_ = accuracy.scores(study(results), repaired, "top1_after_cut")
            if without and with_:
                gains.append(mean(with_) - mean(without))
    return min(gains, default=float("nan"))


def lead(results: dict[str, Any], peer: accuracy.Arm = accuracy.TORCH_PRUNING_BELOW) -> float:
    """Points by which our best arm leads Torch-Pruning's; NaN if unknown.

    Args:
        results: Of a full run.
        peer: Which of Torch-Pruning's; by default the one that has half of the MACs.
    """
    theirs = accuracy.scores(study(results), peer)
    ours = accuracy.scores(study(results), accuracy.BEST)
    return mean(ours) - mean(theirs) if theirs and ours else float("nan")


def check(results: dict[str, Any], *, judge_accuracy: bool = True) -> list[str]:
    """The bars that do not hold.

    Args:
        results: Of a full or a quick run.
        judge_accuracy: Whether to judge accuracy after tuning; a quick run says nothing about it.
    """
    found = []
    if judge_accuracy:
        for arm in accuracy.ARMS:
            runs = len(accuracy.scores(study(results), arm))
            if runs != len(accuracy.SEEDS):
                found.append(f"{arm.name} has {runs} runs of {len(accuracy.SEEDS)}")
        if not lead(results) >= 0:
            found.append(f"our best arm leads Torch-Pruning by {lead(results):.2f} points")
    if study(results) and not margin(results) > 0:
        found.append(f"reconstruction gains {margin(results):.2f} points before any tuning")
    found += [
        f"{run['name']} keeps {run['macs_ratio']:.4f} of the MACs"
        for run in results["runs"]
        if run["by"] == "ours"
        and run["macs_ratio"] is not None
        and not 0.99 * accuracy.TARGET <= run["macs_ratio"] <= accuracy.TARGET
    ]
    return found + missed(time_bars(results))


def time_bars(results: dict[str, Any]) -> list[TimeBar]:
    """The bars on time; a file of an earlier run has no training steps to compare with."""
    bars = []
    for name in ("cut_step_ratio", "in_fit_step_ratio"):
        found = results["cut_time"].get(name)
        ratio = None if found is None else Ratio.from_json(found)
        bars.append(TimeBar(f"{name} of ResNet-50", CUT_BAR, ratio, "not measured in this file"))
    point = Ratio.from_json(results["sensitivity"]["time_ratio"])
    return [*bars, TimeBar("a sensitivity point, in evaluations", POINT_BAR, point)]


def show(results: dict[str, Any]) -> None:
    """Print the tables and the numbers that the bars are about."""
    for table in (accuracy_table, repair_table, pilot_table, latency_table):
        print(f"{table(results)}\n")
    print(
        f"lead_points={lead(results):.2f} reconstruction_margin_points={margin(results):.2f} "
        f"cut_s={results['cut_time']['cut_s']:.2f} in_fit_s={results['cut_time']['in_fit_s']:.2f}"
    )
    for bar in time_bars(results):
        print(bar)


def main() -> int:
    """Run, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="committed results and a little more")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--pilot", action="store_true", help="run the pilot instead of the study")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--assets", help="the folder that LIT_COMPRESS_ASSETS would name")
    parser.add_argument("--workers", type=int, default=1, help="training runs at the same time")
    parser.add_argument("--output", type=Path, help="where to write the JSON of a quick run")
    arguments = parser.parse_args()
    if arguments.assets:
        os.environ["LIT_COMPRESS_ASSETS"] = arguments.assets
    accuracy.be_quiet()
    found = []
    if arguments.quick:
        say_duration(QUICK_UNITS)
        little = quick()
        if arguments.output is not None:
            write(little, arguments.output)
        show(little)
        found += [f"quick: {line}" for line in check(little, judge_accuracy=False)]
        results = read_results() if RESULTS.exists() else {}
    else:
        results = run_all(accuracy.Settings(), arguments.workers, arguments.parts, arguments.pilot)
    if results.keys() >= MEASURED:
        show(results)
        found += check(results)
    else:
        found.append(f"{RESULTS.name} lacks {sorted(MEASURED - results.keys())}; run it in full")
    for line in found:
        print(line)
    return 1 if arguments.check and found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Writes ``docs/results.md`` from the committed JSON, so that no number is typed by hand.

python benchmarks/results_page.py            # write the page
python benchmarks/results_page.py --check    # exit with 1 if the page is not up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import callback_overhead
import channel_families
import channel_pruning
import integer_forms
import kill_and_resume
import pruning_accuracy
import pruning_cost
import quantization_accuracy
import quantization_corrections
import ratio_search
import ratio_search_tables
import runtime_latency
import runtime_support
import sparsity_distillation
from bars import CONFIDENCE, Ratio

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "results.md"


def page() -> str:
    """The page as Markdown."""
    sections = [_INTRODUCTION, accuracy(), cost()]
    if channel_pruning.RESULTS.exists():
        sections.append(channels(channel_pruning.read_results()))
    sections.append(channel_families.section())
    if ratio_search.RESULTS.exists():
        found = ratio_search.read_results(ratio_search.RESULTS)
        sections.append(ratio_search_tables.section(found))
    if quantization_accuracy.RESULTS.exists():
        sections.append(quantization_accuracy.section())
    if quantization_corrections.RESULTS.exists():
        sections.append(corrections(quantization_corrections.read_results()))
    if runtime_latency.RESULTS.exists():
        sections.append(latency(runtime_latency.read_results()))
    if integer_forms.RESULTS.exists():
        sections.append(integer_forms.section())
    if runtime_support.RESULTS.exists():
        sections.append(support(runtime_support.read_results()))
    if kill_and_resume.RESULTS.exists():
        sections.append(faults(json.loads(kill_and_resume.RESULTS.read_text())))
    return "\n\n".join(sections) + "\n"


def accuracy() -> str:
    """Sparse ResNet-20 with and without distillation."""
    results = sparsity_distillation.read_results()
    settings = results["settings"]
    return f"""## Sparsity and distillation: ResNet-20 on CIFAR-10 (JPEG)

Top-1 in percent on the 10,000 test images; mean ± standard deviation over
{len(sparsity_distillation.SEEDS)} seeds. All runs start from the same dense network (88.51 %) and
train for {settings["epochs"]} epochs on 45,000 images (SGD, learning rate {settings["lr"]} with a
cosine, batch {settings["batch_size"]}, {settings["precision"]}); the sparsity rises by the cubic
schedule over the first {100 * settings["schedule_end"]:g} % of the steps, allocation
`{settings["allocation"]}`. Distillation is from a snapshot of the dense network, temperature
{settings["temperature"]:g}, weights {settings["task_loss_weight"]:g} (task) and
{settings["distill_loss_weight"]:g} (teacher). The control has the same budget and no compression.

{sparsity_distillation.table(results)}

Read the sparse rows against the control, which had the same budget, rather than against the network
that all of them start from.

JSON: [`results/sparsity_distillation.json`](results/sparsity_distillation.json); made by
`python benchmarks/sparsity_distillation.py`."""


def cost() -> str:
    """What the callbacks add to a training step."""
    results = callback_overhead.read_results()
    ms, machine = results["median_ms"], results["machine"]
    ratio = Ratio.from_json(results["sparsity_step_ratio"])
    updates = results["mask_update_step_ratios"]
    rows = [
        ("plain training step", ms["plain"], "1", ""),
        (
            "with Lightning's `ModelPruning`",
            ms["lightning_model_pruning"],
            str(Ratio.from_json(results["lightning_model_pruning_step_ratio"])),
            "",
        ),
        (
            "with `MagnitudeSparsity`, between mask updates",
            ms["sparsity"],
            str(Ratio.from_json(results["sparsity_step_ratio"])),
            "at most 1.010",
        ),
        ("one mask update, uniform", None, str(Ratio.from_json(updates["uniform"])), "at most 1"),
        ("one mask update, global", None, str(Ratio.from_json(updates["global"])), "at most 1"),
        (
            "with `Distillation`, against plain + the teacher's forward",
            ms["distillation"],
            str(Ratio.from_json(results["distillation_ratio"])),
            "at most 1.030",
        ),
    ]
    lines = [f"| {a} | {'–' if b is None else f'{b:.1f}'} | {c} | {d} |" for a, b, c, d in rows]
    table = "\n".join(["| | median ms | ratio | bar |", "| --- | --- | --- | --- |", *lines])
    return f"""## What the callbacks cost: a training step of ResNet-18

Batch {results["batch"]}, {machine["num_threads"]} thread, {results["num_steps"]} steps of each run
taken in turns in one process; ratios are medians over the turns{_intervals(ratio)}.
torch {machine["torch"]}, lightning {machine["lightning"]}.

{table}

JSON: [`results/callback_overhead.json`](results/callback_overhead.json); made by
`python benchmarks/callback_overhead.py`."""


def _intervals(ratio: Ratio) -> str:
    """What is in parentheses behind ratios; files of earlier runs have none."""
    return f", with intervals of {100 * CONFIDENCE:g} %" if ratio.rounds else ""


def channels(results: dict[str, Any]) -> str:
    """Channel pruning: accuracy beside Torch-Pruning, time of a cut, latency, sensitivity."""
    settings, machine, cut = results["settings"], results["machine"], results["cut_time"]
    point = results["sensitivity"]
    above = channel_pruning.lead(results, pruning_accuracy.TORCH_PRUNING_INSIDE)
    return f"""## Channel pruning: ResNet-20 on CIFAR-10 (JPEG) at half of the MACs

Top-1 in percent on the 10,000 test images; mean ± standard deviation over
{len(pruning_accuracy.SEEDS)} seeds. All runs start from the same dense network (88.51 %), are cut
before the first step, and are tuned for {settings["epochs"]} epochs on 45,000 images in the same
order (SGD, learning rate {settings["lr"]} with a cosine, weight decay {settings["weight_decay"]},
batch {settings["batch_size"]}, {settings["precision"]}), channels rounded to
{settings["round_to"]}. The control has the same budget and no cut.

{channel_pruning.accuracy_table(results)}

Torch-Pruning 1.6.1 is driven with group magnitude importance (p = 2), the same ratio in each layer.
It reads the shortcuts of this network as if their channels kept their numbers, which they do not
(zeros are padded in front), and so cuts wrong channels of the residual stream; inside of the blocks
it is right. All layers of one width move at once there, so that it jumps from 0.505 of the
MACs to 0.469: both are run, and only the second is at half of them. Ours is never above.

Ours with importance `group` is {channel_pruning.lead(results):+.2f} points from Torch-Pruning at
half of the MACs, and {above:+.2f} from Torch-Pruning with 0.505 of them.

What did not win: reconstruction is worth much before tuning and nothing after it; the importance
`contribution`, best right after the cut, is not best after tuning; nor are global allocation by
first-order importance and cutting bit by bit. The pilot was one seed that the study does not use,
scored on 5,000 training images held out from tuning, which the dense network had been trained on:
it flatters what stays close to the dense network, such as reconstruction. `group` was settled on
after `contribution` had been scored on the test images.

{channel_pruning.pilot_table(results)}

### What repair is worth, before any tuning

Test top-1 right after our cut, importance `contribution`, {settings["num_calibration_batches"]}
calibration batches of training images. Reconstruction gains at least
{channel_pruning.margin(results):.1f} points over nothing.

{channel_pruning.repair_table(results)}

### Time

One cut of ResNet-50 with SGD momentum to {100 * cut["macs_ratio"]:.1f} % of its MACs, one
thread, median of {cut["repeats"]}; torch {machine["torch"]}.

| | trace s | cut s | ÷ training step | bar |
| --- | --- | --- | --- | --- |
| ours: scores, plan, cut, optimizer state | {cut["trace_s"]:.2f} | {cut["cut_s"]:.2f} \
| {_in_steps(cut, "cut_step_ratio")} | at most {channel_pruning.CUT_BAR:g} |
| ours, by the callback in a fit | – | {cut["in_fit_s"]:.2f} \
| {_in_steps(cut, "in_fit_step_ratio")} | at most {channel_pruning.CUT_BAR:g} |
| Torch-Pruning (leaves the optimizer as it was) | {cut["torch_pruning_trace_s"]:.2f} \
| {cut["torch_pruning_cut_s"]:.2f} | | |

The training step is one of ResNet-50 on {pruning_cost.STEP_IMAGES} images of
{pruning_cost.STEP_PIXELS} × {pruning_cost.STEP_PIXELS}.

MobileNet-v1, cut to half of its MACs with channels in multiples of 8, and the dense one in
turns in one process, one thread:

{channel_pruning.latency_table(results)}

A sensitivity point (copy, cut, evaluate {point["num_images"]:,} images in memory) of ResNet-20
takes {Ratio.from_json(point["time_ratio"])} times the evaluation of the same slim model
(bar: {channel_pruning.POINT_BAR:.2f}).

JSON: [`results/channel_pruning.json`](results/channel_pruning.json); made by
`python benchmarks/channel_pruning.py`."""


def _in_steps(cut: dict[str, Any], name: str) -> str:
    """A file of an earlier run has no training steps to compare with."""
    return str(Ratio.from_json(cut[name])) if name in cut else "not measured yet"


def corrections(results: dict[str, Any]) -> str:
    """What corrections and ranges do after training."""
    settings = results["settings"]
    seeds = quantization_corrections.complete_seeds(results)
    others = sorted({p["seed"] for p in results["points"]} - set(seeds))
    left_out = (
        f"\nLeft out, as points of it are missing: seed {', '.join(map(str, others))}."
        if others
        else ""
    )
    return f"""## Corrections for few bits

Top-1 in percent on {settings["test_images"]:,} of the CIFAR-10 (JPEG) test images after
post-training quantization; mean ± standard deviation over
{len(seeds)} seeds, which choose {settings["num_calibration_batches"]} calibration batches of
{settings["batch_size"]} training images. w4a8 is 4-bit weights and 8-bit activations. A dash was
not run: AdaRound was left to few bits for weights alone, which is what it rounds. Seconds are of
one processor core.{left_out}

{quantization_corrections.table(results)}

What each of them gains over `none`, in points, on the same seeds; left out where seeds disagree:

{quantization_corrections.gains_table(results)}

Ranges of activations, without corrections:

{quantization_corrections.ranges_table(results)}

JSON: [`results/quantization_corrections.json`](results/quantization_corrections.json); made by
`python benchmarks/quantization_corrections.py`."""


def latency(results: dict[str, Any]) -> str:
    """Int8 files beside those of the peers."""
    machine = results["machine"]
    vnni = "with VNNI" if machine["vnni"] else "without VNNI"
    lacking = runtime_latency.not_in(results)
    missing = f"\nNot measured yet: {', '.join(lacking)}.\n" if lacking else ""
    bars = "\n".join(f"- {bar}" for bar in runtime_latency.time_bars(results))
    return f"""## Int8 files beside the peers

One process, one thread, one image at a time, the files in turns, {results["rounds"]} rounds;
milliseconds of processor time, medians. Those that are not trained have {results["weights"]}.
Measured on {machine["processor"]}, {vnni}.

Bar, for {" and ".join(runtime_latency.SUBJECTS)}: our fastest file after training takes at most
{runtime_latency.BAR} times as long as the fastest peer that is as close to the float network: its
cosine is at most {runtime_latency.LOSS_BAR} below that of our file. A peer that is further away is
called wrong here, and does not count.
{missing}
{bars}

{runtime_latency.table(results)}

JSON: [`results/runtime_latency.json`](results/runtime_latency.json); made by
`python benchmarks/runtime_latency.py`."""


def support(results: dict[str, Any]) -> str:
    """Which network runs where."""
    return f"""## Which network runs where

Each network, in floating point and quantized after training, on each runtime: one thread, one image
at a time, {results["rounds"]} rounds; cosine and argmax agreement against the same network in
torch. Where int8 takes more than {runtime_support.BAR} times as long as fp32, the last column is
what `export --fastest` keeps, and how many times as fast as fp32 that is. The networks have
{results["weights"]}.

{runtime_support.table(results)}

JSON: [`results/runtime_support.json`](results/runtime_support.json); made by
`python benchmarks/runtime_latency.py --support`."""


def faults(results: dict[str, Any]) -> str:
    """Runs killed at random moments."""
    trials = results["trials"]
    kills = sum(trial["kills"] for trial in trials)
    return f"""## Runs killed at random moments

{len(trials)} runs with channel pruning were killed (SIGKILL) {kills} times, a checkpoint every
{results["checkpoint_every"]} steps, and resumed from the newest checkpoint that could be read.
"Identical": all weights at the end equal, bit for bit, those of the same run without interruption.

{kill_and_resume.table(results)}

JSON: [`results/kill_and_resume.json`](results/kill_and_resume.json); made by
`python benchmarks/kill_and_resume.py`."""


_INTRODUCTION = """# Results

Every number on this page is written by a script from JSON that a benchmark committed; run the
benchmark and `python benchmarks/results_page.py` to get your own."""


def main() -> int:
    """Write or compare the page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    text = page()
    if arguments.check:
        current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
        print("up to date" if current == text else f"{PAGE} is out of date; run this script")
        return int(current != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

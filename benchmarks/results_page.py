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

import sparsity_distillation

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "results.md"


def page() -> str:
    """The page as Markdown."""
    return "\n\n".join([_INTRODUCTION, accuracy(), cost()]) + "\n"


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
    results: dict[str, Any] = json.loads((DOCS / "results" / "callback_overhead.json").read_text())
    ms, machine = results["median_ms"], results["machine"]
    updates = results["mask_update_step_ratios"]
    rows = [
        ("plain training step", ms["plain"], "1", ""),
        (
            "with Lightning's `ModelPruning`",
            ms["lightning_model_pruning"],
            f"{results['lightning_model_pruning_step_ratio']:.3f}",
            "",
        ),
        (
            "with `MagnitudeSparsity`, between mask updates",
            ms["sparsity"],
            f"{results['sparsity_step_ratio']:.3f}",
            "at most 1.010",
        ),
        ("one mask update, uniform", None, f"{updates['uniform']:.3f}", "below 1"),
        ("one mask update, global", None, f"{updates['global']:.3f}", "below 1"),
        (
            "with `Distillation`, against plain + the teacher's forward",
            ms["distillation"],
            f"{results['distillation_ratio']:.3f}",
            "at most 1.030",
        ),
    ]
    lines = [f"| {a} | {'–' if b is None else f'{b:.1f}'} | {c} | {d} |" for a, b, c, d in rows]
    table = "\n".join(["| | median ms | ratio | bar |", "| --- | --- | --- | --- |", *lines])
    return f"""## What the callbacks cost: a training step of ResNet-18

Batch {results["batch"]}, {machine["num_threads"]} thread, {results["num_steps"]} steps of each run
taken in turns in one process; ratios are medians over the turns. torch {machine["torch"]},
lightning {machine["lightning"]}.

{table}

JSON: [`results/callback_overhead.json`](results/callback_overhead.json); made by
`python benchmarks/callback_overhead.py`."""


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

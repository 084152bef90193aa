"""Accuracy of sparse ResNet-20 on CIFAR-10 (JPEG), with and without distillation.

Every point starts from the same trained dense network, trains for the same number of epochs and
is scored once, on the test folder. Methods:

- ``dense``: the control, fine-tuned without any compression;
- ``sparsity``: ``MagnitudeSparsity``;
- ``sparsity+distillation``: the same with ``Distillation`` from a snapshot of the dense network.

Bars: at every level the mean over the seeds with distillation is at least the mean without; on
scikit-learn's digits, 90 % sparsity reaches at least 97 % top-1.

    python benchmarks/sparsity_distillation.py [--assets DIR] [--workers 2] [--threads 1]
    python benchmarks/sparsity_distillation.py --quick --check

The full run adds to ``docs/results/sparsity_distillation.json`` point by point, and goes on where
it was stopped. ``--quick`` reads that file and trains one short point again.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from machine import machine, say_duration

from lit_compress import Distillation, MagnitudeSparsity, Schedule
from lit_compress.tasks import CIFAR10JPEGDataModule, DigitsDataModule, ImageClassifier

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "sparsity_distillation.json"
LEVELS = (0.8, 0.9, 0.95)
SEEDS = (1, 2, 3)
QUICK_UNITS = 100.0  # of training steps, see machine.py
DIGITS_BAR = 0.97
METHODS = ("sparsity", "sparsity+distillation")


@dataclass(frozen=True)
class Settings:
    """What all points share."""

    epochs: int = 3
    batch_size: int = 128
    lr: float = 0.05
    weight_decay: float = 1e-4
    allocation: str = "global"
    schedule_end: float = 0.5
    temperature: float = 4.0
    task_loss_weight: float = 0.5
    distill_loss_weight: float = 0.5
    precision: str = "bf16-mixed"
    max_train_per_class: int | None = None


@dataclass(frozen=True)
class Point:
    """One training run."""

    method: str
    sparsity: float
    seed: int


def points() -> list[Point]:
    """All points of the study, the seeds in turn, so that a partial run is balanced."""
    return [
        point
        for seed in SEEDS
        for point in [
            *(Point(method, level, seed) for level in LEVELS for method in METHODS),
            Point("dense", 0.0, seed),
        ]
    ]


def callbacks(
    point: Point, settings: Settings, sparsities: dict[str, float] | None = None
) -> list[pl.Callback]:
    """The callbacks under test.

    Args:
        point: The run.
        settings: The rest.
        sparsities: Of each layer, by name; then the allocation is no rule's.
    """
    chosen: list[pl.Callback] = []
    if "distillation" in point.method:
        chosen.append(
            Distillation(
                temperature=settings.temperature,
                task_loss_weight=settings.task_loss_weight,
                distill_loss_weight=settings.distill_loss_weight,
            )
        )
    if "sparsity" in point.method:
        schedule = Schedule("cubic", begin=0, end=settings.schedule_end, update_every=0.01)
        chosen.append(
            MagnitudeSparsity(
                sparsities or point.sparsity,
                schedule=schedule,
                allocation="uniform" if sparsities else settings.allocation,  # type: ignore[arg-type]
            )
        )
    return chosen


def train(
    point: Point, settings: Settings, sparsities: dict[str, float] | None = None
) -> dict[str, Any]:
    """Train one point and score it on the test folder; see :func:`callbacks`."""
    pl.seed_everything(point.seed, verbose=False)
    module = ImageClassifier(
        "resnet20",
        weights="resnet20-cifar10-jpeg",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )
    data = CIFAR10JPEGDataModule(
        batch_size=settings.batch_size,
        seed=point.seed,
        max_train_per_class=settings.max_train_per_class,
    )
    chosen = callbacks(point, settings, sparsities)
    trainer = quiet_trainer(settings.epochs, chosen, precision=settings.precision)
    began = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - began
    val = trainer.callback_metrics["val_top1"].item()
    test = trainer.test(module, data, verbose=False)[0]["test_top1"]
    return asdict(point) | {
        "test_top1": test,
        "val_top1": val,
        "measured_sparsity": measured_sparsity(module, chosen),
        "train_seconds": round(seconds, 1),
    }


def measured_sparsity(module: pl.LightningModule, chosen: list[pl.Callback]) -> float:
    """Zeros / weights over the selected weights, counted in the weights themselves."""
    sparse = [c for c in chosen if isinstance(c, MagnitudeSparsity)]
    weights = [module.get_parameter(n) for c in sparse for n in c.sparsities]
    zeros = sum(int((w == 0).sum()) for w in weights)
    return zeros / sum(w.numel() for w in weights) if weights else 0.0


def quiet_trainer(epochs: int, chosen: list[pl.Callback], **kwargs: Any) -> pl.Trainer:
    """A Trainer that only trains."""
    return pl.Trainer(
        max_epochs=epochs,
        callbacks=chosen,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


def digits_top1() -> float:
    """Digits, dense first, then to 90 % sparsity with distillation from the dense network."""
    pl.seed_everything(0, verbose=False)
    module = ImageClassifier("digits_cnn", lr=0.05)
    data = DigitsDataModule(batch_size=64)
    sparsity = MagnitudeSparsity(0.9, schedule=Schedule(begin=0.3, end=0.7))
    trainer = quiet_trainer(15, [Distillation(begin=0.3), sparsity])
    trainer.fit(module, data)
    assert abs(measured_sparsity(module, [sparsity]) - 0.9) < 1e-4
    top1: float = trainer.test(module, data, verbose=False)[0]["test_top1"]
    return top1


# --- The study ------------------------------------------------------------------------------------


def read_results() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def run_all(settings: Settings, workers: int, threads: int) -> None:
    """Train every point that is not in the results yet; write after each."""
    done: dict[str, Any] = {"settings": asdict(settings), "points": []}
    if RESULTS.exists():
        done = read_results()
    if done["settings"] != asdict(settings):
        raise SystemExit(f"{RESULTS} was made with other settings; move it away first.")
    done["machine"] = machine()
    finished = {Point(p["method"], p["sparsity"], p["seed"]) for p in done["points"]}
    todo = [point for point in points() if point not in finished]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=_be_quiet, initargs=(threads,)) as pool:
        for result in pool.imap_unordered(_train, [(point, settings) for point in todo]):
            done["points"].append(result)
            done["points"].sort(key=lambda p: (p["sparsity"], p["method"], p["seed"]))
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(done, indent=2) + "\n")
            print(json.dumps(result), flush=True)


def _train(arguments: tuple[Point, Settings]) -> dict[str, Any]:
    return train(*arguments)


def _be_quiet(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def scores(results: dict[str, Any], method: str, sparsity: float) -> list[float]:
    """Test top-1 in percent of each seed."""
    return [
        100 * p["test_top1"]
        for p in results["points"]
        if p["method"] == method and p["sparsity"] == sparsity
    ]


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table: mean and standard deviation over the seeds."""

    def cell(method: str, level: float) -> str:
        values = scores(results, method, level)
        return f"{mean(values):.2f} ± {stdev(values):.2f}"

    lines = [
        "| sparsity | sparsity alone | sparsity + distillation | difference |",
        "| --- | --- | --- | --- |",
        f"| dense control | {cell('dense', 0.0)} | – | – |",
    ]
    for level in LEVELS:
        difference = mean(scores(results, METHODS[1], level)) - mean(
            scores(results, METHODS[0], level)
        )
        lines.append(
            f"| {100 * level:g} % | {cell(METHODS[0], level)} | {cell(METHODS[1], level)} "
            f"| {difference:+.2f} |"
        )
    return "\n".join(lines)


def check(results: dict[str, Any]) -> tuple[float, list[str]]:
    """The smallest gain by distillation, in points, and what does not hold."""
    missed, gains = [], []
    for level in LEVELS:
        without, with_ = (scores(results, method, level) for method in METHODS)
        if len(without) != len(SEEDS) or len(with_) != len(SEEDS):
            missed.append(f"at {level} there are {len(without)} and {len(with_)} seeds of 3")
            continue
        gains.append(mean(with_) - mean(without))
        if gains[-1] < 0:
            missed.append(f"at {level} distillation loses {-gains[-1]:.2f} points")
    missed += [
        f"{point} does not have the sparsity it should"
        for point in results["points"]
        if abs(point["measured_sparsity"] - point["sparsity"]) > 1e-5
    ]
    return min(gains, default=float("nan")), missed


def main() -> int:
    """Run, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="committed results and one short run")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--assets", help="the folder that LIT_COMPRESS_ASSETS would name")
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    arguments = parser.parse_args()
    if arguments.assets:
        os.environ["LIT_COMPRESS_ASSETS"] = arguments.assets
    _be_quiet(arguments.threads)
    if arguments.quick:
        say_duration(QUICK_UNITS)
    else:
        run_all(Settings(), arguments.workers, arguments.threads)
    results = read_results()
    print(table(results))
    gain, missed = check(results)
    top1 = digits_top1()
    if top1 < DIGITS_BAR:
        missed.append(f"digits at 90 % sparsity score {top1:.4f}, below {DIGITS_BAR}")
    for line in missed:
        print(line)
    print(f"smallest_gain_points={gain:.2f} digits_top1={top1:.4f}")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())

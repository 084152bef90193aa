"""The training runs of the quantization study: QAT beside float fine-tuning with the same budget.

Every run starts from the same trained network and is scored once, on the test folder. Methods:

- ``control``: fine-tuning in floating point;
- ``qat-w8a8``: ``QuantizationAwareTraining()`` as it comes;
- ``qat-w8a8-frozen``: with batch norms frozen from the middle of the run on, which was the default
  when the study began. MobileNet-v1 diverges with it (one seed was enough to see that), so the
  default is not to freeze; a pilot on validation images said the same;
- ``qat-w4a8``: 4-bit weights with learned scales, batch norms frozen from the middle on;
- ``control-gentle``, ``qat-w8a8-gentle``, ``qat-w8a8-long``: ``control`` and ``qat-w8a8`` with what
  :data:`LATER_TRIES` says (the last without a control of its own). Added for MobileNet-v1, one
  after the other, when those before had been scored: fine-tuning as the study began loses as much
  as the bar allows, without any quantization. Any of the tries can hold the bars; the table shows
  all of them.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import lightning.pytorch as pl
import torch
from machine import machine

from lit_compress import QuantizationAwareTraining
from lit_compress.tasks import CIFAR10JPEGDataModule, ImageClassifier

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "quantization_training.json"
SEEDS = (1, 2, 3)
METHODS = {
    "resnet20": ("qat-w8a8", "control", "qat-w4a8"),
    "mobilenet_v1": (
        *("qat-w8a8", "control"),
        *("qat-w8a8-gentle", "control-gentle"),
        "qat-w8a8-long",
    ),
}
LATER_TRIES: dict[str, dict[str, Any]] = {"gentle": {"lr": 0.003}, "long": {"epochs": 3}}
"""Settings that differ, in the order in which they were tried."""
LABELS = {"resnet20": "ResNet-20", "mobilenet_v1": "MobileNet-v1 (0.5)"}


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    epochs: int = 2
    batch_size: int = 128
    lr: float = 0.01
    weight_decay: float = 1e-4
    precision: str = "bf16-mixed"
    max_train_per_class: int | None = None


@dataclass(frozen=True)
class Bar:
    """The mean of a method over the seeds is at most so many points below a reference."""

    model: str
    method: str
    reference: str  # "float", or a control
    points: float


BARS = (
    Bar("resnet20", "qat-w8a8", "control", 0.2),
    Bar("resnet20", "qat-w4a8", "float", 1.5),
    Bar("mobilenet_v1", "qat-w8a8", "float", 0.3),
    Bar("mobilenet_v1", "qat-w8a8", "control", 0.2),
    Bar("mobilenet_v1", "qat-w8a8-gentle", "float", 0.3),
    Bar("mobilenet_v1", "qat-w8a8-gentle", "control-gentle", 0.2),
    Bar("mobilenet_v1", "qat-w8a8-long", "float", 0.3),
)


@dataclass(frozen=True)
class Point:
    """One training run."""

    model: str
    method: str
    seed: int


def points() -> list[Point]:
    """All runs, the seeds in turn, so that a partial study is balanced."""
    return [Point(m, how, seed) for seed in SEEDS for m in METHODS for how in METHODS[m]]


def trained_module(model: str, lr: float = 0.01, weight_decay: float = 1e-4) -> ImageClassifier:
    """A trained network of the study: ``"resnet20"`` or ``"mobilenet_v1"`` (0.5)."""
    weights = {"resnet20": "resnet20-cifar10-jpeg", "mobilenet_v1": "mobilenetv1-0.5-cifar10-jpeg"}
    return ImageClassifier(
        model,
        model_args={"width": 0.5} if model == "mobilenet_v1" else None,
        weights=weights[model],
        lr=lr,
        weight_decay=weight_decay,
    )


def try_of(method: str) -> str:
    """Which of :data:`LATER_TRIES` a method belongs to; empty for what the study began with."""
    last = method.rpartition("-")[2]
    return last if last in LATER_TRIES else ""


def settings_of(method: str, settings: Settings) -> Settings:
    """Those of one method in a study."""
    return replace(settings, **LATER_TRIES.get(try_of(method), {}))


def callbacks(method: str) -> list[pl.Callback]:
    """The callbacks under test."""
    if method.startswith("control"):
        return []
    if method.removesuffix(f"-{try_of(method)}") == "qat-w8a8":
        return [QuantizationAwareTraining()]
    if method == "qat-w8a8-frozen":
        return [QuantizationAwareTraining(freeze_batch_norm=0.5)]
    return [QuantizationAwareTraining(weight_bits=4, ranges="learned", freeze_batch_norm=0.5)]


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


def train(point: Point, settings: Settings, keep: Path | None = None) -> dict[str, Any]:
    """Train one point and score it on the test folder, in float32 and rounded as trained."""
    pl.seed_everything(point.seed, verbose=False)
    settings = settings_of(point.method, settings)
    module = trained_module(point.model, settings.lr, settings.weight_decay)
    data = CIFAR10JPEGDataModule(
        batch_size=settings.batch_size,
        seed=point.seed,
        max_train_per_class=settings.max_train_per_class,
    )
    trainer = quiet_trainer(settings.epochs, callbacks(point.method), precision=settings.precision)
    began = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - began
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(keep / f"{point.model}-{point.method}-{point.seed}.ckpt")
    plain = quiet_trainer(0, [])
    test = plain.test(module, data, verbose=False)[0]["test_top1"]
    return asdict(point) | {"test_top1": test, "train_seconds": round(seconds, 1)}


def read_results() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def run_all(settings: Settings, workers: int, threads: int, keep: Path | None) -> None:
    """Train every point that is not in the results yet; write after each."""
    done: dict[str, Any] = {"settings": asdict(settings), "points": []}
    if RESULTS.exists():
        done = read_results()
    if done["settings"] != asdict(settings):
        raise SystemExit(f"{RESULTS} was made with other settings; move it away first.")
    done["machine"] = machine()
    finished = {Point(p["model"], p["method"], p["seed"]) for p in done["points"]}
    todo = [(point, settings, keep) for point in points() if point not in finished]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=be_quiet, initargs=(threads,)) as pool:
        for result in pool.imap_unordered(_train, todo):
            done["points"].append(result)
            done["points"].sort(key=lambda p: (p["model"], p["method"], p["seed"]))
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(done, indent=2) + "\n")
            print(json.dumps(result), flush=True)


def _train(arguments: tuple[Point, Settings, Path | None]) -> dict[str, Any]:
    return train(*arguments)


def be_quiet(threads: int) -> None:
    """One process of the study says nothing and uses so many threads."""
    torch.set_num_threads(threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


# --- What came out --------------------------------------------------------------------------------


def scores(results: dict[str, Any], model: str, method: str) -> list[float]:
    """Test top-1 in percent of each seed."""
    return [
        100 * p["test_top1"]
        for p in results["points"]
        if p["model"] == model and p["method"] == method
    ]


def mean_score(results: dict[str, Any], model: str, method: str) -> float:
    """Over the seeds; NaN where there is none."""
    values = scores(results, model, method)
    return mean(values) if values else math.nan


def bars_of(model: str, method: str) -> list[Bar]:
    """What a method is held to."""
    return [bar for bar in BARS if (bar.model, bar.method) == (model, method)]


def asked(bar: Bar, floating: dict[str, float], results: dict[str, Any]) -> float:
    """The least mean that holds a bar, in percent; NaN where the reference is missing."""
    if bar.reference == "float":
        return floating.get(bar.model, math.nan) - bar.points
    return mean_score(results, bar.model, bar.reference) - bar.points


def shortfall(bar: Bar, floating: dict[str, float], results: dict[str, Any]) -> float:
    """Points below what a bar asks for; 0 where it holds, NaN where something is missing."""
    lacking = asked(bar, floating, results) - mean_score(results, bar.model, bar.method)
    return 0.0 if lacking <= 1e-9 else lacking


def missed(floating: dict[str, float], results: dict[str, Any]) -> list[str]:
    """What does not hold; where a method was tried again, one of the tries has to hold its bars.

    Args:
        floating: Top-1 in percent of the networks that all runs start from, by name.
        results: Of the runs.
    """
    found = [
        f"{model} {method} has {len(values)} runs of {len(SEEDS)}"
        for model, methods in METHODS.items()
        for method in methods
        if len(values := scores(results, model, method)) != len(SEEDS)
    ]
    for model, methods in METHODS.items():
        for method in methods:
            if try_of(method):
                continue  # together with the first try
            tries = (method, *(f"{method}-{later}" for later in LATER_TRIES))
            misses = [
                [_miss(bar, floating, results) for bar in bars if shortfall(bar, floating, results)]
                for bars in (bars_of(model, name) for name in tries)
                if bars
            ]
            if all(misses):
                found += [line for lines in misses for line in lines]
    return found


def _miss(bar: Bar, floating: dict[str, float], results: dict[str, Any]) -> str:
    found = mean_score(results, bar.model, bar.method)
    reference = asked(bar, floating, results) + bar.points
    return f"{bar.model} {bar.method} scores {found:.2f}, below {reference:.2f} - {bar.points}"


def table(floating: dict[str, float], results: dict[str, Any]) -> str:
    """Quantized training beside its controls, with each bar and whether it holds, as Markdown."""
    lines = [
        "| network | | learning rate | epochs | top-1 | seeds | at least |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, methods in METHODS.items():
        before = spread([floating[model]] if model in floating else [])
        lines.append(f"| {LABELS[model]} | float, not tuned | | | {before} | | |")
        for method in methods:
            values = scores(results, model, method)
            cells = [
                f"`{method}`",
                *(str(getattr(settings_of(method, Settings()), n)) for n in ("lr", "epochs")),
                spread(values),
                f"{len(values)}",
                "; ".join(_verdict(bar, floating, results) for bar in bars_of(model, method)),
            ]
            lines.append(f"| | {' | '.join(cells)} |")
    return "\n".join(lines)


def _verdict(bar: Bar, floating: dict[str, float], results: dict[str, Any]) -> str:
    name = bar.reference if bar.reference == "float" else f"`{bar.reference}`"
    short, least = shortfall(bar, floating, results), asked(bar, floating, results)
    if math.isnan(short):
        return f"{name} − {bar.points}"
    return f"{name} − {bar.points} = {least:.2f}: {'**missed**' if short else 'held'}"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if not values:
        return "–"
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")

"""Eight bits without training, and the files of networks that were trained quantized.

Part of ``quantization_accuracy.py``, which says what the bars are.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import quantization_training as training
import torch
from quantization_training import LABELS, spread
from torch import Tensor, nn

from lit_compress import load_compressed
from lit_compress.compress.quantization.post_training import (
    PostTrainingScheme,
    quantize_after_training,
)
from lit_compress.compress.quantization.ranges import RangeKind
from lit_compress.deploy import ParityTolerance, export, load_file
from lit_compress.tasks import CIFAR10JPEGDataModule

NUM_TEST_IMAGES = 10_000

# In points.
POST_TRAINING_BARS = {"resnet20": 0.3, "mobilenet_v1": 1.0}
FILE_BAR = 0.2
ANY = ParityTolerance(
    cosine=0.0, argmax_agreement=0.0, max_error=1.0
)  # the bars judge, not the export

Batch = tuple[Tensor, Tensor]
Results = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Of quantization after training."""

    ranges: tuple[RangeKind, ...] = ("mse", "minmax")
    seeds: tuple[int, ...] = (1, 2, 3)
    num_calibration_batches: int = 16
    batch_size: int = 128
    test_stride: int = 1  # every so many test images


QUICK = Settings(ranges=("mse",), seeds=(1,), test_stride=10)


@cache
def batches(settings: Settings, seed: int) -> tuple[list[Batch], list[Batch]]:
    """Of the training split, for calibration, and of the test split."""
    needed = settings.num_calibration_batches * settings.batch_size
    data = CIFAR10JPEGDataModule(
        batch_size=settings.batch_size, seed=seed, max_train_per_class=needed // 10 + 1
    )
    data.prepare_data()
    data.setup()
    drawn = zip(range(settings.num_calibration_batches), data.train_dataloader(), strict=False)
    images, labels = data.splits["test"]
    data.splits["test"] = images[:: settings.test_stride], labels[:: settings.test_stride]
    return [batch for _, batch in drawn], list(data.test_dataloader())


@cache
def float_network(model: str) -> nn.Module:
    """A trained network of the study, in evaluation mode."""
    return training.trained_module(model).model.eval()


def quantized(network: nn.Module, calibration: list[Batch], ranges: RangeKind) -> nn.Module:
    """A copy in 8 bits, as ``PostTrainingQuantization(ranges=ranges)`` makes it."""
    network = copy.deepcopy(network)
    scheme = PostTrainingScheme(ranges=ranges)
    quantize_after_training(network, scheme, calibration, lambda net, batch: net(batch[0]))
    return network


@torch.no_grad()
def hits(run: Callable[[Tensor], Tensor], test: list[Batch]) -> Tensor:
    """Which images are classified rightly; bool, ``[num_images]``."""
    return torch.cat([run(images).argmax(1) == labels for images, labels in test])


def top1(right: Tensor) -> float:
    """In percent."""
    return round(100 * right.double().mean().item(), 2)


@cache
def float_hits(model: str, settings: Settings) -> Tensor:
    """Of a network of the study, before quantization."""
    return hits(float_network(model), batches(settings, settings.seeds[0])[1])


def float_top1(settings: Settings) -> dict[str, float]:
    """Of the networks of the study, in percent, by name."""
    return {model: top1(float_hits(model, settings)) for model in LABELS}


def hits_in_file(network: nn.Module, test: list[Batch]) -> Tensor:
    """Of the int8 file of a quantized network in ONNX Runtime; a wrong file is scored, too."""
    images = test[0][0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        path = export(network, "ort-int8", path, images, tolerance=ANY).path
        with load_file(path) as file:
            return hits(lambda images: file((images,))[0], test)


def measure(
    settings: Settings, points: list[Results], write: Callable[[list[Results]], None]
) -> None:
    """Quantize and score what is not among the points yet; ``write`` takes all of them so far."""
    finished = {(p["ranges"], p["seed"], p["model"]) for p in points}
    for ranges, seed, model in product(settings.ranges, settings.seeds, LABELS):
        if (ranges, seed, model) in finished:
            continue
        calibration, test = batches(settings, seed)
        before = float_hits(model, settings)
        network = quantized(float_network(model), calibration, ranges)
        after = hits(network, test)
        point = {"model": model, "ranges": ranges, "seed": seed, "num_images": len(after)}
        point |= {"float_top1": top1(before), "top1": top1(after)}
        point["num_changed"] = int((before != after).sum())
        if seed == settings.seeds[0]:
            point["file_top1"] = top1(hits_in_file(network, test))
        points.append(point)
        write(points)


def runs_with_files() -> list[tuple[str, str]]:
    """Network and method of the training runs whose networks are scored in files.

    One learning rate is enough: it changes the weights, not how a file computes with them.
    """
    return [
        (model, method)
        for model, methods in training.METHODS.items()
        for method in methods
        if method.startswith("qat") and not training.try_of(method)
    ]


def checkpoint_rows(folder: Path, settings: Settings) -> list[Results]:
    """Networks that were trained quantized (seed 1), in torch and in their int8 files."""
    _, test = batches(settings, settings.seeds[0])
    rows = []
    for model, method in runs_with_files():
        path = folder / f"{model}-{method}-1.ckpt"
        if not path.exists():
            continue
        network = load_compressed(path, training.trained_module(model).model).eval()
        in_torch, in_file = hits(network, test), hits_in_file(network, test)
        row = {"model": model, "method": method, "seed": 1, "num_images": len(in_torch)}
        rows.append(row | {"top1": top1(in_torch), "file_top1": top1(in_file)})
    return rows


def table(results: Results) -> str:
    """Quantization after training, as Markdown."""
    lines = [
        "| network | float | ranges | in torch | ONNX Runtime, seed 1 | at least |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for model, label in LABELS.items():
        for ranges in Settings.ranges:
            points = points_of(results, model, ranges)
            if points:
                values = spread([p["top1"] for p in points])
                files = spread([p["file_top1"] for p in points if "file_top1" in p])
                least = f"float − {POST_TRAINING_BARS[model]}" if ranges == "mse" else ""
                first = f"{label} | {points[0]['float_top1']:.2f} | `{ranges}`"
                lines.append(f"| {first} | {values} | {files} | {least} |")
    return "\n".join(lines)


def checkpoint_table(rows: list[Results]) -> str:
    """Networks that were trained quantized, in torch and in files, as Markdown."""
    lines = ["| network | trained as | in torch | ONNX Runtime |", "| --- | --- | --- | --- |"]
    for row in rows:
        scores = f"{row['top1']:.2f} | {row['file_top1']:.2f}"
        lines.append(f"| {LABELS[row['model']]} | `{row['method']}` | {scores} |")
    return "\n".join(lines)


def points_of(results: Results, model: str, ranges: str) -> list[Results]:
    """The points of one network and one way to find ranges."""
    found = results.get("post_training", [])
    return [p for p in found if p["model"] == model and p["ranges"] == ranges]


def missed(results: Results) -> list[str]:
    """What does not hold; fewer images than all may miss by two standard errors."""
    found = []
    for model, bar in POST_TRAINING_BARS.items():
        points = points_of(results, model, "mse")
        num_seeds = len(results["settings"]["seeds"])
        if len(points) != num_seeds:
            found.append(f"{model} has {len(points)} points after training of {num_seeds}")
        if not points:
            continue
        slack = mean(_slack(p) for p in points)
        in_torch = mean(p["float_top1"] - p["top1"] for p in points)
        in_files = [p["float_top1"] - p["file_top1"] for p in points if "file_top1" in p]
        in_file = mean(in_files) if in_files else math.nan
        for where, lost in (("torch", in_torch), ("its file", in_file)):
            if not lost <= bar + slack + 1e-9:
                found.append(f"{model} after training loses {lost:.2f} points in {where}")
    return found


def missed_in_files(rows: list[Results]) -> list[str]:
    """What does not hold in the files of networks that were trained quantized."""
    seen = {(row["model"], row["method"]) for row in rows}
    found = [f"{' '.join(one)} has no file" for one in runs_with_files() if one not in seen]
    return found + [
        f"{row['model']} {row['method']} scores {row['file_top1']:.2f} in its file and "
        f"{row['top1']:.2f} in torch"
        for row in rows
        if abs(row["file_top1"] - row["top1"]) > FILE_BAR + 1e-9
    ]


def _slack(point: Results) -> float:
    if point["num_images"] >= NUM_TEST_IMAGES:
        return 0.0
    # Of a difference of shares on the same images: McNemar 1947.
    return 200 * math.sqrt(point["num_changed"]) / float(point["num_images"])

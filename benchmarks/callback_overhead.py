"""What our callbacks add to a training step of ResNet-18, beside Lightning's own ModelPruning.

Runs side by side, one step of each in turn, on one thread:

- plain training;
- Lightning's ``ModelPruning`` (forward hooks that multiply masks);
- ``MagnitudeSparsity`` between two mask updates (bar: at most 1 % over plain);
- the same with a mask update after every step (bar: one update costs less than a plain step);
- ``Distillation`` (bar: at most 3 % over plain step + forward of the teacher).

    python benchmarks/callback_overhead.py [--quick] [--check] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from bars import Ratio, TimeBar, missed
from interleaved import time_steps
from lightning.pytorch.callbacks import ModelPruning
from machine import machine, say_duration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from lit_compress import Distillation, MagnitudeSparsity, Schedule

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "callback_overhead.json"
BATCH_SIZE, IMAGE_SIZE = 128, 32
QUICK_STEPS, QUICK_WARMUP_STEPS = 16, 3
QUICK_COST = 6.0
"""Of a round of the quick run, in plain steps: four runs, a forward, a mask update, the set-up."""
BARS = {
    "sparsity_step_ratio": 1.01,
    "mask_update_step_ratio": 1.0,
    "distillation_ratio": 1.03,
}


class Classifier(pl.LightningModule):
    """ResNet-18 and cross-entropy, SGD with momentum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = resnet18(num_classes=10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of one batch."""
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


def lightning_pruning() -> ModelPruning:
    """Lightning's callback, global magnitude pruning at 50 %, applied before the first step."""
    callback = ModelPruning("l1_unstructured", amount=0.5, use_global_unstructured=True)
    callback.on_fit_start = lambda trainer, pl_module: callback.apply_pruning(0.5)  # type: ignore
    return callback


def masks_from_the_start() -> MagnitudeSparsity:
    """Masks that were chosen before the first step and stay."""
    return MagnitudeSparsity(0.5, schedule=Schedule("constant", begin=0, end=0, update_every=1))


def new_masks_each_step(allocation: Any) -> MagnitudeSparsity:
    """Masks that are chosen again after each step."""
    schedule = Schedule("linear", begin=0, end=10_000, update_every=1)
    return MagnitudeSparsity(0.9, initial_sparsity=0.5, schedule=schedule, allocation=allocation)


def measure(num_steps: int, num_warmup_steps: int, quick: bool = False) -> dict[str, Any]:
    """Time all runs, or when quick those that have a bar, and put the ratios together."""
    torch.manual_seed(0)
    x = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    y = torch.randint(0, 10, (BATCH_SIZE,))
    data = TensorDataset(x.repeat(num_warmup_steps, 1, 1, 1), y.repeat(num_warmup_steps))
    teacher = resnet18(num_classes=10).eval()

    @torch.no_grad()
    def teacher_forward() -> Tensor:
        output: Tensor = teacher(x)
        return output

    runs: dict[str, tuple[Any, list[pl.Callback]]] = {
        "plain": (Classifier, []),
        "lightning_model_pruning": (Classifier, [lightning_pruning()]),
        "sparsity": (Classifier, [masks_from_the_start()]),
        "sparsity_update_uniform": (Classifier, [new_masks_each_step("uniform")]),
        "sparsity_update_global": (Classifier, [new_masks_each_step("global")]),
        "distillation": (Classifier, [Distillation(teacher=resnet18(num_classes=10))]),
    }
    if quick:  # more turns for the others
        del runs["lightning_model_pruning"], runs["sparsity_update_uniform"]
    seconds = time_steps(
        runs,
        DataLoader(data, batch_size=BATCH_SIZE),
        num_steps=num_steps,
        num_warmup_steps=num_warmup_steps,
        calls={"teacher_forward": teacher_forward},
    )
    plain, sparsity = seconds["plain"], seconds["sparsity"]
    with_teacher = [a + b for a, b in zip(plain, seconds["teacher_forward"], strict=True)]
    updates = {
        rule: Ratio.of([a - b for a, b in zip(with_update, sparsity, strict=True)], plain)
        for rule in ("uniform", "global")
        if (with_update := seconds.get(f"sparsity_update_{rule}"))
    }
    ratios = {
        "sparsity_step_ratio": Ratio.of(sparsity, plain),
        "mask_update_step_ratio": max(updates.values(), key=lambda ratio: ratio.estimate),
        "distillation_ratio": Ratio.of(seconds["distillation"], with_teacher),
    }
    lightnings = seconds.get("lightning_model_pruning")
    return {
        "model": "resnet18",
        "batch": [BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE],
        "num_steps": num_steps,
        "machine": machine(),
        "median_ms": {name: 1e3 * median(values) for name, values in seconds.items()},
        **{name: ratio.as_json() for name, ratio in ratios.items()},
        "mask_update_step_ratios": {rule: ratio.as_json() for rule, ratio in updates.items()},
        "lightning_model_pruning_step_ratio": lightnings and Ratio.of(lightnings, plain).as_json(),
    }


def plain_step() -> Callable[[], object]:
    """A step without the Trainer: the unit of which the duration is a multiple."""
    module = Classifier()
    optimizer = module.configure_optimizers()
    x = torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE)
    y = torch.randint(0, 10, (BATCH_SIZE,))

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(module.training_step((x, y), 0))
        optimizer.step()

    return step


def time_bars(result: Mapping[str, Any]) -> list[TimeBar]:
    """The bars, with or without intervals: files of earlier runs have none."""
    return [TimeBar(name, limit, Ratio.from_json(result[name])) for name, limit in BARS.items()]


def check(result: Mapping[str, Any]) -> list[str]:
    """The bars that are missed."""
    return missed(time_bars(result))


def read_results() -> dict[str, Any]:
    """The committed results."""
    results: dict[str, Any] = json.loads(RESULTS.read_text())
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer runs and steps")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bar does not hold")
    parser.add_argument("--output", type=Path, help="where to write the JSON of a run")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)

    if arguments.quick:
        say_duration((QUICK_STEPS + QUICK_WARMUP_STEPS) * QUICK_COST, plain_step())
        result = measure(QUICK_STEPS, QUICK_WARMUP_STEPS, quick=True)
    else:
        result = measure(60, 5)
    output = arguments.output
    if output is None and not arguments.quick:
        output = RESULTS
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result["median_ms"].items():
        print(f"{name:28s} {value:8.1f} ms")
    for bar in time_bars(result):
        print(bar)
    return 1 if arguments.check and check(result) else 0


if __name__ == "__main__":
    sys.exit(main())

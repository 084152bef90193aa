"""The training runs of the ratio search study: what was found, trained beside the heuristics.

``tuning``: channels. Both arms start from the same trained network, are cut before the first step
(importance ``group``, least-squares reconstruction), and are tuned with the same data in the same
order. They differ in the plan: ``searched`` by the search of the same seed, or ``uniform``.

``sparsity``: densities of the weights of ResNet-20, trained as in ``sparsity_distillation.py`` but
for one epoch (there three), with the layers' densities as searched, the same for all, or as one
threshold of magnitude for all layers leaves them (``global``).
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import sparsity_distillation
import torch
from pruning_accuracy import ScoreAtStart
from ratio_search_bars import SEEDS, SPARSITIES, TUNED_CASES
from ratio_search_runs import ROUND_TO, trained_module

from lit_compress import ChannelPruning, count_macs
from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.tasks import CIFAR10JPEGDataModule

EXAMPLE = torch.zeros(1, 3, 32, 32)
TUNED_METHODS = ("searched", "uniform")
SPARSE_METHODS = (
    "searched+distillation",
    "uniform+distillation",
    "uniform",
    "global+distillation",
)
SPARSE_SETTINGS = sparsity_distillation.Settings(allocation="uniform", epochs=1)


@dataclass(frozen=True)
class Settings:
    """What all tuning runs share; learning rate and decay are those of ``pruning_accuracy.py``."""

    epochs: int = 6
    batch_size: int = 128
    lr: float = 0.02
    weight_decay: float = 5e-4
    precision: str = "bf16-mixed"
    importance: str = "group"
    reconstruct: bool = True
    num_calibration_batches: int = 24
    round_to: dict[str, int] = field(default_factory=lambda: dict(ROUND_TO))
    max_train_per_class: int | None = None
    test_stride: int = 1


@dataclass(frozen=True)
class Tuning:
    """One run that tunes a cut network."""

    model: str
    target: float
    method: str
    seed: int


@dataclass(frozen=True)
class Sparse:
    """One run that makes a network sparse."""

    method: str
    target: float
    seed: int


def tunings() -> list[Tuning]:
    """All tuning runs, the seeds in turn, so that a partial study is balanced."""
    return [
        Tuning(model, target, method, seed)
        for model, target in TUNED_CASES
        for seed in SEEDS
        for method in TUNED_METHODS
    ]


def sparse_runs() -> list[Sparse]:
    """All sparse runs: those of the search first, the seeds in turn."""
    return [
        Sparse(method, level, seed)
        for method in SPARSE_METHODS
        for seed in SEEDS
        for level in SPARSITIES
    ]


# --- Channels -------------------------------------------------------------------------------------


def tune(point: Tuning, settings: Settings, search: dict[str, Any] | None) -> dict[str, Any]:
    """Cut, score, tune, score.

    Args:
        point: The run.
        settings: The rest.
        search: Whose plan it is; ``None`` for ``uniform``.
    """
    pl.seed_everything(point.seed, verbose=False)
    module = trained_module(point.model, settings.lr, settings.weight_decay)
    data = CIFAR10JPEGDataModule(
        batch_size=settings.batch_size,
        seed=point.seed,
        max_train_per_class=settings.max_train_per_class,
    )
    data.setup()
    images, labels = data.splits["test"]
    data.splits["test"] = images[:: settings.test_stride], labels[:: settings.test_stride]
    dense_macs = count_macs(module.model, EXAMPLE)
    pruning, at_start = pruning_callback(point, settings, search), ScoreAtStart(data, "test")
    trainer = sparsity_distillation.quiet_trainer(
        settings.epochs, [pruning, at_start], precision=settings.precision, limit_val_batches=0
    )
    began = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - began
    test = trainer.test(module, data, verbose=False)[0]["test_top1"]
    return asdict(point) | {
        "macs_ratio": count_macs(module.model.eval(), EXAMPLE) / dense_macs,
        "top1_after_cut": at_start.top1,
        "test_top1": test,
        "train_seconds": round(seconds, 1),
    }


def pruning_callback(
    point: Tuning, settings: Settings, search: dict[str, Any] | None
) -> ChannelPruning:
    """The callback of one run; only plan or target differ."""
    return ChannelPruning(
        plan=None if search is None else plan_of(search),
        target_macs_ratio=point.target if search is None else None,
        importance=settings.importance,  # type: ignore[arg-type]
        reconstruct=settings.reconstruct,
        num_calibration_batches=settings.num_calibration_batches,
        round_to=settings.round_to[point.model],
    )


def plan_of(search: dict[str, Any]) -> ChannelPlan:
    """The plan that a search for channels found."""
    kept = {name: round(value) for name, value in search["found"].items()}
    return ChannelPlan(kept, {name: round(value) for name, value in search["full"].items()})


# --- Sparsity -------------------------------------------------------------------------------------


def train_sparse(
    point: Sparse,
    search: dict[str, Any] | None,
    settings: sparsity_distillation.Settings = SPARSE_SETTINGS,
) -> dict[str, Any]:
    """Train one sparse network and score it.

    Args:
        point: The run.
        search: Whose densities it has; ``None`` for the heuristics.
        settings: The rest.
    """
    densities, _, distillation = point.method.partition("+")
    if densities == "global":
        settings = replace(settings, allocation="global")
    method = f"sparsity+{distillation}" if distillation else "sparsity"
    run = sparsity_distillation.Point(method, point.target, point.seed)
    sparsities = None if search is None else sparsities_of(search)
    return sparsity_distillation.train(run, settings, sparsities) | asdict(point)


def sparsities_of(search: dict[str, Any]) -> dict[str, float]:
    """Zeros ÷ weights of each layer that a search found, by its name in the LightningModule."""
    return {f"model.{name}": 1 - density for name, density in search["found"].items()}

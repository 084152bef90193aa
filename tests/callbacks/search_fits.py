"""Short fits with a search before them, and what the tests look at in them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_compress.callbacks.search.ratio_search import RatioSearch
from lit_compress.search.ddpg import DDPGSettings
from lit_compress.search.search_result import SearchResult
from lit_compress.search.settings import CandidateSettings, ScoringSettings
from tests.callbacks.nets import trainer

AGENT = DDPGSettings(hidden_size=16, batch_size=8, learning_starts=2)
FEW = CandidateSettings(round_to=2, num_calibration_batches=2)
SMALL = ScoringSettings(num_examples=64, precision="trainer")


class Killed(Exception):
    """Ends a search in the middle."""


class EndsAfter(Logger):
    """A logger that raises when so many episodes are logged."""

    def __init__(self, episode: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.episode, self.error = episode, Killed() if error is None else error

    name = version = "ends"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Raise at an episode."""
        if metrics.get("search/episode") == self.episode:
            raise self.error


class Small(pl.LightningModule):
    """Two convolutions and a head, which logs accuracy and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(64, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def images(num: int = 128, seed: int = 0) -> TensorDataset:
    """Four patterns in noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(9))
    y = torch.randint(0, 4, (num,), generator=generator)
    return TensorDataset(patterns[y] + torch.randn(num, 1, 6, 6, generator=generator), y)


def loader(num: int = 128, **settings: Any) -> DataLoader:
    """Shuffled batches of 16."""
    return DataLoader(images(num), **({"batch_size": 16, "shuffle": True} | settings))


def search(target: float | None = 0.5, **arguments: Any) -> RatioSearch:
    """Four episodes over channels on half of the MACs, unless told."""
    settings = {"num_episodes": 4, "agent": AGENT, "candidates": FEW, "scoring": SMALL}
    return RatioSearch(**(settings | {"target_macs_ratio": target} | arguments))


def fit(
    *callbacks: pl.Callback,
    module: Any = Small,
    data: Any = None,
    val: Any = None,
    ckpt_path: Any = None,
    seed: int = 1,
    **settings: Any,
) -> tuple[pl.LightningModule, pl.Trainer]:
    """Train for one epoch of 8 steps, with files in the working folder."""
    pl.seed_everything(seed, verbose=False)
    model = module if isinstance(module, pl.LightningModule) else module()
    run = trainer(**({"max_epochs": 1, "callbacks": list(callbacks)} | settings))
    run.fit(model, loader() if data is None else data, val, ckpt_path=ckpt_path)
    return model, run


def episodes(result: SearchResult) -> list[dict[str, Any]]:
    """What happened, without the time that it took."""
    return [{**dataclasses.asdict(e), "seconds": 0, "score": str(e.score), "reward": str(e.reward)}
            for e in result.episodes]  # fmt: skip


def files(folder: Path) -> set[str]:
    """Names of the files in a folder."""
    return {file.name for file in folder.iterdir()}

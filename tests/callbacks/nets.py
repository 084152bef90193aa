"""Small modules and data that the callback tests train."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(pl.LightningModule):
    """A small conv net with batch norm; plain automatic optimization."""

    def __init__(self, lr: float = 0.05, weight_decay: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 16, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.parameters(),
            lr=self.hparams["lr"],
            momentum=0.9,
            weight_decay=self.hparams["weight_decay"],
        )


class ManualNet(Net):
    """The same under manual optimization, with two optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        head = list(self.model[8].parameters())
        body = [p for n, p in self.model.named_parameters() if not n.startswith("8")]
        return [
            torch.optim.SGD(body, lr=0.05, momentum=0.9),
            torch.optim.Adam(head, lr=1e-3),
        ]


def loader(num: int = 64, batch_size: int = 8) -> DataLoader:
    """Fixed random images in fixed order: ``num / batch_size`` batches."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 1, 6, 6, generator=generator)
    y = torch.randint(0, 4, (num,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer(**kwargs: object) -> pl.Trainer:
    """A quiet Trainer on one CPU."""
    settings: dict[str, object] = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(settings | kwargs))


def zeros(module: nn.Module, names: list[str] | None = None) -> int:
    """Zeros in the named parameters, or in all with more than one dimension."""
    return sum(
        int((p == 0).sum())
        for n, p in module.named_parameters()
        if (n in names if names is not None else p.dim() > 1)
    )


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules' states are equal bit by bit."""
    return _same(a.state_dict(), b.state_dict())


def _same(ours: object, theirs: object) -> bool:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    return ours == theirs

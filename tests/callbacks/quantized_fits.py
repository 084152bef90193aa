"""Short fits with quantizers, and what the tests look at in them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_compress import QuantizationAwareTraining
from lit_compress.compress.quantization.network import Quantization, quantized_network
from tests.callbacks.nets import Net


class DropNet(Net):
    """``Net`` with dropout, on either optimizer."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.optimizer = optimizer
        self.model[6] = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Dropout(0.3))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=3e-3)
        return super().configure_optimizers()


class Inline(pl.LightningModule):
    """Layers in the LightningModule itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = nn.functional.relu(self.norm(self.conv(x)))
        return self.head(features.mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def qat(bits: int = 8, **arguments: Any) -> QuantizationAwareTraining:
    """The callback with two calibration batches, and nothing frozen unless told."""
    defaults = {"num_calibration_batches": 2, "freeze_batch_norm": None, "freeze_ranges": None}
    return QuantizationAwareTraining(bits, **(defaults | arguments))


def quantizers(module: nn.Module) -> Quantization:
    """The quantizers of a ``Net``."""
    return quantized_network(getattr(module, "model", module))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Whether two states are equal bit by bit, modes of quantizers included."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[key]) if isinstance(value, Tensor) else value == theirs[key]
        for key, value in ours.items()
    )


def float_weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the state without the quantizers'."""
    state = module.state_dict()
    return {k: v.clone() for k, v in state.items() if "quantization." not in k}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two dictionaries hold the same tensors."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def integers(module: nn.Module, name: str) -> Tensor:
    """A weight of a quantized ``Net`` in steps of its grid; they must be whole."""
    quantizer, weight = quantizers(module).weight(name), module.model.get_parameter(name)
    rounded = quantizer(weight).detach()
    scale = quantizer.step_for(weight).detach().reshape(-1, *[1] * (weight.dim() - 1))
    steps = rounded / scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    return steps.round().int()


class Steps(pl.Callback):
    """Notes something after each step, when the callbacks before it have run."""

    def __init__(self, look: Any = None) -> None:
        self.look = look
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer, pl_module, *args):  # type: ignore[no-untyped-def]
        """Note what ``look`` says of the module."""
        if self.look is not None:
            self.seen.append(self.look(pl_module))

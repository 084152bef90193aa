"""A chain of layers that tests cut by hand, alone and in a LightningModule."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_compress.compress.structure import describe, note_change
from lit_compress.compress.structure_record import StructureChange


def chain(first: int = 8, second: int = 6, classes: int = 4) -> nn.Sequential:
    """Two convolutions and a linear layer, for images of one channel and at least 5 x 5 pixels."""
    return nn.Sequential(
        nn.Conv2d(1, first, 3, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, classes),
    )


def keep_last(network: nn.Sequential, first: int, second: int) -> None:
    """Keep that many of the last channels of both convolutions."""
    conv, norm, _, other, _, _, linear = network
    conv.weight.data = conv.weight.data[-first:].clone()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        tensor.data = tensor.data[-first:].clone()
    other.weight.data = other.weight.data[-second:, -first:].clone()
    other.bias.data = other.bias.data[-second:].clone()
    linear.weight.data = linear.weight.data[:, -second:].clone()
    conv.out_channels = norm.num_features = other.in_channels = first
    other.out_channels = linear.in_features = second
    for parameter in network.parameters():
        parameter.grad = None


def cut(model: nn.Module, first: int, second: int) -> StructureChange:
    """Cut a chain, or the module around one that has it as ``model``, and note the change."""
    before = describe(model)
    keep_last(getattr(model, "model", model), first, second)
    return note_change(model, before)


def widths(model: nn.Module) -> tuple[int, int]:
    """The channels of both convolutions, all of whose tensors and attributes must agree."""
    network = getattr(model, "model", model)
    network = getattr(network, "_orig_mod", network)
    conv, norm, _, other, _, _, linear = network
    first, second = conv.out_channels, other.out_channels
    assert (norm.num_features, other.in_channels, linear.in_features) == (first, first, second)
    assert copy.deepcopy(network).eval()(torch.zeros(2, 1, 5, 5)).shape == (2, linear.out_features)
    return first, second


class ChainModule(pl.LightningModule):
    """A chain as a LightningModule, with momentum."""

    def __init__(self, first: int = 8, second: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = chain(first, second, classes)
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

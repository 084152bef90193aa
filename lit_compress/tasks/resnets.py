"""The residual networks for CIFAR, and the plain one without shortcuts.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2: 6 n + 2
layers, widths 16, 32 and 64, shortcuts without parameters (option A). ResNet-18 is that of the
paper's table 1, with a stem for 32 pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

_WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut.

    Where the block halves the resolution, the shortcut takes every second pixel and pads the new
    channels with zeros on both sides (option A), or is a 1 x 1 convolution (option B).

    Args:
        inputs: Channels in.
        outputs: Channels out; either ``inputs`` or twice as many.
        stride: 1, or 2 to halve the resolution.
        projection: Whether a shortcut that changes the shape is a convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, projection: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        # One ReLU a use: a module used twice cannot be fused or quantized as two places.
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = outputs - inputs
        self.shortcut: nn.Module | None = None
        if projection and (stride > 1 or inputs != outputs):
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map ``(batch, inputs, h, w)`` to ``(batch, outputs, h / stride, w / stride)``."""
        shortcut = self._padded(inputs) if self.shortcut is None else self.shortcut(inputs)
        hidden = self.relu1(self.bn1(self.conv1(inputs)))
        outputs: torch.Tensor = self.relu2(self.bn2(self.conv2(hidden)) + shortcut)
        return outputs

    def _padded(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.stride > 1:
            inputs = inputs[:, :, :: self.stride, :: self.stride]
        if self.new_channels > 0:
            before = self.new_channels // 2
            inputs = F.pad(inputs, (0, 0, 0, 0, before, self.new_channels - before))
        return inputs


class CifarResNet(nn.Module):
    """Stem, stages of basic blocks (``layer1`` and so on), global average, one linear layer.

    Args:
        blocks_per_stage: The paper's n: 3 gives 20 layers, 5 gives 32, 9 gives 56.
        num_classes: Logits given, at least 1.
        widths: Channels of each stage; each the same as, or twice as many as, the one before.
        projection: Whether shortcuts that change the shape are convolutions.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """

    def __init__(
        self,
        blocks_per_stage: int,
        num_classes: int = 10,
        widths: Sequence[int] = _WIDTHS,
        projection: bool = False,
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self._stages = [f"layer{number + 1}" for number in range(len(widths))]
        before = widths[0]
        for name, width in zip(self._stages, widths, strict=True):
            self.add_module(name, _stage(before, width, blocks_per_stage, projection))
            before = width
        self.linear = nn.Linear(before, num_classes)
        _initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits ``(batch, num_classes)`` of images ``(batch, 3, height, width)``."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        for name in self._stages:
            hidden = self.get_submodule(name)(hidden)
        logits: torch.Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


class PlainNet(nn.Module):
    """The 20-layer network of the same widths without shortcuts.

    Args:
        num_classes: Logits given, at least 1.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        check_num_classes(num_classes)
        layers: list[nn.Module] = []
        channels = 3
        for width in (_WIDTHS[0],) * 7 + (_WIDTHS[1],) * 6 + (_WIDTHS[2],) * 6:
            stride = 2 if layers and width != channels else 1
            layers += [
                nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, num_classes)
        _initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits ``(batch, num_classes)`` of images ``(batch, 3, height, width)``."""
        logits: torch.Tensor = self.linear(self.features(images).mean(dim=(2, 3)))
        return logits


def resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet-20 for CIFAR: 0.27 million parameters.

    Args:
        num_classes: Logits given, at least 1.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """
    return CifarResNet(3, num_classes)


def resnet32(num_classes: int = 10) -> CifarResNet:
    """ResNet-32 for CIFAR: 0.46 million parameters.

    Args:
        num_classes: Logits given, at least 1.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """
    return CifarResNet(5, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet-56 for CIFAR: 0.85 million parameters.

    Args:
        num_classes: Logits given, at least 1.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """
    return CifarResNet(9, num_classes)


def resnet18_cifar(num_classes: int = 10) -> CifarResNet:
    """ResNet-18 for 32-pixel images: 11.2 million parameters.

    Source: He et al. 2016, table 1, with shortcuts of option B. The stem, made for 224 pixels, is
    one 3 x 3 convolution of stride 1 without pooling, as is usual on CIFAR. torchvision's own is
    ``resnet18``.

    Args:
        num_classes: Logits given, at least 1.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """
    return CifarResNet(2, num_classes, widths=(64, 128, 256, 512), projection=True)


def plain20(num_classes: int = 10) -> PlainNet:
    """Plain-20: the layers of :func:`resnet20` in one row, 0.27 million parameters.

    Args:
        num_classes: Logits given, at least 1.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """
    return PlainNet(num_classes)


def _stage(inputs: int, outputs: int, num_blocks: int, projection: bool) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, 1 if inputs == outputs else 2, projection)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(num_blocks - 1)))


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def check_num_classes(num_classes: int) -> None:
    """Refuse a number of classes below 1.

    Args:
        num_classes: Logits that a classifier gives.

    Raises:
        ValueError: If it is below 1.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes came as {num_classes}; a classifier needs at least 1.")

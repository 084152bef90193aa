"""The residual networks for CIFAR, and the plain one without shortcuts.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2: 6 n + 2
layers, widths 16, 32 and 64, shortcuts without parameters (option A).
"""

import torch
import torch.nn.functional as F
from torch import nn

_WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters.

    Where the block halves the resolution, the shortcut takes every second pixel and pads the new
    channels with zeros on both sides.

    Args:
        inputs: Channels in.
        outputs: Channels out; either ``inputs`` or twice as many.
        stride: 1, or 2 to halve the resolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
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

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map ``(batch, inputs, h, w)`` to ``(batch, outputs, h / stride, w / stride)``."""
        shortcut = inputs
        if self.stride > 1:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride]
        if self.new_channels > 0:
            before = self.new_channels // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        hidden = self.relu1(self.bn1(self.conv1(inputs)))
        outputs: torch.Tensor = self.relu2(self.bn2(self.conv2(hidden)) + shortcut)
        return outputs


class CifarResNet(nn.Module):
    """Stem, three stages of basic blocks, global average, one linear layer.

    Args:
        blocks_per_stage: The paper's n: 3 gives 20 layers, 5 gives 32, 9 gives 56.
        num_classes: Logits given, at least 1.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], blocks_per_stage)
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], blocks_per_stage)
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], blocks_per_stage)
        self.linear = nn.Linear(_WIDTHS[2], num_classes)
        _initialise(self)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits ``(batch, num_classes)`` of images ``(batch, 3, height, width)``."""
        hidden = self.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
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


def plain20(num_classes: int = 10) -> PlainNet:
    """Plain-20: the layers of :func:`resnet20` in one row, 0.27 million parameters.

    Args:
        num_classes: Logits given, at least 1.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """
    return PlainNet(num_classes)


def _stage(inputs: int, outputs: int, num_blocks: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride=1 if inputs == outputs else 2)
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

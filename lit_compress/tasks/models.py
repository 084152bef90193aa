"""Small classifiers for the example tasks, and anything in torchvision by name.

All take images of shape ``(batch, channels, height, width)`` and return logits of shape
``(batch, num_classes)``.
"""

import difflib
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn

from lit_compress.tasks.resnets import (
    check_num_classes,
    plain20,
    resnet18_cifar,
    resnet20,
    resnet32,
    resnet56,
)

# (width before the multiplier, stride at 32 pixels, stride at 224 pixels), one a block:
# Howard et al. 2017, "MobileNets", table 1. At 32 pixels the stem and the first reduction keep
# their resolution, so that the last block still sees 4 x 4.
_MOBILENET_BLOCKS = (
    (64, 1, 1),
    (128, 2, 2),
    (128, 1, 1),
    (256, 2, 2),
    (256, 1, 1),
    (512, 2, 2),
    *((512, 1, 1),) * 5,
    (1024, 1, 2),
    (1024, 1, 1),
)
_VGG16_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class ConvClassifier(nn.Module):
    """A stack of layers, global average pooling and one linear layer.

    Args:
        features: Maps ``(batch, 3, height, width)`` to ``(batch, width, h, w)``.
        width: Channels that ``features`` gives.
        num_classes: Logits given.
    """

    def __init__(self, features: nn.Sequential, width: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits ``(batch, num_classes)`` of images ``(batch, 3, height, width)``."""
        logits: torch.Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


def mobilenet_v1(num_classes: int = 10, width: float = 1.0, input_size: int = 32) -> ConvClassifier:
    """MobileNet-v1: depthwise and pointwise convolutions in turn.

    Source: Howard et al. 2017, "MobileNets", table 1. At 32 pixels the stem has stride 1 and the
    blocks reduce three times, to 4 x 4.

    Args:
        num_classes: Logits given, at least 1.
        width: Multiplier of every width, above 0; 1.0 is the paper's model.
        input_size: Height and width of the images in pixels, 32 or 224: chooses the strides.

    Raises:
        ValueError: If an argument is out of its range.
    """
    check_num_classes(num_classes)
    if width <= 0:
        raise ValueError(f"width came as {width}; give a multiplier above 0, such as 0.5.")
    if input_size not in (32, 224):
        raise ValueError(f"input_size came as {input_size}; the layouts are for 32 and 224 pixels.")
    small = input_size == 32
    channels = max(1, round(32 * width))
    layers = _conv_bn_relu(3, channels, kernel=3, stride=1 if small else 2)
    for base, small_stride, large_stride in _MOBILENET_BLOCKS:
        wider = max(1, round(base * width))
        stride = small_stride if small else large_stride
        layers += _conv_bn_relu(channels, channels, kernel=3, stride=stride, groups=channels)
        layers += _conv_bn_relu(channels, wider, kernel=1)
        channels = wider
    return ConvClassifier(nn.Sequential(*layers), channels, num_classes)


def vgg16(num_classes: int = 10) -> ConvClassifier:
    """VGG-16 for 32-pixel images: thirteen 3 x 3 convolutions and one linear layer.

    Source: Simonyan and Zisserman 2015, configuration D. The three linear layers of the paper,
    made for 7 x 7 maps, become one from 512 channels to the classes, as is usual on CIFAR.

    Args:
        num_classes: Logits given, at least 1.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """
    return _vgg16(num_classes, batch_norm=False)


def vgg16_bn(num_classes: int = 10) -> ConvClassifier:
    """As :func:`vgg16`, with batch normalisation after every convolution.

    Args:
        num_classes: Logits given, at least 1.

    Raises:
        ValueError: If ``num_classes`` is below 1.
    """
    return _vgg16(num_classes, batch_norm=True)


def digits_cnn(num_classes: int = 10, width: int = 32) -> nn.Sequential:
    """Three convolutions and one linear layer for grey 8 x 8 images.

    Args:
        num_classes: Logits given, at least 1.
        width: Channels of the first convolution, at least 1; the others have twice and four times
            as many. 32 gives 94 thousand parameters.

    Raises:
        ValueError: If an argument is below 1.
    """
    check_num_classes(num_classes)
    if width < 1:
        raise ValueError(f"width came as {width}; give the first convolution at least 1 channel.")
    return nn.Sequential(
        *_conv_bn_relu(1, width, kernel=3),
        *_conv_bn_relu(width, 2 * width, kernel=3, stride=2),
        *_conv_bn_relu(2 * width, 4 * width, kernel=3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


def build_model(name: str, num_classes: int = 10, **kwargs: Any) -> nn.Module:
    """Build a classifier by name: one of ours, else one of torchvision's.

    Args:
        name: A function of this module, or a name that ``torchvision.models.get_model`` knows.
        num_classes: Logits given, at least 1.
        **kwargs: Further arguments of the model's function.

    Returns:
        The model with random weights, in training mode.

    Raises:
        ValueError: If the name is unknown (the nearest known names are given), or if the model's
            function refuses an argument.

    Examples:
        >>> build_model("resnet20", num_classes=100).linear.out_features
        100
    """
    check_num_classes(num_classes)
    build = MODELS.get(name)
    if build is None:
        known = [*MODELS, *torchvision.models.list_models(torchvision.models)]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            fix = f"did you mean {', '.join(near)}?" if near else f"ours are {', '.join(MODELS)}."
            raise ValueError(
                f"model came as {name!r}, which no model here or in torchvision has: {fix}"
            )
        build = torchvision.models.get_model_builder(name)
    try:
        return build(num_classes=num_classes, **kwargs)
    except TypeError as error:
        raise ValueError(f"model {name!r} was given {kwargs}, and refuses it: {error}.") from error


def _conv_bn_relu(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution that keeps the resolution (but for its stride), its norm and a ReLU."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]


def _vgg16(num_classes: int, batch_norm: bool) -> ConvClassifier:
    check_num_classes(num_classes)
    layers: list[nn.Module] = []
    channels = 3
    for width in _VGG16_WIDTHS:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        if batch_norm:
            layers += _conv_bn_relu(channels, width, kernel=3)
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
    for layer in layers:
        if isinstance(layer, nn.Conv2d):  # torch's own initialisation does not train without a norm
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return ConvClassifier(nn.Sequential(*layers), channels, num_classes)


MODELS: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build
    for build in (
        digits_cnn,
        mobilenet_v1,
        plain20,
        resnet18_cifar,
        resnet20,
        resnet32,
        resnet56,
        vgg16,
        vgg16_bn,
    )
}
"""Our models by name."""

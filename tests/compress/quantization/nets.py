"""Small networks of all shapes that quantization has to deal with, with settled batch norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

EPS = 1e-3

IMAGES = (3, 8, 8)


def conv_bn(inputs: int, outputs: int, **options: Any) -> list[nn.Module]:
    options = {"padding": 1, "bias": False} | options
    return [nn.Conv2d(inputs, outputs, 3, **options), nn.BatchNorm2d(outputs, eps=EPS)]


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]


def plain() -> nn.Module:
    """With biases before batch norms, ReLU and ReLU6, and dropout."""
    return nn.Sequential(
        *conv_bn(3, 8, bias=True), nn.ReLU(inplace=True), nn.Dropout(0.3),
        *conv_bn(8, 8), nn.ReLU6(), nn.MaxPool2d(2), *head(8),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 8), nn.ReLU(), *conv_bn(8, 8, groups=8), nn.ReLU(),
        *conv_bn(8, 8, groups=2), nn.Hardswish(), *head(8),
    )  # fmt: skip


def transposed(groups: int) -> nn.Module:
    return nn.Sequential(
        *conv_bn(3, 4, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=groups), nn.ReLU(),
        nn.ConvTranspose2d(6, 6, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(6),
        nn.ReLU(), nn.Conv2d(6, 3, 1),
    )  # fmt: skip


def one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6, eps=EPS), nn.ReLU(), nn.MaxPool1d(2),
        nn.ConvTranspose1d(6, 4, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5),
        nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4),
    )  # fmt: skip


def three_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, bias=False), nn.BatchNorm3d(4, eps=EPS), nn.ReLU(),
        nn.ConvTranspose3d(4, 3, 2, stride=2), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip


class Shared(nn.Module):
    """A layer and an activation called twice, the second time with another batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(6, eps=EPS), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.bn1(self.conv(x)))
        x = self.relu(self.bn2(self.conv(x)))
        return self.fc(x.mean((2, 3)))


class Functional(nn.Module):
    """Layers without modules."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) * 0.2)
        self.shift = nn.Parameter(torch.randn(6) * 0.1)
        self.up = nn.Parameter(torch.randn(6, 2, 2, 2) * 0.3)
        self.inner = nn.Linear(64, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(weight=self.kernel, input=x, bias=self.shift, padding=1).relu()
        x = F.conv_transpose2d(x, self.up, stride=2, groups=2).relu_()
        x = F.avg_pool2d(x, 4).flatten(1)
        return F.linear(x, self.inner.weight)


class Residual(nn.Module):
    """Sums in place and not, a strided shortcut padded with zeros, a list of parts joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 4), nn.ReLU())
        self.conv1, self.bn1 = conv_bn(4, 4)
        self.conv2, self.bn2 = conv_bn(4, 8, stride=2)
        self.conv3 = nn.Conv2d(8, 4, 1)
        self.conv4 = nn.Conv2d(12, 4, 3, padding=1, padding_mode="circular")
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.bn1(self.conv1(x))
        out += x
        x = self.relu(out)
        out = self.bn2(self.conv2(x))
        x = self.relu(out + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        x = self.conv4(torch.cat([self.conv3(x), x], 1)).relu()
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 8), nn.SiLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Sequential(*conv_bn(8, 4))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(self.pool(x)))))
        x = self.project(gate * x)
        return self.fc(self.pool(x).flatten(1))


class Nested(nn.Module):
    """Nested inputs by keyword, nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.fuse = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 4)

    def forward(
        self, images: dict[str, Tensor], *, more: tuple[Tensor, Tensor], scale: float = 1.0
    ) -> dict[str, Any]:
        x = torch.relu(self.left(images["main"]) + self.right(more[0]))
        fused = torch.relu(self.fuse(x))
        logits = self.fc(fused.mean((2, 3))) * scale
        return {"logits": logits, "rest": (fused, [more[1] + 1])}


class LinearChannels(nn.Module):
    """A batch norm over another dimension than the linear layer's outputs, of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 6)
        self.bn = nn.BatchNorm1d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.stem(x))))


class SamePadding(nn.Conv2d):
    """Asks for the shape of its weight in forward."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.weight.shape[-2:]
        x = F.pad(x, (width // 2, width // 2, height // 2, height // 2))
        return F.conv2d(x, self.weight, self.bias)


def shape_asking() -> nn.Module:
    return nn.Sequential(SamePadding(3, 6, 3), nn.ReLU(), SamePadding(6, 4, 1), nn.ReLU(), *head(4))


class Tied(nn.Module):
    """An embedding whose weight is that of the last layer as well."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(self.embed(tokens))))


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _images(batch: int = 4) -> Inputs:
    return (torch.randn(batch, *IMAGES),), {}


def _nested() -> Inputs:
    more = (torch.randn(4, 2, 8, 8), torch.randn(4, 3))
    return ({"main": torch.randn(4, *IMAGES)},), {"more": more, "scale": 0.5}


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "plain": (plain, _images),
    "grouped": (grouped, _images),
    "transposed": (lambda: transposed(1), _images),
    "transposed groups": (lambda: transposed(2), _images),
    "1-d": (one_dimensional, lambda: ((torch.randn(6, 3, 8),), {})),
    "3-d": (three_dimensional, lambda: ((torch.randn(3, 2, 4, 2, 4),), {})),
    "shared": (Shared, _images),
    "functional": (Functional, _images),
    "residual": (Residual, _images),
    "squeeze-excite": (SqueezeExcite, _images),
    "nested": (Nested, _nested),
    "linear channels": (LinearChannels, lambda: ((torch.randn(5, 6, 8),), {})),
    "shape asking": (shape_asking, _images),
    "tied": (Tied, lambda: ((torch.randint(0, 11, (4, 5)),), {})),
}


def made(name: str, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """One of :data:`NETS` in evaluation mode with settled batch norms, and inputs for it."""
    torch.manual_seed(seed)
    build, inputs_of = NETS[name]
    net, inputs = build(), inputs_of()
    return settled(net, *inputs), inputs


def settled(net: nn.Module, *inputs: Any) -> nn.Module:
    """Batch norms get small variances, factors of both signs, of zero and next to it."""
    args, kwargs = inputs
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and norms:
                module.weight.mul_(0.1)
        for norm in norms:
            norm.momentum = 1.0
        net.train()(*args, **kwargs)
        for norm in norms:
            norm.momentum = 0.1
            assert norm.weight is not None and norm.bias is not None  # noqa: PT018
            norm.weight.copy_(torch.empty_like(norm.weight).uniform_(0.5, 1.5))
            norm.weight[1::3] *= -1
            norm.weight[2], norm.weight[3] = 0.0, 1e-39
            norm.bias.uniform_(-0.3, 0.5)
    return net.eval()


def small_variances() -> tuple[nn.Module, Tensor]:
    """The network of the promise about eps: 1e-3, beside variances of 1e-4 to 1e-2."""
    torch.manual_seed(3)
    net = plain()
    for norm in (net[1], net[5]):
        nn.init.uniform_(norm.running_mean, -0.05, 0.05)
        norm.running_var.copy_(torch.logspace(-4, -2, len(norm.running_var)))
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.weight.data[::2] *= -1
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        assert norm.eps == EPS
    with torch.no_grad():
        net[0].weight.mul_(0.1)
        net[4].weight.mul_(0.1)
    return net.eval(), torch.randn(16, *IMAGES)


def call(net: nn.Module, inputs: Inputs) -> Any:
    return net(*inputs[0], **inputs[1])


def first_tensor(value: Any) -> Tensor:
    """Where the answer of one of :data:`NETS` is."""
    return value["logits"] if isinstance(value, dict) else value

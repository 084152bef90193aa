"""The networks and images of the runtime benchmarks: random weights that behave like trained ones.

Nothing is downloaded. Left as they are, random weights make a poor subject: with made-up batch norm
statistics the logits hardly depend on the image, and any file looks right; with those of images,
but shifts of zero, the rounding of one layer grows in each that follows, and the order of additions
decides what a file gives. So the statistics are measured on images, factors are spread from .5 to
1.5, shifts are near 2, and the head tells ten kinds of images apart, by the mean features of each.
Everything is seeded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lit_compress.tasks import build_model

KINDS = 10
NOTE = (
    "random weights, seeded: batch norm statistics measured on images, factors in [.5, 1.5], "
    "shifts around 2, a head that tells ten kinds of synthetic images apart"
)


@dataclass(frozen=True)
class Network:
    """A network and the images that it takes.

    Attributes:
        name: As torchvision or ``lit_compress.tasks`` calls it.
        pixels: Height and width of its images.
        build: Makes it.
    """

    name: str
    pixels: int
    build: Callable[[], nn.Module]


def from_torchvision(name: str, pixels: int = 224) -> Network:
    """A network of torchvision."""

    def build() -> nn.Module:
        network: nn.Module = torchvision.models.get_model(name, weights=None)
        return network

    return Network(name, pixels, build)


def from_tasks(name: str) -> Network:
    """A network of this library's example tasks."""
    return Network(name, 32, lambda: build_model(name))


NETWORKS = {
    network.name: network
    for network in (
        *map(
            from_torchvision, ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0")
        ),
        *map(from_tasks, ("mobilenet_v1", "resnet20")),
    )
}


def images(count: int, pixels: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images with structure at all scales, of ten kinds in turn.

    Returns:
        ``[count, 3, pixels, pixels]``, each with a contrast of its own, and the kinds.
    """
    kinds = torch.arange(count) % KINDS
    shared = _clouds(KINDS, pixels, seed=0)
    own = _clouds(count, pixels, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    contrast = 0.7 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
    return (shared[kinds] + 0.5 * own) * contrast, kinds


def _clouds(count: int, pixels: int, seed: int) -> Tensor:
    """Noise of all wavelengths, the longer the stronger, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    total, cells = torch.zeros(count, 3, pixels, pixels), 2
    while cells <= pixels:
        noise = torch.randn(count, 3, cells, cells, generator=generator) / cells**0.7
        total += F.interpolate(noise, size=pixels, mode="bilinear")
        cells *= 2
    total -= total.mean((2, 3), keepdim=True)
    tint = 0.5 * torch.randn(count, 3, 1, 1, generator=generator)
    return total / total.std((2, 3), keepdim=True) + tint


def batches(network: Network, count: int, seed: int, size: int = 10) -> list[Tensor]:
    """Batches of images, of all kinds."""
    return [images(size, network.pixels, seed + index)[0] for index in range(count)]


@torch.no_grad()
def build(network: Network, seed: int = 0) -> nn.Module:
    """The network in evaluation mode; see above for its weights."""
    torch.manual_seed(seed)
    model = network.build().eval()
    seen = batches(network, 3, seed)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(2.0, 0.5)
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
        norm.train()
    for batch in seen:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    _tell_kinds_apart(model, seen)
    return model


def _tell_kinds_apart(model: nn.Module, seen: list[Tensor]) -> None:
    """Set the last linear layer to the nearest mean of features; other classes get small rows."""
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    features: list[Tensor] = []
    with head.register_forward_pre_hook(lambda _, args: features.append(args[0])):
        for batch in seen:
            model(batch)
    means = torch.stack(features).mean(0)  # [KINDS, features]: a batch holds each kind once
    center = means.mean(0)
    rows = means - center
    length = rows.norm(dim=1).mean()
    head.weight.normal_(0, 0.3 * float(length) / rows.shape[1] ** 0.5)
    head.weight[:KINDS] = rows
    head.weight.mul_(10 / length**2)
    head.bias.copy_(-head.weight @ center)

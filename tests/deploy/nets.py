"""Small networks, plain and quantized."""

import torch
from torch import nn
from torch.nn import functional as F

from lit_compress.compress.quantization.network import calibrate, prepare
from lit_compress.compress.quantization.scheme import QuantizationScheme


class SmallNet(nn.Module):
    """A residual block with batch norms, an average, a linear layer: what runtimes fuse."""

    def __init__(self, classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, eps=1e-3)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, classes)

    def forward(self, image):
        x = F.relu(self.norm(self.conv1(image)))
        x = F.relu(self.conv3(F.relu6(self.conv2(x))) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def small_net(**kwargs):
    torch.manual_seed(0)
    net = SmallNet(**kwargs)
    with torch.no_grad():
        net.norm.running_mean.normal_(0, 0.1)
        net.norm.running_var.uniform_(0.5, 1.5)
    return net.eval()


def images(count=4, seed=1):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def quantized_net():
    net = small_net()
    prepare(net, QuantizationScheme(), lambda network: network(images()))
    calibrate(net, lambda network, batch: network(batch), [images(8, 2), images(8, 3)])
    return net


class GatedNet(nn.Module):
    """A squeeze-and-excite block between convolutions: SiLU and sigmoid, or the hard ones."""

    def __init__(self, soft=True):
        super().__init__()
        self.act = nn.SiLU() if soft else nn.Hardswish()
        self.gate = nn.Sigmoid() if soft else nn.Hardsigmoid()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, image):
        x = self.act(self.stem(image))
        squeezed = self.act(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = self.act(self.project(self.gate(self.excite(squeezed)) * x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def gated_net(soft=True):
    torch.manual_seed(0)
    net = GatedNet(soft).eval()
    with torch.no_grad():
        net.stem[1].bias.normal_()
    prepare(net, QuantizationScheme(), lambda network: network(images()))
    calibrate(net, lambda network, batch: network(batch), [images(8, 2), images(8, 3)])
    return net


def deep_gated_net(soft=True, depth=4):
    """Gates in a row, with ranges like those of trained networks, and a batch."""
    torch.manual_seed(0)
    gates = nn.SiLU if soft else nn.Hardswish
    layers, width = [], 3
    for _ in range(depth):
        layers += [nn.Conv2d(width, 16, 3, padding=1), nn.BatchNorm2d(16), gates()]
        width = 16
    net, x = nn.Sequential(*layers, nn.Conv2d(16, 4, 1)), images(4)
    net.train()(x)
    return quantized(net, x), x


class Nested(nn.Module):
    """Two inputs, one by keyword, and a dictionary of outputs."""

    def forward(self, image, scales=None, flip=False):
        x = image * scales["gain"][:, None, None, None] + scales["shift"][:, None, None, None]
        x = x.flip(-1) if flip else x
        return {"mean": x.mean((2, 3)), "all": [x, x.sum()]}


class SmallUNet(nn.Module):
    """A shortcut beside a way down and up, and a convolution at the end; in 1-d or 2-d."""

    def __init__(self, dims=2):
        super().__init__()
        conv, up = (nn.Conv1d, nn.ConvTranspose1d) if dims == 1 else (nn.Conv2d, nn.ConvTranspose2d)
        self.first = conv(3, 16, 3, padding=1)
        self.down = conv(16, 32, 3, stride=2, padding=1)
        self.up = up(32, 16, 2, stride=2)
        self.merge = conv(32, 16, 3, padding=1)
        self.last = conv(16, 4, 1)

    def forward(self, x):
        first = F.relu(self.first(x))
        up = F.relu(self.up(F.relu(self.down(first))))
        return self.last(F.relu(self.merge(torch.cat([first, up], 1))))


class TwoEnds(nn.Module):
    """A result that is given out and goes on; depthwise and transposed convolutions at the end."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.up = nn.ConvTranspose2d(16, 4, 3, stride=2)

    def forward(self, x):
        first = self.first(x)
        return first, self.depthwise(first), self.up(first)


def quantized(net, x, **scheme):
    """A network with integers of 7 bits, which do not saturate on any processor."""
    net = net.eval()
    prepare(net, QuantizationScheme(**{"weight_bits": 7, **scheme}), lambda network: network(x))
    calibrate(net, lambda network, batch: network(batch), [x])
    return net


def ends_in_convolutions():
    """Quantized networks whose last layers are convolutions, and a batch of each."""
    torch.manual_seed(0)
    maps, sequences = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16)
    return {
        "maps": (quantized(SmallUNet(), maps), maps),
        "sequences": (quantized(SmallUNet(1), sequences), sequences),
        "two ends": (quantized(TwoEnds(), maps), maps),
    }

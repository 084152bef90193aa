"""What the numbers of a benchmark were measured on, and how long a run will take there."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import distributions
from statistics import median
from typing import Any

import torch
from torch import nn

from lit_compress.measure.processor import processor
from lit_compress.tasks import build_model

PACKAGES = (
    "torch", "torchvision", "lightning", "torch-pruning", "onnx", "onnxruntime", "openvino", "nncf",
    "executorch", "litert-torch", "ai-edge-litert",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, its flags, cores, load, and versions; every JSON of a benchmark holds it."""
    name, features = processor()
    versions = {package.metadata["Name"]: package.version for package in distributions()}
    return {
        "processor": name,
        **features,
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: versions[name] for name in PACKAGES if name in versions},
    }


# --- How long it takes ----------------------------------------------------------------------------


def training_step() -> Callable[[], object]:
    """One unit of work: ResNet-20, forward and backward, on 32 images."""
    torch.manual_seed(0)
    network, images = build_model("resnet20", 10), torch.randn(32, 3, 32, 32)
    labels = torch.arange(32) % 10
    return lambda: torch.autograd.backward(nn.functional.cross_entropy(network(images), labels))


def say_duration(units: float, unit: Callable[[], object] | None = None) -> float:
    """Print how long a run will take on this machine, as far as it is idle; return the seconds.

    Args:
        units: How many units of work the run is, as measured once.
        unit: One unit of work; by default a :func:`training_step`. It is called four times.
    """
    seconds = units * seconds_of(unit or training_step())
    print(f"about {rounded(seconds)} s on this machine", flush=True)
    return seconds


def seconds_of(call: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds of a call, after one that does not count."""
    times = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return median(times[1:])


def rounded(seconds: float) -> int:
    """To one significant digit, or to tens from 100 on: it is an estimate."""
    step = 1 if seconds < 10 else 10
    return max(step * round(seconds / step), 1)

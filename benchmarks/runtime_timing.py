"""Calls timed in turns in one process, by the processor's clock and by the one on the wall.

Processor time is that of all threads of the process. On an idle machine it is what a clock on the
wall shows for one thread; on a busy one it still is, where the wall shows the other processes too.
"""

from __future__ import annotations

import platform
import random
import time
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from statistics import median, quantiles
from typing import Any

PACKAGES = (
    "torch", "torchvision", "onnx", "onnxruntime", "openvino", "nncf", "executorch", "litert-torch",
    "ai-edge-litert",
)  # fmt: skip


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Time each call once a round, in an order that is drawn anew.

    What ran before leaves its data in the caches, so no call is to follow the same one each time.

    Returns:
        By name, in milliseconds: median and quartiles of processor time, and median of wall time.
    """
    processor: dict[str, list[float]] = {name: [] for name in calls}
    wall: dict[str, list[float]] = {name: [] for name in calls}
    drawn = random.Random(0)
    for turn in range(warmup + rounds):
        for name in drawn.sample(list(calls), len(calls)):
            began, used = time.perf_counter(), time.process_time()
            calls[name]()
            used, taken = time.process_time() - used, time.perf_counter() - began
            if turn >= warmup:
                processor[name].append(1e3 * used)
                wall[name].append(1e3 * taken)
    return {name: _summary(processor[name], wall[name]) for name in calls}


def _summary(processor: list[float], wall: list[float]) -> dict[str, float]:
    p25, _, p75 = quantiles(processor, n=4, method="inclusive")
    return {
        "median_ms": round(median(processor), 4),
        "p25_ms": round(p25, 4),
        "p75_ms": round(p75, 4),
        "wall_median_ms": round(median(wall), 4),
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    facts: dict[str, Any] = {"processor": platform.machine(), "python": platform.python_version()}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        pairs = (line.partition(":") for line in cpuinfo.read_text().splitlines() if ":" in line)
        lines = {name.strip(): value.strip() for name, _, value in pairs}
        facts["processor"] = lines.get("model name", facts["processor"])
        flags = lines.get("flags", "").split()
        facts["vnni"] = any(flag in flags for flag in ("avx512_vnni", "avx_vnni"))
    installed = {package.metadata["Name"]: package.version for package in distributions()}
    return facts | {name: installed[name] for name in PACKAGES if name in installed}

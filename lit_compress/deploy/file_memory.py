"""Measure the peak memory of an exported file when this process loads and runs it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Mapping
from pathlib import Path

from lit_compress.deploy.route import Tensors
from lit_compress.deploy.runtimes import load_file

__all__ = ["peak_memory_by_batch"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory_by_batch(
    path: Path, batches: Mapping[int, Tensors], num_threads: int = 1
) -> dict[int, int]:
    """How far the resident memory of this process rises when it loads a file and runs it.

    The runtime has loaded a first copy of the file before, so that its own code is not counted;
    weights, activations and workspaces are. Nothing else should run in the process meanwhile.

    Args:
        path: An exported file.
        batches: Inputs by batch size; run in rising order.
        num_threads: Threads within an operator.

    Returns:
        Bytes by batch size; empty where the system does not tell (all but Linux).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or takes other inputs.
    """
    load_file(path, num_threads).close()
    if not _CLEAR.exists():
        return {}
    _give_back_freed_memory()
    before, peaks = _resident("VmRSS"), {}
    _CLEAR.write_text("5")  # sets the high-water mark to what is resident now
    with load_file(path, num_threads) as loaded:
        for size, batch in sorted(batches.items()):
            for _ in range(2):
                loaded(batch)
            peaks[size] = max(0, _resident("VmHWM") - before)
    return peaks


def _give_back_freed_memory() -> None:
    """What the first copy took is not to be there for the second one to take."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}.")

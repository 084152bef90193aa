"""A cache of measured times on disk, by device."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from lit_compress.files import write_text

__all__ = ["LatencyCache", "device_name"]

_FORMAT = "lit-compress latency 1"


class LatencyCache:
    """Times of calls in milliseconds, by a text that says all they depend on.

    A JSON file keeps those of several devices side by side. It is replaced in one step, and what
    another process wrote to it meanwhile stays.

    Args:
        path: The file; made where there is none. Without it times are kept in memory only.
        device: Whose times are asked for and noted.

    Raises:
        ValueError: If the file is no such cache; it is left as it is.
    """

    def __init__(self, path: Path | None, device: str) -> None:
        self.path = path
        self.device = device
        self._times = self._read().get(device, {})
        self._is_saved = True

    def get(self, key: str) -> float | None:
        """The time of a call, if it is known."""
        return self._times.get(key)

    def note(self, key: str, ms: float) -> None:
        """Remember the time of a call."""
        self._times[key] = ms
        self._is_saved = False

    def save(self) -> None:
        """Write what was noted since the last time, if anything was, and there is a file."""
        if self.path is None or self._is_saved:
            return
        devices = self._read()
        devices[self.device] = {**devices.get(self.device, {}), **self._times}
        text = json.dumps({"format": _FORMAT, "ms": devices}, indent=1)
        write_text(self.path, text)
        self._is_saved = True

    def _read(self) -> dict[str, dict[str, float]]:
        if self.path is None or not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:  # no JSON, or no text at all
            raise self._damaged(str(error)) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise self._damaged(f"expected an object with the format {_FORMAT!r}")
        devices = content.get("ms")
        if not isinstance(devices, dict):
            raise self._damaged('expected the times of each device under "ms"')
        for device, times in devices.items():
            if not isinstance(times, dict):
                raise self._damaged(f"expected times by layer for {device!r}")
            for key, ms in times.items():
                if isinstance(ms, bool) or not isinstance(ms, (int, float)) or not 0 <= ms < 1e12:
                    raise self._damaged(f"the time of {key!r} is {ms!r}, expected milliseconds")
        return devices

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(
            f"{self.path} cannot be read as a cache of latencies: {reason}. Mend or move the file, "
            "or name another one, and the layers are timed again."
        )


def device_name(device: torch.device) -> str:
    """What times depend on beside the layer: the processor, its threads, and torch.

    Args:
        device: Where the network is.

    Returns:
        As in ``"Intel(R) Xeon(R) Processor, 2 threads, torch 2.13.0"``.
    """
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    name = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{name if device.type == 'cpu' else device.type}, torch {torch.__version__}"


def _processor() -> str:
    """The processor's model, as exactly as the system says."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()

"""The name of this processor, and the integer instructions that it has."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

__all__ = ["FEATURES", "describe_processor", "processor"]

_CPUINFO = Path("/proc/cpuinfo")

FEATURES: Mapping[str, tuple[str, ...]] = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "amx": ("amx_int8", "amx_bf16"),
    "asimddp": ("asimddp",),
    "i8mm": ("i8mm",),
}
"""What decides how int8 and bfloat16 are computed: by name, the flags of which one is enough."""


def processor(cpuinfo: str | None = None) -> tuple[str, dict[str, bool | None]]:
    """Model name and features.

    Args:
        cpuinfo: What Linux's ``/proc/cpuinfo`` says; by default that of this machine.

    Returns:
        The name, and for each of :data:`FEATURES` whether it is there; ``None`` where the system
        does not tell (all but Linux).
    """
    if cpuinfo is None:
        cpuinfo = _CPUINFO.read_text() if _CPUINFO.exists() else ""
    pairs = (line.partition(":") for line in cpuinfo.splitlines() if ":" in line)
    lines = {name.strip(): value.strip() for name, _, value in pairs}
    flags = lines.get("flags", lines.get("Features"))
    present = None if flags is None else set(flags.split())
    features = {
        name: None if present is None else not present.isdisjoint(any_of)
        for name, any_of in FEATURES.items()
    }
    return lines.get("model name") or platform.processor() or platform.machine(), features


def describe_processor(cpuinfo: str | None = None) -> str:
    """Name and features in words, as in ``"AMD EPYC (avx2)"``.

    Args:
        cpuinfo: As in :func:`processor`.
    """
    name, features = processor(cpuinfo)
    present = ", ".join(feature for feature, found in features.items() if found)
    if None in features.values():
        present = "features unknown"
    return f"{name} ({present})" if present else name

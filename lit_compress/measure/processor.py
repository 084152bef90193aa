"""What processor this is, and which integer instructions it has."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

__all__ = ["processor", "processor_features"]

_CPUINFO = Path("/proc/cpuinfo")
# By the names that Linux gives them: what decides how int8 and bfloat16 are computed.
_FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "amx": ("amx_int8",),
    "dot products": ("asimddp",),
    "i8mm": ("i8mm",),
}


@cache
def processor() -> str:
    """Name and integer features, as in ``"AMD EPYC (avx2)"``."""
    present = [name for name, found in processor_features().items() if found]
    features = ", ".join(present) or "features unknown"
    return f"{_field('model name') or platform.processor() or platform.machine()} ({features})"


@cache
def processor_features() -> dict[str, bool]:
    """Whether this processor has AVX2, AVX-512, VNNI, AMX, and ARM's dot products and i8mm.

    All false where the system does not tell (all but Linux).
    """
    flags = set((_field("flags") or _field("Features") or "").split())
    return {name: not flags.isdisjoint(flag) for name, flag in _FEATURES.items()}


def _field(name: str) -> str | None:
    if not _CPUINFO.exists():
        return None
    for line in _CPUINFO.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return None

"""Calls timed in turns in one process, by the processor's clock and by the one on the wall.

Processor time is that of all threads of the process. On an idle machine it is what a clock on the
wall shows for one thread; on a busy one it still is, where the wall shows the other processes too.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles


@dataclass
class Times:
    """Milliseconds of one call, round by round, on two clocks."""

    processor: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Median and quartiles of processor time, and median of wall time."""
        p25, _, p75 = quantiles(self.processor, n=4, method="inclusive")
        return {
            "median_ms": round(median(self.processor), 4),
            "p25_ms": round(p25, 4),
            "p75_ms": round(p75, 4),
            "wall_median_ms": round(median(self.wall), 4),
        }


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, Times]:
    """Time each call once a round, in a new random order.

    What ran before leaves its data in the caches, so no call is to follow the same one each time.

    Returns:
        By name, ``rounds`` times on each clock.
    """
    times = {name: Times() for name in calls}
    drawn = random.Random(0)
    for turn in range(warmup + rounds):
        for name in drawn.sample(list(calls), len(calls)):
            began, used = time.perf_counter(), time.process_time()
            calls[name]()
            used, taken = time.process_time() - used, time.perf_counter() - began
            if turn >= warmup:
                times[name].processor.append(1e3 * used)
                times[name].wall.append(1e3 * taken)
    return times

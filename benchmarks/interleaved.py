"""Time several Trainer runs side by side: one step of each in turn, in one process.

The machine's speed drifts by more than what a callback costs. Runs that alternate step by step
drift together, so that the ratio of their medians can be trusted to a fraction of a percent. Time
is processor time of the thread that trains (torch on one thread trains in it, backward included):
what other processes take on a busy machine is not in it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader


@dataclass
class Turnstile:
    """Lets one of several threads pass at a time, in a fixed order."""

    names: Sequence[str]
    _turn: int = 0
    _gone: set[str] = field(default_factory=set)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def wait_for(self, name: str) -> None:
        """Block until it is this one's turn."""
        with self._changed:
            self._changed.wait_for(lambda: self.names[self._turn] == name)

    def pass_on(self, *, leave: str | None = None) -> None:
        """Hand the turn to the next that is still running."""
        with self._changed:
            if leave is not None:
                self._gone.add(leave)
            for _ in self.names:
                self._turn = (self._turn + 1) % len(self.names)
                if self.names[self._turn] not in self._gone:
                    break
            self._changed.notify_all()


class _StepStart(pl.Callback):
    def __init__(self, turnstile: Turnstile, name: str) -> None:
        self.turnstile, self.name, self.began = turnstile, name, 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self.turnstile.wait_for(self.name)
        self.began = time.thread_time()


class _StepEnd(pl.Callback):
    def __init__(self, start: _StepStart) -> None:
        self.start, self.seconds = start, list[float]()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.thread_time() - self.start.began)
        self.start.turnstile.pass_on()


def time_steps(
    runs: Mapping[str, tuple[Callable[[], pl.LightningModule], Sequence[pl.Callback]]],
    batches: DataLoader[Any],
    *,
    num_steps: int,
    num_warmup_steps: int,
    calls: Mapping[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Processor seconds of each training step of each run, the runs taking turns step by step.

    Args:
        runs: For each name, how to make the module, and the callbacks under test.
        batches: The data, the same for all runs.
        num_steps: Steps that count, all in the second epoch of a run.
        num_warmup_steps: Steps of the first epoch, which do not count.
        calls: Plain functions to time in the same turns, once a round.

    Returns:
        For each run or call, ``num_steps`` durations.
    """
    calls = calls or {}
    turnstile = Turnstile([*runs, *calls])
    seconds: dict[str, list[float]] = {}
    failures: list[BaseException] = []

    def fit(name: str) -> None:
        make_module, callbacks = runs[name]
        start = _StepStart(turnstile, name)
        end = _StepEnd(start)
        try:
            trainer = pl.Trainer(
                max_steps=num_warmup_steps + num_steps,
                limit_train_batches=num_warmup_steps,
                callbacks=[start, *callbacks, end],
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(make_module(), batches)
            seconds[name] = end.seconds[num_warmup_steps:]
        except BaseException as error:
            failures.append(error)
        finally:
            turnstile.wait_for(name)
            turnstile.pass_on(leave=name)

    def call(name: str) -> None:
        taken = []
        for _ in range(num_warmup_steps + num_steps):
            turnstile.wait_for(name)
            began = time.thread_time()
            calls[name]()
            taken.append(time.thread_time() - began)
            turnstile.pass_on()
        seconds[name] = taken[num_warmup_steps:]
        turnstile.wait_for(name)
        turnstile.pass_on(leave=name)

    threads = [threading.Thread(target=fit, args=(name,)) for name in runs]
    threads += [threading.Thread(target=call, args=(name,)) for name in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return seconds

"""Share values and work among the processes of a run: agree, sum, or run in the first one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import lightning.pytorch as pl
import torch
from torch import Tensor

__all__ = ["agreed", "agreed_interrupts", "in_first_process", "summed"]

_T = TypeVar("_T")


def agreed(trainer: pl.Trainer, value: _T) -> _T:
    """The first process's value, in all of them."""
    if trainer.world_size == 1:
        return value
    first: _T = trainer.strategy.broadcast(value, src=0)
    return first


def in_first_process(trainer: pl.Trainer, work: Callable[[], _T]) -> _T:
    """Let the first process do something while the others wait, and all have what came of it.

    Args:
        trainer: The Trainer.
        work: What it gives can be pickled.

    Raises:
        Exception: What ``work`` raised, in all processes.
    """
    if trainer.world_size == 1:
        return work()
    outcome: tuple[_T | None, Exception | None] = (None, None)
    if trainer.is_global_zero:
        try:
            outcome = (work(), None)
        except Exception as error:  # raised below, in all processes
            outcome = (None, error)
    result, failure = agreed(trainer, outcome)
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def summed(trainer: pl.Trainer, values: Tensor) -> Tensor:
    """The sum over all processes, on the device of the values."""
    if trainer.world_size == 1:
        return values
    total = trainer.strategy.reduce(values.to(trainer.strategy.root_device), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total.to(values.device)


@contextmanager
def agreed_interrupts(trainer: pl.Trainer) -> Iterator[Callable[[], None]]:
    """Have an interrupt from the keyboard end the work of all processes at the same place.

    One process is interrupted as ever, at once. Several go on until all of them ask; a second
    interrupt ends a process where it stands.

    Args:
        trainer: The Trainer.

    Yields:
        To be called by all processes in the same places: raises ``KeyboardInterrupt`` where any of
        them was interrupted.
    """
    if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    was_interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal was_interrupted
        if was_interrupted:
            raise KeyboardInterrupt
        was_interrupted = True

    def ask() -> None:
        if float(summed(trainer, torch.tensor(float(was_interrupted)))):
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield ask
    finally:
        signal.signal(signal.SIGINT, before)

"""Measure the latency of a call: warm-up, repeats, median and spread; two models in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from lit_compress.measure.inputs import (
    ExampleInputs,
    Measurable,
    as_call,
    call_error,
    device_of,
    infer_batch_size,
    map_tensors,
    prepared,
    with_batch_size,
)


@dataclass(frozen=True)
class LatencyResult:
    """Times of one call, in milliseconds.

    Attributes:
        median_ms: Half of the calls were faster.
        iqr_ms: Interquartile range: the middle half of the calls lies this close together.
        p10_ms: One call in ten was faster.
        p90_ms: One call in ten was slower.
        repeats: Number of calls timed.
        num_threads: Threads torch might use within an operator.
        batch_size: Examples per call.
        device: Where the tensors were, such as ``"cpu"`` or ``"cuda:0"``.
    """

    median_ms: float
    iqr_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int
    num_threads: int
    batch_size: int
    device: str

    @property
    def throughput(self) -> float:
        """Examples per second at the median."""
        return self.batch_size / self.median_ms * 1e3

    def __str__(self) -> str:
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        return (
            f"{self.median_ms:.3f} ms (10-90 %: {self.p10_ms:.3f}-{self.p90_ms:.3f}, "
            f"{self.repeats} repeats, {threads}, batch {self.batch_size}, {self.device})"
        )


@dataclass(frozen=True)
class LatencyComparison:
    """Two calls timed in turns, so that a slow moment of the machine hits both.

    Attributes:
        a: Times of the first.
        b: Times of the second.
        ratio: Median of ``b`` ÷ median of ``a``; below 1, ``b`` is the faster one.
        ratio_p10: One pair in ten had a smaller ratio ...
        ratio_p90: ... and one in ten a larger: where 1 lies between, no difference was shown.
    """

    a: LatencyResult
    b: LatencyResult
    ratio: float
    ratio_p10: float
    ratio_p90: float


def measure_latency(
    model: Measurable,
    example_inputs: ExampleInputs,
    *,
    warmup: int = 5,
    repeats: int = 30,
    num_threads: int | Sequence[int] | None = None,
    batch_sizes: int | Sequence[int] | None = None,
    min_duration_s: float = 0.0,
) -> tuple[LatencyResult, ...]:
    """Time calls for every number of threads and batch size.

    A module runs in evaluation mode without gradients and gets its modes back; a plain function
    is called as it is. On CUDA and MPS the device is synchronised before each clock reading.

    Args:
        model: A module or any function of the inputs.
        example_inputs: One batch; a tensor, a tuple of arguments or a dict of keyword arguments.
        warmup: Calls before the first that is timed, at least 0.
        repeats: Calls timed, at least 1.
        num_threads: Threads within an operator, one number or several, each at least 1. By
            default as torch is set. The setting is restored.
        batch_sizes: One size or several, each at least 1; the examples are repeated or cut.
            By default the batch as it is.
        min_duration_s: Go on after ``repeats`` until so many seconds have been timed.

    Returns:
        One result for each pair, batch sizes in the outer loop.

    Raises:
        ValueError: If a number is out of range, the inputs hold no example, or the call raises.
    """
    _check_repeats(warmup, repeats, min_duration_s)
    threads = _each(num_threads, torch.get_num_threads(), "num_threads")
    sizes = _each(batch_sizes, infer_batch_size(example_inputs), "batch_sizes")
    results = []
    for size in sizes:
        inputs = example_inputs if batch_sizes is None else with_batch_size(example_inputs, size)
        for count in threads:
            with _ready_to_time(model, inputs, count) as (call, device):
                for _ in range(warmup):
                    call()
                times = [call() for _ in range(repeats)]
                while sum(times) < min_duration_s * 1e3:
                    times.append(call())
            results.append(_summarise(times, count, size, device))
    return tuple(results)


def compare_latency(
    a: Measurable,
    b: Measurable,
    example_inputs: ExampleInputs,
    *,
    warmup: int = 5,
    repeats: int = 30,
    num_threads: int | None = None,
    min_duration_s: float = 0.0,
) -> LatencyComparison:
    """Time two modules or functions on the same inputs in turns: a b, b a, a b, ...

    Args:
        a: The one to compare with, such as the dense model.
        b: The other.
        example_inputs: As in `measure_latency`.
        warmup: Calls of each before the first that is timed, at least 0.
        repeats: Pairs timed, at least 1.
        num_threads: As in `measure_latency`, but one number.
        min_duration_s: As in `measure_latency`, for both together.

    Returns:
        Both results and the ratio of their medians.

    Raises:
        ValueError: As in `measure_latency`.
    """
    _check_repeats(warmup, repeats, min_duration_s)
    (threads,) = _each(num_threads, torch.get_num_threads(), "num_threads")
    size = infer_batch_size(example_inputs)
    times_a: list[float] = []
    times_b: list[float] = []
    with (
        _ready_to_time(a, example_inputs, threads) as (call_a, device_a),
        _ready_to_time(b, example_inputs, threads) as (call_b, device_b),
    ):
        for _ in range(warmup):
            call_a()
            call_b()
        turns = [(times_a, call_a), (times_b, call_b)]
        while len(times_a) < repeats or sum(times_a) + sum(times_b) < min_duration_s * 1e3:
            for times, call in turns:
                times.append(call())
            turns.reverse()
    ratios = [tb / ta for ta, tb in zip(times_a, times_b, strict=True)]
    result_a = _summarise(times_a, threads, size, device_a)
    result_b = _summarise(times_b, threads, size, device_b)
    return LatencyComparison(
        a=result_a,
        b=result_b,
        ratio=result_b.median_ms / result_a.median_ms,
        ratio_p10=_quantile(ratios, 0.1),
        ratio_p90=_quantile(ratios, 0.9),
    )


@contextmanager
def _ready_to_time(
    model: Measurable, example_inputs: ExampleInputs, num_threads: int
) -> Iterator[tuple[Callable[[], float], str]]:
    """Yield a function that makes one call and returns its milliseconds, and the device."""
    args, kwargs = as_call(map_tensors(example_inputs, torch.clone))  # a forward may write to it
    device = device_of(model, example_inputs)
    threads_before = torch.get_num_threads()

    def timed_call() -> float:
        synchronize(device)
        start = time.perf_counter()
        model(*args, **kwargs)
        synchronize(device)
        return (time.perf_counter() - start) * 1e3

    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads_before)
        torch.set_num_threads(num_threads)
        stack.enter_context(prepared(model))
        try:
            timed_call()
        except Exception as error:
            raise call_error(model, example_inputs, error) from error
        yield timed_call, str(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _check_repeats(warmup: int, repeats: int, min_duration_s: float) -> None:
    if warmup < 0:
        raise ValueError(f"warmup={warmup}; expected at least 0 calls.")
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; expected at least 1 timed call.")
    if not 0 <= min_duration_s < float("inf"):
        raise ValueError(f"min_duration_s={min_duration_s}; expected a finite number ≥ 0.")


def _each(value: int | Sequence[int] | None, default: int, name: str) -> tuple[int, ...]:
    """Normalise one number, several or None to a tuple of positive numbers."""
    if value is None:
        return (default,)
    values = (value,) if isinstance(value, int) else tuple(value)
    if not values or min(values) < 1:
        raise ValueError(f"{name}={value!r}; expected at least one number, each at least 1.")
    return values


def _summarise(
    times_ms: list[float], num_threads: int, batch_size: int, device: str
) -> LatencyResult:
    return LatencyResult(
        median_ms=statistics.median(times_ms),
        iqr_ms=_quantile(times_ms, 0.75) - _quantile(times_ms, 0.25),
        p10_ms=_quantile(times_ms, 0.1),
        p90_ms=_quantile(times_ms, 0.9),
        repeats=len(times_ms),
        num_threads=num_threads,
        batch_size=batch_size,
        device=device,
    )


def _quantile(values: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the two nearest ranks."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])

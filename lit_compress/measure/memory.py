"""Measure the peak memory of a call."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from lit_compress.measure.inputs import (
    ExampleInputs,
    Measurable,
    as_call,
    call_error,
    device_of,
    infer_batch_size,
    map_tensors,
    prepared,
)


def peak_memory_bytes(model: Measurable, example_inputs: ExampleInputs) -> int:
    """Measure how far tensor memory rises during one call.

    Counted is what torch's allocator hands out between the start and the end of the call and
    has not got back at the worst moment: activations, outputs and the workspaces of torch's own
    kernels. Weights and inputs stand already and are not counted: add `size_bytes` for a rough
    whole. Memory that a library takes from the system by itself is not seen, nor is the process.

    One call warms up, a second is measured: on CUDA by ``torch.cuda.max_memory_allocated``, on
    the CPU by the allocation events of ``torch.profiler`` (which writes a line or two to stderr).

    Args:
        model: A module, run in evaluation mode without gradients, or any function, run as it is.
        example_inputs: One batch; a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        Bytes above the level before the call.

    Raises:
        ValueError: If the inputs hold no example, the call raises, or the device is neither the
            CPU nor CUDA.
    """
    infer_batch_size(example_inputs)
    device = device_of(model, example_inputs)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"The model or its inputs are on {device}; peak memory can be measured on the CPU and "
            "on CUDA. Move both there."
        )
    args, kwargs = as_call(map_tensors(example_inputs, torch.clone))
    with prepared(model):
        try:
            model(*args, **kwargs)
        except Exception as error:
            raise call_error(model, example_inputs, error) from error
        if device.type == "cuda":
            return _cuda_peak(model, args, kwargs, device)
        return _cpu_peak(model, args, kwargs)


def _cuda_peak(
    model: Measurable, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model(*args, **kwargs)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(model: Measurable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(*args, **kwargs)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    # The profiler's running total starts at zero: blocks that stood before are not in it.
    return max(
        (int(e["args"]["Total Allocated"]) for e in events if e.get("name") == "[memory]"),
        default=0,
    )

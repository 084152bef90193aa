"""ModelMeasures: everything that is measured of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lit_compress.measure.complexity import LayerComplexity, count_macs, layer_complexity
from lit_compress.measure.inputs import ExampleInputs
from lit_compress.measure.latency import LatencyResult, measure_latency
from lit_compress.measure.memory import peak_memory_bytes
from lit_compress.measure.size import saved_sizes


@dataclass(frozen=True)
class ModelMeasures:
    """What was measured of one model; None where it was not.

    Attributes:
        name: What to call the model in a report.
        num_params: Elements of all parameters, shared ones once.
        num_nonzero_params: Those that are not zero.
        size_bytes: Bytes of the saved state.
        compressed_size_bytes: The same compressed, by codec (``"deflate"``, ``"zstd"``).
        layers: One row for each module that holds parameters or multiplies.
        macs: MACs for one example.
        latency: Times by number of threads and batch size.
        peak_memory_bytes: How far memory rises during a call.
        metrics: Any figures of merit by name, such as ``{"top1": 0.885}``.
    """

    name: str
    num_params: int
    num_nonzero_params: int
    size_bytes: int
    compressed_size_bytes: Mapping[str, int]
    layers: tuple[LayerComplexity, ...]
    macs: int | None = None
    latency: tuple[LatencyResult, ...] | None = None
    peak_memory_bytes: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float | None:
        """Zeros ÷ weights over all layers, in [0, 1]; None for a model without weights."""
        weights = sum(layer.num_weights for layer in self.layers)
        nonzero = sum(layer.num_nonzero_weights for layer in self.layers)
        return 1 - nonzero / weights if weights else None


def measure_model(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    name: str | None = None,
    metrics: Mapping[str, float] | None = None,
    latency: bool | Sequence[LatencyResult] = False,
    peak_memory: bool = False,
    batch_size: int | None = None,
) -> ModelMeasures:
    """Measure a model; the model is left as it was.

    Args:
        model: Any module.
        example_inputs: One batch; a tensor, a tuple of arguments or a dict of keyword arguments.
            Without it MACs, latency and memory stay unknown.
        name: What to call it; by default its class name.
        metrics: Figures of merit that the caller measured, kept as they are.
        latency: True times it with the defaults of `measure_latency`; or give its results.
        peak_memory: Whether to measure `peak_memory_bytes`.
        batch_size: Examples in ``example_inputs``, where that is not the first dimension.

    Returns:
        The measures; ``"zstd"`` is left out where ``zstandard`` is not installed.

    Raises:
        ValueError: If latency or memory is asked for without inputs, or as `count_macs`.
    """
    if example_inputs is None and (latency is True or peak_memory):
        raise ValueError(
            f"latency={latency!r}, peak_memory={peak_memory} without example_inputs; expected one "
            "batch to call the model with. Pass example_inputs, or ask for neither."
        )
    layers = layer_complexity(model, example_inputs, batch_size=batch_size)
    size, compressed = saved_sizes(model)
    macs = times = peak = None
    if example_inputs is not None:
        macs = count_macs(model, example_inputs, batch_size=batch_size)
        times = measure_latency(model, example_inputs) if latency is True else None
        peak = peak_memory_bytes(model, example_inputs) if peak_memory else None
    if not isinstance(latency, bool):
        times = tuple(latency)
    return ModelMeasures(
        name=type(model).__name__ if name is None else name,
        num_params=sum(layer.num_params for layer in layers),
        num_nonzero_params=sum(layer.num_nonzero_params for layer in layers),
        size_bytes=size,
        compressed_size_bytes=compressed,
        layers=layers,
        macs=macs,
        latency=times,
        peak_memory_bytes=peak,
        metrics={key: float(value) for key, value in (metrics or {}).items()},
    )

"""Measure a model: MACs, parameters, zeros, bytes, latency and memory, and report it.

Everything here is pure PyTorch: modules in, numbers out, the module left as it was.
"""

from lit_compress.measure.complexity import (
    LayerComplexity,
    Sparsity,
    count_macs,
    count_nonzero_params,
    count_params,
    layer_complexity,
    sparsity,
)
from lit_compress.measure.inputs import ExampleInputs
from lit_compress.measure.latency import (
    LatencyComparison,
    LatencyResult,
    compare_latency,
    measure_latency,
)
from lit_compress.measure.measures import ModelMeasures, measure_model
from lit_compress.measure.memory import peak_memory_bytes
from lit_compress.measure.report import CompressionReport
from lit_compress.measure.size import compressed_size_bytes, size_bytes

__all__ = [
    "CompressionReport",
    "ExampleInputs",
    "LatencyComparison",
    "LatencyResult",
    "LayerComplexity",
    "ModelMeasures",
    "Sparsity",
    "compare_latency",
    "compressed_size_bytes",
    "count_macs",
    "count_nonzero_params",
    "count_params",
    "layer_complexity",
    "measure_latency",
    "measure_model",
    "peak_memory_bytes",
    "size_bytes",
    "sparsity",
]

"""Model compression for PyTorch Lightning: callbacks for your Trainer and an honest report."""

from lit_compress.callbacks.compression_summary import CompressionSummary
from lit_compress.callbacks.distillation import Distillation, FeatureMatching
from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.compress.schedules import Schedule
from lit_compress.measure import (
    CompressionReport,
    ModelMeasures,
    compare_latency,
    count_macs,
    measure_latency,
    measure_model,
)

__all__ = [
    "CompressionReport",
    "CompressionSummary",
    "Distillation",
    "FeatureMatching",
    "MagnitudeSparsity",
    "ModelMeasures",
    "Schedule",
    "compare_latency",
    "count_macs",
    "measure_latency",
    "measure_model",
]

"""Model compression for PyTorch Lightning: callbacks for your Trainer and an honest report."""

from lit_compress.callbacks.compression_summary import CompressionSummary
from lit_compress.callbacks.distillation.distillation import Distillation, FeatureMatching
from lit_compress.callbacks.loading import load_compressed
from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.callbacks.pruning.channel_pruning import ChannelPruning
from lit_compress.callbacks.quantization.post_training_quantization import PostTrainingQuantization
from lit_compress.callbacks.quantization.quantization_aware_training import (
    QuantizationAwareTraining,
)
from lit_compress.callbacks.search.ratio_search import RatioSearch
from lit_compress.callbacks.weight_clustering import WeightClustering
from lit_compress.compress.channels.penalty import ChannelPenalty
from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.compress.schedules import Schedule
from lit_compress.measure import (
    CompressionReport,
    ModelMeasures,
    compare_latency,
    count_macs,
    measure_latency,
    measure_model,
)
from lit_compress.search.ddpg import DDPGSettings
from lit_compress.search.search_result import SearchResult
from lit_compress.search.settings import CandidateSettings, ScoringSettings

__all__ = [
    "CandidateSettings",
    "ChannelPenalty",
    "ChannelPlan",
    "ChannelPruning",
    "CompressionReport",
    "CompressionSummary",
    "DDPGSettings",
    "Distillation",
    "FeatureMatching",
    "MagnitudeSparsity",
    "ModelMeasures",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "RatioSearch",
    "Schedule",
    "ScoringSettings",
    "SearchResult",
    "WeightClustering",
    "compare_latency",
    "count_macs",
    "load_compressed",
    "measure_latency",
    "measure_model",
]

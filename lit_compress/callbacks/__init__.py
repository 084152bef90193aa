"""Lightning callbacks: thin glue between the Trainer and the pure code."""

from lit_compress.callbacks.compression_summary import CompressionSummary
from lit_compress.callbacks.distillation.distillation import Distillation, FeatureMatching
from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity
from lit_compress.callbacks.pruning.channel_pruning import ChannelPruning
from lit_compress.callbacks.quantization.post_training_quantization import PostTrainingQuantization
from lit_compress.callbacks.quantization.quantization_aware_training import (
    QuantizationAwareTraining,
)
from lit_compress.callbacks.search.ratio_search import RatioSearch
from lit_compress.callbacks.weight_clustering import WeightClustering

__all__ = [
    "ChannelPruning",
    "CompressionSummary",
    "Distillation",
    "FeatureMatching",
    "MagnitudeSparsity",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "RatioSearch",
    "WeightClustering",
]

"""Lightning callbacks: thin glue between the Trainer and the pure code."""

from lit_compress.callbacks.magnitude_sparsity import MagnitudeSparsity

__all__ = ["MagnitudeSparsity"]

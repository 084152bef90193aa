"""Quantization during a fit (quantization-aware training) and after it (post-training)."""

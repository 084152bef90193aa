"""Quantization: ranges, integers, and networks that compute with them."""

"""Quantization: scales and ranges, quantizers on a network, integer arithmetic for export."""

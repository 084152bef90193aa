"""Quantization during and after a fit."""

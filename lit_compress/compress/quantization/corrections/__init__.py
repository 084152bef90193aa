"""Corrections after training: equalization, adaptive rounding and bias correction."""

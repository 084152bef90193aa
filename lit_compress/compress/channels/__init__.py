"""Structural pruning: find coupled channels, score them, plan, cut, and reconstruct weights."""

"""Sparsity: how many weights are removed and which, patterns, and parameters with masks."""

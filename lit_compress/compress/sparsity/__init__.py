"""Sparsity: how many weights go, which, and parameters with their masks."""

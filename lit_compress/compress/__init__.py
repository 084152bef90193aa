"""Compression as pure functions: tensors and modules in, tensors and modules out."""

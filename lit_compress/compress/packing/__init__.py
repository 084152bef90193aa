"""Packed files: state dicts in as few bytes as their values need."""

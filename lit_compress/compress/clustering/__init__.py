"""Clustering: tensors of few distinct values, and parameters that train as clusters."""

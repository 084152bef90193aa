"""Ratio search at the start of a fit: the callback, its candidates, their scores, its report."""

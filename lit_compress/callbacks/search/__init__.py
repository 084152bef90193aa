"""Ratio search at the start of a fit."""

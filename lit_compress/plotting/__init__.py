"""Figures: free functions from results to PNG files; only this package needs matplotlib."""

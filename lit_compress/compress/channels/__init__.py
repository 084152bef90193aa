"""Structural pruning: coupled channels found, planned for, scored, removed and made up for."""

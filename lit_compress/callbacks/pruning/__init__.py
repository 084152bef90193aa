"""Channel pruning during a fit."""

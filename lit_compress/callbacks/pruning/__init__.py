"""Channel pruning during a fit: the callback, its plan, its scores and the cut."""

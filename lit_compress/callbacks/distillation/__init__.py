"""Distillation during a fit: the callback, its training step, its objective and its teacher."""

"""Distillation during a fit."""

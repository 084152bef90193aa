"""Figures of results, as PNG files: one function for each kind of result.

Results know nothing of figures, and matplotlib is imported only when one is drawn.
"""

from lit_compress.plotting.benchmark import plot_benchmark
from lit_compress.plotting.report import plot_report
from lit_compress.plotting.search import plot_search
from lit_compress.plotting.sensitivity import plot_sensitivity

__all__ = ["plot_benchmark", "plot_report", "plot_search", "plot_sensitivity"]

"""Deployment: export networks to files of runtimes, compare them with torch, and time them."""

from lit_compress.deploy.benchmark import benchmark_files
from lit_compress.deploy.benchmark_result import BenchmarkResult, FileLatency, MeasuredFile
from lit_compress.deploy.choice import FastestFile, export_fastest
from lit_compress.deploy.export import ExportedFile, export
from lit_compress.deploy.parity import Parity, ParityError, ParityTolerance, compare
from lit_compress.deploy.route import ExportError, MissingExtra, Target
from lit_compress.deploy.runtimes import LoadedFile, load_file, recognize
from lit_compress.deploy.sparse_convolution import use_sparse_kernels

__all__ = [
    "BenchmarkResult",
    "ExportError",
    "ExportedFile",
    "FastestFile",
    "FileLatency",
    "LoadedFile",
    "MeasuredFile",
    "MissingExtra",
    "Parity",
    "ParityError",
    "ParityTolerance",
    "Target",
    "benchmark_files",
    "compare",
    "export",
    "export_fastest",
    "load_file",
    "recognize",
    "use_sparse_kernels",
]

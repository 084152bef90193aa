"""``lit-compress report`` and ``lit-compress benchmark``: measure and time a checkpoint."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence

from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from torch import nn

from lit_compress.cli.file_benchmark import are_exported, benchmark_exported
from lit_compress.cli.parsing import CommandParser
from lit_compress.cli.stored_weights import StoredWeights
from lit_compress.cli.subject import Subject, find_subject
from lit_compress.compress.weight_files import load_checkpoint, read_checkpoint, read_weights
from lit_compress.deploy import use_sparse_kernels
from lit_compress.files import write_text
from lit_compress.measure import (
    CompressionReport,
    ExampleInputs,
    LatencyComparison,
    ModelMeasures,
    compare_latency,
    measure_model,
)
from lit_compress.measure.inputs import with_batch_size
from lit_compress.measure.table import (
    TIMES,
    aligned,
    count,
    markdown,
    megabytes,
    percent,
    shown,
)
from lit_compress.plain import to_plain
from lit_compress.plotting import plot_report

__all__ = ["benchmark", "fill", "numbers", "report"]

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # header and rows


def report(args: Sequence[str]) -> None:
    """Print, and write if asked, the measures of a checkpoint, alone or against a dense one.

    Args:
        args: The command's arguments; see ``lit-compress report --help``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or does not fit the model, or ``--plots`` or
            ``--validate`` lack what they need.
    """
    parser = _parser("report", "Measure a checkpoint, alone or against a dense one.")
    parser.add_argument("--markdown", type=str | None, help="Write the tables here.")
    parser.add_argument("--plots", type=str | None, help="Draw into this folder (--baseline).")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="Evaluate on the validation data too (the run's configuration must be known).",
    )
    options = parser.parse_args(list(args))
    subject = _prepare(options)
    if options.plots and not options.baseline:
        raise ValueError("--plots compares two models; give the dense one too, as --baseline FILE.")
    if options.validate and (subject is None or subject.data is None):
        raise ValueError("--validate needs the model and its data; give the run's --config FILE.")

    inputs = None if subject is None else subject.example_inputs()
    compressed = _measures(options.checkpoint, "compressed", subject, inputs, options.validate)
    if options.baseline is None:
        tables = _summary(compressed)
        print("\n\n".join("\n".join(aligned(*table)) for table in tables))
        if options.json:
            write_text(options.json, json.dumps(to_plain(compressed), indent=2) + "\n")
        if options.markdown:
            write_text(options.markdown, "\n\n".join(markdown(*table) for table in tables) + "\n")
        return
    dense = _measures(options.baseline, "dense", subject, inputs, options.validate)
    result = CompressionReport(dense=dense, compressed=compressed)
    print(result)
    if options.json:
        result.save(options.json)
    if options.markdown:
        result.save_markdown(options.markdown)
    if options.plots:
        plot_report(result, options.plots)


def benchmark(args: Sequence[str]) -> None:
    """Time the model of a checkpoint and the dense one in turns; or exported files.

    Args:
        args: The command's arguments; see ``lit-compress benchmark --help``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or does not fit the model, or the model or its input is
            not known.
    """
    parser = _parser(
        "benchmark",
        "Time the model of a checkpoint beside the dense one in torch, or exported files beside "
        "each other on their runtimes.",
        several=True,
    )
    parser.add_argument("--threads", type=str, default="1", help="Numbers of threads, as in 1,2.")
    parser.add_argument("--batch_sizes", "--batch-sizes", type=str, default="1", help="As in 1,8.")
    parser.add_argument("--repeats", type=int, default=30, help="Calls timed for each.")
    parser.add_argument("--plot", type=str | None, help="Draw into this PNG (exported files).")
    parser.add_argument("--wandb", type=str | None, help="Log to this W&B project (likewise).")
    parser.add_argument("--sparse_kernels", "--sparse-kernels", action="store_true",
        help="Run sparse 1x1 convolutions of the checkpoint as CSR products.")  # fmt: skip
    options = parser.parse_args(list(args))
    threads = numbers(options.threads, "--threads")
    batch_sizes = numbers(options.batch_sizes, "--batch-sizes")
    if are_exported(options.checkpoint):
        known = options.config or options.input_shape
        benchmark_exported(options, threads, batch_sizes, _of_files(options) if known else None)
        return
    (options.checkpoint,) = options.checkpoint
    subject = _prepare(options)
    if subject is None:
        raise ValueError(
            f"nothing says which model {options.checkpoint!r} is of; give the configuration of its "
            "run as --config FILE."
        )
    inputs = subject.example_inputs()
    if inputs is None:
        raise ValueError(
            "nothing says what input the model takes; give a configuration with data, or the shape "
            "of one example, as in --input-shape 3,32,32."
        )
    dense = copy.deepcopy(subject.network)
    if options.baseline is not None:
        fill(dense, options.baseline)
    fill(subject.network, options.checkpoint)
    network = subject.network
    if options.sparse_kernels:
        network, replaced = use_sparse_kernels(network)
        print(
            f"CSR products in {len(replaced)} layers: {', '.join(replaced) or 'none is sparse'}\n"
        )
    comparisons = [
        compare_latency(
            dense,
            network,
            with_batch_size(inputs, batch_size),
            repeats=options.repeats,
            num_threads=num_threads,
        )
        for batch_size in batch_sizes
        for num_threads in threads
    ]
    print("\n".join(aligned(*_latency_table(comparisons))))
    if options.json:
        write_text(options.json, json.dumps([to_plain(c) for c in comparisons], indent=2) + "\n")


# --- Arguments ------------------------------------------------------------------------------------


def _parser(command: str, description: str, several: bool = False) -> CommandParser:
    what = "CHECKPOINT | FILE..." if several else "CHECKPOINT"
    parser = CommandParser(
        prog=f"lit-compress {command}",
        description=description,
        usage=f"lit-compress {command} {what} [options]",
    )
    said = "A Lightning checkpoint or a state dict"
    if several:
        parser.add_argument(
            "checkpoint", nargs="+", type=str, help=f"{said}; or exported files, the first of "
            "which the others are compared with.",
        )  # fmt: skip
    else:
        parser.add_argument("checkpoint", type=str, help=f"{said}.")
    parser.add_argument("--baseline", type=str | None, help="The dense model's checkpoint.")
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        type=str,
        help="The run's configuration, as given to fit; by default the config.yaml beside it.",
    )
    parser.add_argument(
        "--input_shape", "--input-shape", type=str | None, help="Of one example, as in 3,32,32."
    )
    parser.add_argument("--assets", type=str | None, help="Folder with data/ and weights/.")
    parser.add_argument("--json", type=str | None, help="Write the figures here.")
    return parser


def _prepare(options: Namespace) -> Subject | None:
    if options.assets is not None:
        os.environ["LIT_COMPRESS_ASSETS"] = options.assets
    shape = options.input_shape and numbers(options.input_shape, "--input-shape")
    return find_subject(options.checkpoint, options.config or (), shape)


def _of_files(options: Namespace) -> Subject | None:
    """What configurations or a shape say of the input of exported files."""
    if options.assets is not None:
        os.environ["LIT_COMPRESS_ASSETS"] = options.assets
    shape = options.input_shape and numbers(options.input_shape, "--input-shape")
    if options.config:
        return find_subject(None, options.config, shape)
    return Subject(LightningModule(), None, shape)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """The positive numbers in an option's text, as in ``"1,2"``.

    Raises:
        ValueError: If it holds anything else; the option is named.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise ValueError(f"{option} is {text!r}; expected numbers from 1 up, as in 1,2.")
    return found


# --- Measures -------------------------------------------------------------------------------------


def _measures(
    path: str,
    name: str,
    subject: Subject | None,
    inputs: ExampleInputs | None,
    validate: bool,
) -> ModelMeasures:
    if subject is None:
        return measure_model(StoredWeights(read_weights(path)), name=name)
    fill(subject.network, path)
    metrics = subject.validate() if validate else None
    return measure_model(subject.network, inputs, name=name, metrics=metrics)


def fill(network: nn.Module, path: str) -> None:
    """Give a network the weights, cuts and quantizers of a checkpoint.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or does not fit the network.
    """
    fix = "Give the configuration of the run that wrote them, as --config FILE."
    load_checkpoint(network, read_checkpoint(path), path, fix)


def _summary(measures: ModelMeasures) -> list[Table]:
    """The tables of one model: totals, then layers."""
    sizes = measures.compressed_size_bytes.items()
    totals = [
        ("zeros in weights", shown(measures.sparsity, percent)),
        ("parameters", count(measures.num_params)),
        ("non-zero parameters", count(measures.num_nonzero_params)),
        ("MACs", shown(measures.macs, count)),
        ("size", megabytes(measures.size_bytes)),
        *((f"size, {codec}", megabytes(size)) for codec, size in sizes),
        *((name, f"{value:.4f}") for name, value in measures.metrics.items()),
    ]
    layers = [
        (
            layer.name or "(itself)",
            shown(layer.macs, count),
            count(layer.num_params),
            count(layer.num_nonzero_params),
            shown(layer.sparsity, percent),
        )
        for layer in measures.layers
    ]
    header = ("layer", "MACs", "parameters", "non-zero", "zeros in weights")
    return [(("", measures.name), totals), (header, layers)]


def _latency_table(comparisons: Sequence[LatencyComparison]) -> Table:
    """Both medians and their ratio; a range that holds 1 shows no difference."""
    rows = [
        (
            str(c.a.num_threads),
            str(c.a.batch_size),
            f"{c.a.median_ms:,.3f} ms",
            f"{c.b.median_ms:,.3f} ms",
            f"{TIMES}{c.ratio:.3f}",
            f"{c.ratio_p10:.3f} to {c.ratio_p90:.3f}",
        )
        for c in comparisons
    ]
    return ("threads", "batch", "dense", "compressed", "change", "8 pairs in 10"), rows

"""``lit-compress export``: write a checkpoint as files of runtimes, each checked where it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn
from torch.utils._pytree import tree_unflatten

from lit_compress.callbacks.lightning.method_wrapping import MethodWrapper
from lit_compress.cli.inspection import fill, numbers
from lit_compress.cli.parsing import CommandParser
from lit_compress.cli.subject import Subject, find_subject
from lit_compress.compress.quantization.network import (
    is_quantized,
    quantized_network,
    without_quantizers,
)
from lit_compress.deploy import (
    ExportedFile,
    FastestFile,
    LoadedFile,
    ParityError,
    ParityTolerance,
    export_fastest,
    load_file,
)
from lit_compress.deploy import export as export_network
from lit_compress.deploy.flat_call import FlatCall, flat_inputs
from lit_compress.deploy.runtimes import ROUTES
from lit_compress.files import write_text
from lit_compress.measure import ExampleInputs
from lit_compress.measure.inputs import evaluating, infer_batch_size, with_batch_size
from lit_compress.measure.table import aligned
from lit_compress.plain import to_plain

__all__ = ["export"]


def export(args: Sequence[str]) -> None:
    """Write the model of a checkpoint for one or several runtimes.

    Args:
        args: The command's arguments; see ``lit-compress export --help``.

    Raises:
        ExportError: If a runtime cannot take the model.
        FileNotFoundError: If the checkpoint is missing.
        MissingExtra: If a runtime is not installed.
        ParityError: If a file computes something else than torch, or scores worse with it.
        ValueError: If a file is damaged or does not fit the model, or the model or its input is
            not known.
    """
    options = _parser().parse_args(list(args))
    if options.assets is not None:
        os.environ["LIT_COMPRESS_ASSETS"] = options.assets
    targets = _targets(options.to)
    shape = options.input_shape and numbers(options.input_shape, "--input-shape")
    subject = find_subject(options.checkpoint, options.config or (), shape)
    if subject is None:
        raise ValueError(
            f"nothing says which model {options.checkpoint!r} is of; give the configuration of its "
            "run as --config FILE."
        )
    if options.validate and subject.data is None:
        raise ValueError("--validate needs data; give the run's --config FILE.")
    fill(subject.network, options.checkpoint)
    if options.float:
        without_quantizers(subject.network)
    example, checks = _inputs(subject, options)
    metrics = dict(subject.validate()) if options.validate else {}
    in_float = _float_metrics(subject) if options.validate and options.fastest else metrics
    written = []
    for target in targets:
        done = (export_fastest if options.fastest else export_network)(
            subject.network,
            target,
            _place(options, target, len(targets)),
            example,
            check_inputs=checks,
            tolerance=ParityTolerance(options.cosine, options.argmax_agreement, options.max_error),
            num_threads=options.threads,
            assume_vnni=options.assume_vnni,
        )
        file = done.file if isinstance(done, FastestFile) else done
        is_float = isinstance(done, FastestFile) and done.form == "float"
        torchs = in_float if is_float else metrics
        scored = _scored(subject, file, example, torchs, options) if options.validate else {}
        plain = {**to_plain(file), "path": str(file.path)}
        if isinstance(done, FastestFile):
            plain |= {"form": done.form, "median_ms": dict(done.median_ms)}
        written.append({**plain, "metrics": {"torch": torchs, "file": scored}})
        print(_shown(done, torchs, scored), end="\n\n")
        if options.json:  # after each target: the next one may fail
            write_text(options.json, json.dumps(written, indent=2) + "\n")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="lit-compress export",
        description="Write a model for a runtime, run the file there and compare it with torch.",
        usage="lit-compress export CHECKPOINT --to TARGET[,TARGET] [options]",
    )
    add = parser.add_argument
    add("checkpoint", type=str, help="A Lightning checkpoint, a state dict or a packed file.")
    add("--to", type=str, required=True, help=f"One or more of {','.join(ROUTES)}.")
    add("--output", type=str | None, help="The file, or a folder for several targets.")
    add("-c", "--config", action="append", type=str, help="The run's configuration; by default "
        "the config.yaml beside the checkpoint.")  # fmt: skip
    add("--input_shape", "--input-shape", type=str | None, help="Of one example, as in 3,32,32.")
    add("--batch_size", "--batch-size", type=int, default=1,
        help="Examples at a time, where the runtime fixes it (not ONNX, OpenVINO).")  # fmt: skip
    add("--check_batches", "--check-batches", type=int, default=4,
        help="Validation batches on which file and torch are compared.")  # fmt: skip
    add("--cosine", type=float, default=0.999, help="Least cosine of both outputs.")
    add("--max_error", "--max-error", type=float, default=0.02,
        help="Largest error as a part of the largest output.")  # fmt: skip
    add("--argmax_agreement", "--argmax-agreement", type=float, default=0.95,
        help="Least share of positions with the same largest entry.")  # fmt: skip
    add("--validate", action="store_true", help="Score the file on all of the validation data.")
    add("--metric_tolerance", "--metric-tolerance", type=float, default=0.01,
        help="How far a metric of the file may be from torch's (--validate).")  # fmt: skip
    add("--assume_vnni", "--assume-vnni", action="store_true",
        help="Write the fastest integers for x86 with VNNI, wrong on older ones.")  # fmt: skip
    add("--float", action="store_true", help="Leave quantization off: the file to compare with.")
    add("--fastest", action="store_true", help="Write a quantized model with integers, with its "
        "activations in float and in float, and keep what is fastest on this machine.")  # fmt: skip
    add("--threads", type=int, default=1, help="Threads of the runtime while comparing.")
    add("--assets", type=str | None, help="Folder with data/ and weights/.")
    add("--json", type=str | None, help="Write the figures here.")
    return parser


def _targets(text: str) -> list[Any]:
    targets = [part.strip() for part in text.split(",")]
    for target in targets:
        if target not in ROUTES:
            raise ValueError(f"--to has {target!r}; choose from {', '.join(ROUTES)}.")
    return targets


def _inputs(subject: Subject, options: Namespace) -> tuple[ExampleInputs, list[ExampleInputs]]:
    checks = [] if subject.input_shape else subject.real_inputs(options.check_batches)
    example = checks[0] if checks else subject.example_inputs()
    if example is None:
        raise ValueError(
            "nothing says what input the model takes; give a configuration with data, or the shape "
            "of one example, as in --input-shape 3,32,32."
        )
    example = with_batch_size(example, options.batch_size)
    return example, checks or [example]


def _place(options: Namespace, target: str, num_targets: int) -> Path:
    suffix = ROUTES[target].suffix  # type: ignore[index]
    name = Path(options.checkpoint).stem + (".float" if options.float else "")
    if options.output is None:
        return Path(options.checkpoint).with_name(f"{name}.{target}{suffix}")
    output = Path(options.output)
    if num_targets == 1 and output.suffix and not output.is_dir():
        return output
    return output / f"{name}.{target}{suffix}"


# --- The validation of a file ---------------------------------------------------------------------


def _scored(
    subject: Subject,
    file: ExportedFile,
    example: ExampleInputs,
    metrics: Mapping[str, float],
    options: Namespace,
) -> dict[str, float]:
    """The user's own validation, with the file in the place of the network."""
    with load_file(file.path, options.threads) as runner:
        instead = _FileInstead(runner, subject.network, example)
        wrapper = MethodWrapper(subject.network, "forward", instead.forward)
        try:
            scored = dict(subject.validate())
        finally:
            wrapper.remove()
    for name, value in metrics.items():
        allowed = options.metric_tolerance * max(1.0, abs(value))
        if not abs(scored[name] - value) <= allowed:
            for part in ROUTES[file.target].files_of(file.path):
                part.unlink()
            raise ParityError(
                f"{file.path} ({file.target}) has {name} {scored[name]:.4f} on the validation "
                f"data, torch has {value:.4f}; they may differ by {allowed:.4f}. The file was not "
                "kept. Export to another target, or allow more with --metric-tolerance."
            )
    return scored


def _float_metrics(subject: Subject) -> dict[str, float]:
    """The metrics of the network without rounding."""
    quantizations = [quantized_network(m) for m in subject.network.modules() if is_quantized(m)]
    modes = [(one.observing, one.quantizing) for one in quantizations]
    for quantization in quantizations:
        quantization.set_mode(observing=False, quantizing=False)
    try:
        return dict(subject.validate())
    finally:
        for quantization, (observing, quantizing) in zip(quantizations, modes, strict=True):
            quantization.set_mode(observing=observing, quantizing=quantizing)


class _FileInstead:
    """A loaded file called as the network is, in batches of the size that it takes."""

    def __init__(self, runner: LoadedFile, network: nn.Module, example: ExampleInputs) -> None:
        self._runner = runner
        with torch.no_grad(), evaluating(network):
            _, self._spec = FlatCall(network, example).outputs_of(flat_inputs(example))

    def forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        inputs: ExampleInputs = kwargs or args
        present = infer_batch_size(inputs)
        size = self._runner.batch_size or present
        whole = flat_inputs(with_batch_size(inputs, -(-present // size) * size))
        parts = [
            self._runner(tuple(x[i : i + size] for x in whole)) for i in range(0, present, size)
        ]
        outputs = [torch.cat(part)[:present] for part in zip(*parts, strict=True)]
        return tree_unflatten(outputs, self._spec)


def _shown(
    done: ExportedFile | FastestFile, metrics: Mapping[str, float], scored: Mapping[str, float]
) -> str:
    text = str(done)
    if scored:
        rows = [(name, f"{v:.4f}", f"{scored[name]:.4f}") for name, v in metrics.items()]
        text += "\n\n" + "\n".join(aligned(("validation", "torch", "file"), rows))
    return text

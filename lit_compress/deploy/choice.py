"""Export a quantized network in several forms, time them on this machine, keep the fastest.

Whether integers pay depends on the kernels of a runtime and on the processor: without VNNI they
gain half as much, and an activation without an integer kernel can cost more than its layer saves.
What is chosen here is the choice of the machine on which it was measured.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from lit_compress.compress.quantization.integers import Spelling
from lit_compress.compress.quantization.network import is_quantized, quantized_network
from lit_compress.deploy.benchmark import benchmark_files
from lit_compress.deploy.export import ExportedFile, export_as, integer_spelling
from lit_compress.deploy.parity import ParityError, ParityTolerance
from lit_compress.deploy.route import ExportError, Target
from lit_compress.deploy.runtimes import route_to
from lit_compress.files import replacing
from lit_compress.measure.inputs import ExampleInputs, infer_batch_size
from lit_compress.measure.table import aligned

__all__ = ["FastestFile", "export_fastest", "forms_for"]


@dataclass(frozen=True)
class FastestFile:
    """What was kept of several forms of a network.

    Attributes:
        file: The file that was kept.
        form: Which one it is, by the names of :func:`forms_for`.
        median_ms: By form, how long one batch took, in turns.
        refused: By form that was not timed, why.
    """

    file: ExportedFile
    form: str
    median_ms: Mapping[str, float]
    refused: Mapping[str, str]

    def __str__(self) -> str:
        """The file, the times, and whose they are."""
        rows = [
            (form + (" (kept)" if form == self.form else ""), f"{time:.3f}")
            for form, time in self.median_ms.items()
        ]
        lines = [str(self.file), "", *aligned(("timed on this machine", "median ms"), rows)]
        lines += [f"{form} was not timed: {why}" for form, why in self.refused.items()]
        return "\n".join(lines)


def forms_for(target: Target, assume_vnni: bool = False) -> dict[str, Spelling | None]:
    """The forms of a quantized network that are tried for a target, by name.

    Returns:
        ``"integers"``: as :func:`~lit_compress.deploy.export` writes it; ``"activations in
        float"``: SiLU, hardswish and sigmoids as one operator on real numbers, whose gate is not
        rounded as it is in training; ``"float"``: no integers, which is ``None``.
    """
    spelling = integer_spelling(target, assume_vnni)
    forms = {"integers": spelling, "activations in float": replace(spelling, gates="whole")}
    return {**forms, "float": None}


def export_fastest(
    network: nn.Module,
    target: Target,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    check_inputs: Sequence[ExampleInputs] | None = None,
    tolerance: ParityTolerance | None = None,
    num_threads: int = 1,
    rounds: int = 30,
    assume_vnni: bool = False,
) -> FastestFile:
    """Write a quantized network in each form, and keep the fastest that computes what torch does.

    Args:
        network: A quantized network; unchanged.
        target: As in :func:`~lit_compress.deploy.export`.
        path: Likewise; only the form that is kept gets this name.
        example_inputs: Likewise; the batch that is timed.
        check_inputs: Likewise.
        tolerance: Likewise; forms with integers are compared with the quantized network, the one
            without with what the network computes without its quantizers.
        num_threads: Threads of the runtime.
        rounds: Calls timed of each form, at least 2.
        assume_vnni: As in :func:`~lit_compress.deploy.export`.

    Returns:
        The file, and all times.

    Raises:
        ExportError: If the runtime takes no form.
        MissingExtra: If the runtime is not installed.
        ParityError: If every form that it takes differs too much.
        ValueError: If the network is not quantized, or as in :func:`~lit_compress.deploy.export`.
    """
    if not is_quantized(network):
        raise ValueError(
            f"{type(network).__name__} is a network of floats, of which there is one form; use "
            "export, or quantize it first."
        )
    route = route_to(target)
    written: dict[str, ExportedFile] = {}
    errors: dict[str, ExportError | ParityError] = {}
    with tempfile.TemporaryDirectory() as folder:
        for form, spelling in forms_for(target, assume_vnni).items():
            if form == "activations in float" and not _are_others(network, target):
                continue
            try:
                written[form] = export_as(
                    network, target, Path(folder, form.replace(" ", "_")), example_inputs, spelling,
                    check_inputs=check_inputs, tolerance=tolerance, num_threads=num_threads,
                )  # fmt: skip
            except (ExportError, ParityError) as error:
                errors[form] = error
        if not written:
            raise next((e for e in errors.values() if isinstance(e, ParityError)),
                       next(iter(errors.values())))  # fmt: skip
        batch_size = infer_batch_size(example_inputs)
        times = benchmark_files(
            [file.path for file in written.values()],
            example_inputs,
            threads=[num_threads],
            batch_sizes=[batch_size],
            rounds=rounds,
            memory=False,
        )
        medians = {
            form: times.row(file.path.name, num_threads, batch_size).median_ms
            for form, file in written.items()
        }
        form = min(medians, key=medians.__getitem__)
        place = Path(path)
        place = (
            place if place.suffix == route.suffix else place.with_name(place.name + route.suffix)
        )
        with replacing(place, *route.companions) as temporary:
            parts = zip(route.files_of(written[form].path), route.files_of(temporary), strict=True)
            for source, part in parts:
                part.write_bytes(source.read_bytes())
    said = {form: str(error).partition("\n")[0] for form, error in errors.items()}
    return FastestFile(replace(written[form], path=place), form, medians, said)


def _are_others(network: nn.Module, target: Target) -> bool:
    """Whether activations are written otherwise by default, and there are any."""
    is_default = route_to(target).spelling.gates == "whole"
    return not is_default and bool(quantized_network(network).placement.gates)

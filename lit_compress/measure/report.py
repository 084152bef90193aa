"""CompressionReport: a dense model against its compressed form."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lit_compress.files import write_text
from lit_compress.measure.measures import ModelMeasures
from lit_compress.measure.table import (
    aligned,
    count,
    markdown,
    megabytes,
    metric_rows,
    millions,
    paired_latency,
    percent,
    quantities,
    shown,
)
from lit_compress.plain import SavedAsJSON

_FEWEST_ZEROS = 0.001  # more zeros than training leaves by chance


@dataclass(frozen=True)
class CompressionReport(SavedAsJSON):
    """A dense model against its compressed form.

    ``print(report)`` shows an aligned table with the findings below it. Sizes and times change by
    a ratio, compressed ÷ dense, written ``×0.25``; metrics by a signed difference in their unit.

    Attributes:
        dense: Measures before.
        compressed: Measures after.
        notes: What else the reader should know, one sentence each.

    Example:
        >>> from torch import nn
        >>> from lit_compress.measure.measures import measure_model
        >>> report = CompressionReport(
        ...     measure_model(nn.Linear(64, 64), name="dense"),
        ...     measure_model(nn.Linear(64, 16), name="compressed"),
        ... )
        >>> CompressionReport.from_json(report.to_json()) == report
        True
    """

    dense: ModelMeasures
    compressed: ModelMeasures
    notes: tuple[str, ...] = ()

    json_format: ClassVar[str] = "lit-compress report 1"
    json_name: ClassVar[str] = "a compression report"
    json_computed: ClassVar[tuple[str, ...]] = ("findings",)

    @property
    def findings(self) -> tuple[str, ...]:
        """Sentences computed from the measures, first of all when zeros save no work."""
        masks = _masks_alone(self.dense, self.compressed)
        latency = _unproven_latency(self.dense, self.compressed)
        return (*latency,) if masks is None else (masks, *latency)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table as text: measure, dense, compressed, change."""
        dense, compressed = self.dense, self.compressed
        zeros = (
            "zeros in weights",
            shown(dense.sparsity, percent),
            shown(compressed.sparsity, percent),
            "",
        )
        measured = [quantity.row() for quantity in quantities(dense, compressed)]
        return [zeros, *measured, *metric_rows(dense, compressed)]

    def kept(self) -> dict[str, float]:
        """Compressed ÷ dense of every size, work, time and memory known of both, by label."""
        known = quantities(self.dense, self.compressed)
        return {quantity.label: quantity.kept for quantity in known if quantity.kept is not None}

    def __str__(self) -> str:
        header = ("", self.dense.name, self.compressed.name, "change")
        remarks = [
            textwrap.fill(remark, width=88, initial_indent="* ", subsequent_indent="  ")
            for remark in (*self.findings, *self.notes)
        ]
        return "\n".join([*aligned(header, self.rows()), *remarks])

    def to_markdown(self) -> str:
        """The table, the findings and a table of all layers, as GitHub-flavoured Markdown."""
        header = ("", self.dense.name, self.compressed.name, "change")
        layer_header = (
            "layer",
            "type",
            "MACs",
            "parameters",
            "non-zero",
            "zeros in weights",
        )
        layers = [
            (
                layer.name or "(itself)",
                layer.type,
                shown(layer.macs, count),
                count(layer.num_params),
                count(layer.num_nonzero_params),
                shown(layer.sparsity, percent),
            )
            for layer in self.compressed.layers
        ]
        blocks = [
            "# Compression report",
            markdown(header, self.rows()),
            *(f"> {remark}" for remark in (*self.findings, *self.notes)),
            f"## Layers of {self.compressed.name}",
            markdown(layer_header, layers),
        ]
        return "\n\n".join(blocks) + "\n"

    def save_markdown(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_markdown` to a file, whole or not at all, and return its path."""
        return write_text(path, self.to_markdown())


def _masks_alone(dense: ModelMeasures, compressed: ModelMeasures) -> str | None:
    """The plain word on zeros that no dense kernel skips; None where more than masks changed."""
    more_zeros = (compressed.sparsity or 0.0) - (dense.sparsity or 0.0)
    macs_known = dense.macs is not None and compressed.macs is not None
    if (
        more_zeros < _FEWEST_ZEROS
        or compressed.num_params != dense.num_params
        or compressed.size_bytes < 0.99 * dense.size_bytes
        or (macs_known and compressed.macs != dense.macs)
    ):
        return None
    work = f" ({shown(dense.macs, millions)} before and after)" if macs_known else ""
    sizes = ", ".join(
        f"{codec} {megabytes(before)} to {megabytes(compressed.compressed_size_bytes[codec])}"
        for codec, before in dense.compressed_size_bytes.items()
        if codec in compressed.compressed_size_bytes
    )
    return (
        f"Masks alone give no speed-up: {shown(compressed.sparsity, percent)} of the weights are "
        "zero, but zeros are stored and multiplied like any other number. The MACs are "
        f"the same{work} and the dense runtimes gain nothing. What is gained is compressed size"
        f"{f' ({sizes})' if sizes else ''}; speed needs a sparse runtime or channel pruning."
    )


def _unproven_latency(dense: ModelMeasures, compressed: ModelMeasures) -> Iterator[str]:
    """A sentence on each pair of times whose 10-90 % ranges overlap."""
    for label, before, after in paired_latency(dense, compressed):
        if before and after and before.p10_ms <= after.p90_ms and after.p10_ms <= before.p90_ms:
            yield (
                f"No difference shown in {label}: the ranges of 10 to 90 % overlap "
                f"({before.p10_ms:.3f} to {before.p90_ms:.3f} ms and "
                f"{after.p10_ms:.3f} to {after.p90_ms:.3f} ms)."
            )

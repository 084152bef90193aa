"""PostTrainingResult: validation and size before and after quantization, as data and as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

from lit_compress.compress.quantization.post_training import PostTrainingOutcome
from lit_compress.measure.table import TIMES, UNKNOWN, aligned, megabytes, shown

__all__ = ["PostTrainingResult"]


@dataclass(frozen=True)
class PostTrainingResult:
    """The validation and the size of a network before and after its quantization.

    ``print(result)`` shows it as a table.

    Attributes:
        method: How it was quantized, in words.
        metrics_before: What validation logs of the float network; empty without validation.
        metrics_after: The same of the quantized one.
        size_bytes_before: Bytes of its tensors.
        size_bytes_after: The same where quantized weights take as many bits as they have, with
            their scales. A packed or exported file reaches it; a checkpoint of fake-quantized
            weights, which are floats on a grid, does not.
        quantized: Names of the layers that were quantized; empty where it is the whole network.
        floating: Layers that stay in floating point, and why.
        remarks: What corrections and formats have to say.
        num_calibration_batches: Batches of training data that were used.
        checkpoint: Path of the checkpoint that was saved; ``None`` if none was.
    """

    method: str
    metrics_before: Mapping[str, float]
    metrics_after: Mapping[str, float]
    size_bytes_before: int
    size_bytes_after: int
    quantized: tuple[str, ...] = ()
    floating: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    num_calibration_batches: int = 0
    checkpoint: str | None = None

    @classmethod
    def of(
        cls,
        method: str,
        outcome: PostTrainingOutcome,
        metrics: tuple[Mapping[str, float], Mapping[str, float]],
        sizes: tuple[int, int],
    ) -> PostTrainingResult:
        """The result of an outcome, with metrics and sizes before and after."""
        return cls(
            method, *metrics, *sizes, outcome.quantized, outcome.floating, outcome.remarks,
            outcome.num_batches,
        )  # fmt: skip

    @property
    def difference(self) -> dict[str, float]:
        """By metric that both have: after minus before."""
        before, after = self.metrics_before, self.metrics_after
        return {name: after[name] - before[name] for name in before if name in after}

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The table as text: measure, before, after, change."""
        rows = []
        for name in dict.fromkeys((*self.metrics_before, *self.metrics_after)):
            before, after = self.metrics_before.get(name), self.metrics_after.get(name)
            change = f"{self.difference[name]:+.4f}" if name in self.difference else UNKNOWN
            rows.append(
                (name, shown(before, "{:.4f}".format), shown(after, "{:.4f}".format), change)
            )
        ratio = self.size_bytes_after / max(self.size_bytes_before, 1)
        sizes = megabytes(self.size_bytes_before), megabytes(self.size_bytes_after)
        return [*rows, ("size of tensors", *sizes, f"{TIMES}{ratio:.3g}")]

    def __str__(self) -> str:
        header = ("", "before", "after", "change")
        what = f"{len(self.quantized)} layers" if self.quantized else "the network"
        lines = [f"Quantized {what}: {self.method}.", "", *aligned(header, self.rows())]
        if not self.metrics_before:
            lines.append("There is no validation, so nothing is known of its accuracy.")
        if self.floating:
            lines += ["", "Layers left in floating point:"]
            lines += [f"  {name or '(itself)'}: {why}" for name, why in self.floating.items()]
        for remark in self.remarks:
            lines += ["", textwrap.indent(remark, "  ")]
        if self.checkpoint is not None:
            lines += ["", f"Checkpoint: {self.checkpoint}"]
        return "\n".join(lines)

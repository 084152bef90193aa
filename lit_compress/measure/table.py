"""The rows of a report as text, aligned or in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from lit_compress.measure.latency import LatencyResult
from lit_compress.measure.measures import ModelMeasures

UNKNOWN = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"


class Quantity(NamedTuple):
    """Something measured of both models; None where it was not."""

    label: str
    dense: float | None
    compressed: float | None
    show: Callable[[float], str]

    @property
    def kept(self) -> float | None:
        """Compressed ÷ dense; None where either is unknown or the dense one is zero."""
        if not self.dense or self.compressed is None:
            return None
        return self.compressed / self.dense

    def row(self) -> tuple[str, str, str, str]:
        """Label, dense, compressed and their ratio, as text."""
        ratio = UNKNOWN if self.kept is None else f"{TIMES}{self.kept:.3g}"
        return (self.label, shown(self.dense, self.show), shown(self.compressed, self.show), ratio)


def quantities(dense: ModelMeasures, compressed: ModelMeasures) -> list[Quantity]:
    """Sizes, work, times and memory of both, in the order of the report."""
    codecs = dict.fromkeys((*dense.compressed_size_bytes, *compressed.compressed_size_bytes))
    return [
        Quantity("parameters", dense.num_params, compressed.num_params, count),
        Quantity(
            "non-zero parameters", dense.num_nonzero_params, compressed.num_nonzero_params, count
        ),
        Quantity("MACs", dense.macs, compressed.macs, millions),
        Quantity("size", dense.size_bytes, compressed.size_bytes, megabytes),
        *(
            Quantity(
                f"size, {codec}",
                dense.compressed_size_bytes.get(codec),
                compressed.compressed_size_bytes.get(codec),
                megabytes,
            )
            for codec in codecs
        ),
        *(
            Quantity(label, _median(before), _median(after), "{:,.3f} ms".format)
            for label, before, after in paired_latency(dense, compressed)
        ),
        Quantity("peak memory", dense.peak_memory_bytes, compressed.peak_memory_bytes, megabytes),
    ]


def metric_rows(dense: ModelMeasures, compressed: ModelMeasures) -> list[tuple[str, str, str, str]]:
    """One row a metric; its change is the difference, in the metric's own unit."""
    rows = []
    for name in dict.fromkeys((*dense.metrics, *compressed.metrics)):
        before, after = dense.metrics.get(name), compressed.metrics.get(name)
        change = UNKNOWN if before is None or after is None else f"{after - before:+.4f}"
        show = "{:.4f}".format
        rows.append((name, shown(before, show), shown(after, show), change))
    return rows


def paired_latency(
    dense: ModelMeasures, compressed: ModelMeasures
) -> list[tuple[str, LatencyResult | None, LatencyResult | None]]:
    """Latencies of the same threads, batch and device side by side, with a label."""

    def by_label(measures: ModelMeasures) -> dict[str, LatencyResult]:
        return {
            f"latency, {result.num_threads} thread{'s' if result.num_threads > 1 else ''}, "
            f"batch {result.batch_size}, {result.device}": result
            for result in measures.latency or ()
        }

    before, after = by_label(dense), by_label(compressed)
    labels = [*dict.fromkeys((*before, *after))] or ["latency"]
    return [(label, before.get(label), after.get(label)) for label in labels]


def _median(result: LatencyResult | None) -> float | None:
    return None if result is None else result.median_ms


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of plain text: the first column to the left, the others to the right."""
    table = [header, *rows]
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    first, *others = widths
    lines = [
        "  ".join(
            [row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], others, strict=True))]
        ).rstrip()
        for row in table
    ]
    return [lines[0], "-" * (sum(widths) + 2 * len(others)), *lines[1:]]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub-flavoured Markdown table."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---" + "|---:" * (len(header) - 1) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def shown(value: float | None, show: Callable[[float], str]) -> str:
    """The value as text, or a dash where it is unknown."""
    return UNKNOWN if value is None else show(value)


def count(value: float) -> str:
    """A number of things: ``272,474``."""
    return f"{value:,.0f}"


def millions(value: float) -> str:
    """A number of MACs: ``1,814.073 M``, ``589,824``."""
    return f"{value / 1e6:,.3f} M" if value >= 1e6 else count(value)


def megabytes(value: float) -> str:
    """Bytes in units of 10⁶ or 10³: ``1.096 MB``, ``20.10 kB``."""
    return f"{value / 1e6:,.3f} MB" if value >= 1e5 else f"{value / 1e3:,.2f} kB"


def percent(fraction: float) -> str:
    """A fraction as ``90.00 %``."""
    return f"{100 * fraction:.2f} %"

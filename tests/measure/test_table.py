import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_compress.measure.latency import LatencyResult
from lit_compress.measure.measures import measure_model
from lit_compress.measure.table import (
    TIMES,
    UNKNOWN,
    Quantity,
    aligned,
    count,
    markdown,
    megabytes,
    metric_rows,
    millions,
    paired_latency,
    percent,
)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (count(272_474), "272,474"),
        (millions(1_814_073_344), "1,814.073 M"),
        (millions(589_824), "589,824"),
        (megabytes(44_804_000), "44.804 MB"),
        (megabytes(1957), "1.96 kB"),
        (percent(0.9), "90.00 %"),
    ],
)
def test_units(shown: str, text: str) -> None:
    assert shown == text


@pytest.mark.parametrize(
    ("dense", "compressed", "row"),
    [
        (200, 50, ("q", "200", "50", f"{TIMES}0.25")),
        (200, 0, ("q", "200", "0", f"{TIMES}0")),
        (0, 5, ("q", "0", "5", UNKNOWN)),
        (None, 5, ("q", UNKNOWN, "5", UNKNOWN)),
        (5, None, ("q", "5", UNKNOWN, UNKNOWN)),
    ],
)
def test_the_unknown_is_a_dash_and_never_zero(dense, compressed, row) -> None:
    assert Quantity("q", dense, compressed, count).row() == row


def test_metrics_change_by_their_difference() -> None:
    dense = measure_model(nn.ReLU(), metrics={"top1": 0.885, "loss": 0.4})
    sparse = measure_model(nn.ReLU(), metrics={"top1": 0.874, "ece": 0.1})
    assert metric_rows(dense, sparse) == [
        ("top1", "0.8850", "0.8740", "-0.0110"),
        ("loss", "0.4000", UNKNOWN, UNKNOWN),
        ("ece", UNKNOWN, "0.1000", UNKNOWN),
    ]


def test_latencies_pair_by_threads_batch_and_device() -> None:
    def result(threads: int, batch: int) -> LatencyResult:
        return LatencyResult(1.0, 0.1, 0.9, 1.1, 5, threads, batch, "cpu")

    dense = measure_model(nn.ReLU(), latency=[result(1, 1), result(2, 1)])
    sparse = measure_model(nn.ReLU(), latency=[result(2, 1), result(2, 8)])
    assert paired_latency(dense, sparse) == [
        ("latency, 1 thread, batch 1, cpu", result(1, 1), None),
        ("latency, 2 threads, batch 1, cpu", result(2, 1), result(2, 1)),
        ("latency, 2 threads, batch 8, cpu", None, result(2, 8)),
    ]
    assert paired_latency(measure_model(nn.ReLU()), measure_model(nn.ReLU())) == [
        ("latency", None, None)
    ]


cells = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=9)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(cells, cells, cells), max_size=5))
def test_columns_are_aligned(rows: list[tuple[str, str, str]]) -> None:
    lines = aligned(("measure", "dense", "change"), rows)
    assert len(lines) == len(rows) + 2
    assert len({len(line) for line in lines}) == 1
    assert [tuple(line.split()) for line in lines[2:]] == rows


def test_markdown_keeps_bars_inside_cells() -> None:
    table = markdown(("a", "b"), [("x|y", "1")])
    assert table.splitlines() == ["| a | b |", "|---|---:|", r"| x\|y | 1 |"]

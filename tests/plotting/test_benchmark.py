"""The figure of a benchmark: a panel a batch size, a bar a file and number of threads."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lit_compress.deploy import BenchmarkResult, FileLatency, MeasuredFile
from lit_compress.plotting import plot_benchmark


def latency(file: str, threads: int, batch_size: int, median: float) -> FileLatency:
    times = (median, median - 0.5, median + 1.5)
    return FileLatency(file, threads, batch_size, *times, 1000 * batch_size / median, 1, 1, 1)


def test_bars_are_medians_and_lines_are_quartiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path: (drawn.append(self), save(self, path))
    )
    files = (MeasuredFile("a.onnx", "onnx", None, 9, 9), MeasuredFile("b.pte", "et", 1, 9, 9))
    rows = (
        latency("a.onnx", 1, 1, 2.0),
        latency("b.pte", 1, 1, 1.0),
        latency("a.onnx", 4, 1, 0.75),
        latency("a.onnx", 1, 8, 8.0),
    )
    written = plot_benchmark(BenchmarkResult(files, rows, {}), str(tmp_path / "new" / "x.png"))
    assert written == tmp_path / "new" / "x.png"
    assert written.read_bytes().startswith(b"\x89PNG")

    one, eight = drawn[0].axes
    assert [axes.get_title() for axes in (one, eight)] == ["batch 1", "batch 8"]
    assert [bar.get_width() for bar in one.patches] == [2.0, 1.0, 0.75]
    assert [text.get_text() for text in one.get_legend().get_texts()] == ["1 thread", "4 threads"]
    assert [text.get_text() for text in one.get_yticklabels()] == ["a.onnx", "b.pte"]
    assert [bar.get_width() for bar in eight.patches] == [8.0]
    quartiles = eight.collections[0].get_segments()[0]
    assert quartiles[:, 0].tolist() == [7.5, 9.5]

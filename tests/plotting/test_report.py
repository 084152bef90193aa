"""The figures of a report: two files, their names and their sizes."""

import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lit_compress.measure.measures import measure_model
from lit_compress.measure.report import CompressionReport
from lit_compress.plotting import plot_report


def report(layers: int = 2, metrics: bool = True) -> CompressionReport:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    scores = {"top1": 0.9} if metrics else {}
    measures = measure_model(model, torch.zeros(1, 4), metrics=scores)
    return CompressionReport(measures, measures)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_a_folder_gets_two_pictures(tmp_path: Path) -> None:
    written = plot_report(report(), tmp_path / "new" / "plots")
    assert [path.name for path in written] == ["summary.png", "layers.png"]
    assert [path.parent for path in written] == [tmp_path / "new" / "plots"] * 2
    assert png_size(written[0]) == (1200, 480)


def test_a_file_name_gives_the_names(tmp_path: Path) -> None:
    written = plot_report(report(metrics=False), tmp_path / "run.png")
    assert [path.name for path in written] == ["run-summary.png", "run-layers.png"]
    assert png_size(written[0])[0] < 1200  # no panel for metrics


def test_more_layers_make_a_taller_picture_up_to_a_limit(tmp_path: Path) -> None:
    heights = [png_size(plot_report(report(n), tmp_path / str(n))[1])[1] for n in (20, 40, 90)]
    assert heights[0] < heights[1] < heights[2] <= 1600


def test_without_weights_there_is_still_a_picture(tmp_path: Path) -> None:
    measures = measure_model(nn.ReLU())
    assert png_size(plot_report(CompressionReport(measures, measures), tmp_path)[1])[0] > 0


def test_without_matplotlib_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lit-compress\[report\]'"):
        plot_report(report(), tmp_path / "plots")
    assert not (tmp_path / "plots").exists()

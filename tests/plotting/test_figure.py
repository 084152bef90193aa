"""Figures without a display, without pyplot, and without matplotlib."""

import struct
import sys
from pathlib import Path

import pytest

from lit_compress.plotting.figure import new_figure, save_figure


def test_the_size_is_in_inches_and_folders_are_made(tmp_path: Path) -> None:
    path = save_figure(new_figure(2, 1.5), str(tmp_path / "new" / "x.png"))
    assert path == tmp_path / "new" / "x.png"
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (240, 180)


def test_panels_have_no_frame_at_top_and_right(tmp_path: Path) -> None:
    figure = new_figure(2, 1)
    panels = figure.subplots(1, 2)
    save_figure(figure, tmp_path / "x.png")
    for axes in panels:
        seen = {side: spine.get_visible() for side, spine in axes.spines.items()}
        assert seen == {"left": True, "bottom": True, "top": False, "right": False}


def test_pyplot_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    assert save_figure(new_figure(1, 1), tmp_path / "x.png").is_file()


@pytest.mark.parametrize("missing", ["matplotlib.figure", "matplotlib.backends.backend_agg"])
def test_without_matplotlib_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lit-compress\[report\]'"):
        new_figure(1, 1)

"""The figure of a sensitivity analysis: its panels, and metrics that were not logged."""

import pytest
from matplotlib.image import imread

from lit_compress.compress.channels.groups import ChannelGroup
from lit_compress.plotting import plot_sensitivity
from lit_compress.search.sensitivity_result import SensitivityPoint, SensitivityResult


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("count", [2, 30])
def test_the_figure_has_a_panel_a_metric_and_way(tmp_path, tuned, count):
    points = tuple(
        SensitivityPoint(f"g{i}", 32, {"a": 0.5, "b": 1.0}, {"a": 0.6, "b": 2.0} if tuned else None)
        for i in range(count)
    )
    groups = tuple(ChannelGroup(f"g{i}", 64) for i in range(count))
    base = SensitivityPoint("", 64, {"a": 0.9, "b": 0.1}, {"a": 1, "b": 0} if tuned else None)
    result = SensitivityResult(groups, (0.5,), base, points, {})
    height, width = imread(plot_sensitivity(result, tmp_path / "all.png")).shape[:2]
    assert (height > 800) == tuned
    assert imread(plot_sensitivity(result, tmp_path / "one.png", ("a",))).shape[1] < width
    with pytest.raises(ValueError, match="'c' is not logged"):
        plot_sensitivity(result, tmp_path / "c.png", ("c",))
    assert not (tmp_path / "c.png").exists()

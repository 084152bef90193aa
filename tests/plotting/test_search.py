"""The figure of a search: drawn from every kind of result, with all that it promises."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_compress.plotting import plot_search
from lit_compress.search.problem import Decision
from lit_compress.search.search_result import Episode, SearchResult

SOURCES = ("uniform", "deep", "shallow", "ddpg", "ddpg", "mine")


def searched(num_decisions: int = 3, **changes: Any) -> SearchResult:
    """Rewards .1, .2, ... by source; the last but one failed, the last was given up."""
    decisions = tuple(Decision(f"layer{i}", (8.0, 16.0, 32.0), 32.0) for i in range(num_decisions))
    episodes = [
        Episode(i, s, (i % 3,) * num_decisions, 0.1 * i, 0.1 * i, {"macs": i + 1.0}, True, None, 1)
        for i, s in enumerate(SOURCES)
    ]
    failed = replace(episodes[0], number=6, score=math.nan, reward=math.nan, failure="no", costs={})
    given_up = replace(episodes[0], number=7, score=0.9, reward=0.9, complete=False)
    made = SearchResult(
        "channels",
        decisions,
        "val_acc",
        "max",
        0.95,
        {"macs": 10.0},
        ("macs", 5.0),
        "score",
        (*episodes, failed, given_up),
        5,
        {},
    )
    return replace(made, **changes)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved while a test runs."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    save = Figure.savefig

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return saved


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_three_panels_show_what_was_found(tmp_path: Path, figures: list[Any]):
    from matplotlib.image import imread

    path = plot_search(searched(), tmp_path / "new" / "search.png")
    assert path == tmp_path / "new" / "search.png"
    pixels = imread(path)[..., :3]
    assert pixels.shape[1] > 1000
    assert len({tuple(color) for color in pixels[::4, ::4].reshape(-1, 3).round(1)}) > 10

    layers, rewards, scores = figures[0].axes
    assert [bar.get_height() for bar in layers.patches] == [100.0] * 3  # mine: (2, 2, 2)
    assert sorted(labels(layers)) == ["deep", "shallow", "the winner (mine)", "uniform"]
    steps = {line.get_label(): list(line.get_ydata()) for line in layers.lines}
    assert steps == {"uniform": [25] * 3, "deep": [50] * 3, "shallow": [100] * 3}
    assert [text.get_text() for text in layers.get_xticklabels()] == ["layer0", "layer1", "layer2"]

    curves = {line.get_label(): line for line in rewards.lines}
    assert list(curves["best so far"].get_ydata()) == list(searched().running_best())
    assert list(curves["failed"].get_xdata()) == [6]

    marks = {line.get_label(): line for line in scores.lines}
    assert list(marks["dense"].get_ydata()) == [0.95, 0.95]
    assert list(marks["budget"].get_xdata()) == [50.0, 50.0]
    assert marks["mine, the winner"].get_xydata().tolist() == [[60.0, 0.5]]
    assert marks["deep"].get_xydata().tolist() == [[20.0, 0.1]]
    assert scores.get_xlabel() == "macs, % of the dense model"


def test_given_up_episodes_are_faint(tmp_path: Path, figures: list[Any]):
    plot_search(searched(), tmp_path / "search.png")
    for axes in figures[0].axes[1:]:
        faint = [dots for dots in axes.collections if dots.get_alpha() < 0.5]
        assert [len(dots.get_offsets()) for dots in faint] == [1]
        drawn = sum(len(dots.get_offsets()) for dots in axes.collections)
        assert drawn == 7  # all but the failed one


def test_the_winner_is_not_drawn_twice(tmp_path: Path, figures: list[Any]):
    plot_search(searched(best=1), tmp_path / "search.png")
    assert sorted(labels(figures[0].axes[0])) == ["shallow", "the winner (deep)", "uniform"]


def test_a_winner_with_less_reward_than_its_source_is_marked_too(
    tmp_path: Path, figures: list[Any]
):
    """As where the cheapest within a tolerance wins."""
    plot_search(searched(best=3), tmp_path / "search.png")
    marks = {line.get_label(): line for line in figures[0].axes[2].lines}
    assert marks["ddpg, the winner"].get_xydata()[0] == pytest.approx([40.0, 0.3])
    assert marks["ddpg"].get_xydata()[0] == pytest.approx([50.0, 0.4])


def test_bits_are_drawn_as_bits(tmp_path: Path, figures: list[Any]):
    decisions = tuple(Decision(n, (2.0, 3.0, 4.0), 8.0) for n in "abc")
    plot_search(searched(space="bits", decisions=decisions), tmp_path / "search.png")
    layers = figures[0].axes[0]
    assert [bar.get_height() for bar in layers.patches] == [4.0] * 3
    assert layers.get_ylabel() == "bits"
    assert layers.get_ylim()[1] > 8


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": None},
        {"budget": None, "dense_costs": {}},
        {"dense_costs": {"macs": 0.0}},
        {"best": None, "episodes": ()},
        {"dense_score": math.nan, "space": "sparsity", "reward": "error_log_macs"},
    ],
)
def test_what_is_missing_is_left_out(tmp_path: Path, figures: list[Any], changes: dict[str, Any]):
    assert plot_search(searched(**changes), tmp_path / "search.png").stat().st_size > 10_000
    layers, _, scores = figures[0].axes
    if changes.get("best", 0) is None:
        assert [text.get_text() for text in layers.texts] == ["no episode finished"]
    if scores.get_legend() is not None and "budget" in changes:
        assert "budget" not in labels(scores)
    assert ("no cost" in scores.get_xlabel()) == (changes.get("dense_costs") == {})


def test_many_layers_go_without_names(tmp_path: Path, figures: list[Any]):
    plot_search(searched(70), tmp_path / "search.png")
    assert figures[0].axes[0].get_xlabel() == "layer, in forward order"
    assert figures[0].get_size_inches()[0] > 20

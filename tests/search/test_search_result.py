"""What a search found: the winner in each space's own words, files and tables."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.compress.channels.plan import ChannelPlan
from lit_compress.search.problem import Decision
from lit_compress.search.search_result import (
    Episode,
    SearchResult,
    decision_rows,
    episode_rows,
    source_rows,
)

DENSE = {"macs": 4e6, "num_params": 1000.0}
CHANNELS = (Decision("stem", (8.0, 16.0), 16.0, (0.0, 0.5)), Decision("body", (8.0, 16.0), 32.0))
SPARSITY = (Decision("stem", (0.25, 1.0), 1.0), Decision("body", (0.125, 0.5), 1.0))
BITS = (Decision("stem", (2.0, 8.0), 8.0), Decision("body", (3.0, 4.0), 8.0))


def episode(number: int, reward: float = 0.5, **changes: Any) -> Episode:
    made = Episode(number, "ddpg", (1, 0), reward, reward, {"macs": 2e6}, True, None, 1.5)
    return replace(made, **changes)


FAILED = episode(3, math.nan, costs={}, complete=False, failure="the loss is NaN")
EPISODES = (
    episode(0, 0.6, source="uniform", choice=(0, 1)),
    episode(1, 0.95, complete=False),
    episode(2, 0.8, costs={"macs": 1.5e6, "num_params": 400.0}),
    FAILED,
    episode(4, 0.7),
)


def result(**changes: Any) -> SearchResult:
    made = SearchResult(
        space="channels",
        decisions=CHANNELS,
        metric="val_acc",
        mode="max",
        dense_score=0.9,
        dense_costs=DENSE,
        budget=("macs", 2e6),
        reward="score",
        episodes=EPISODES,
        best=2,
        setting={"seed": "1"},
    )
    return replace(made, **changes)


# --- The winner -----------------------------------------------------------------------------------


def test_channels_become_a_plan():
    found = result()
    assert found.best_episode is EPISODES[2]
    assert found.values == {"stem": 16, "body": 8}
    assert found.preserve_ratios == {"stem": 1.0, "body": 0.25}
    assert found.plan == ChannelPlan({"stem": 16, "body": 8}, {"stem": 16, "body": 32})


def test_densities_become_sparsities():
    found = result(space="sparsity", decisions=SPARSITY)
    assert found.sparsities == {"stem": 0.0, "body": 0.875}


def test_bits_are_whole():
    bits = result(space="bits", decisions=BITS).layer_bits
    assert bits == {"stem": 8, "body": 3}
    assert all(type(number) is int for number in bits.values())


@pytest.mark.parametrize(
    ("space", "decisions", "asked", "right"),
    [
        ("channels", CHANNELS, "sparsities", "plan"),
        ("channels", CHANNELS, "layer_bits", "plan"),
        ("sparsity", SPARSITY, "plan", "sparsities"),
        ("bits", BITS, "plan", "layer_bits"),
    ],
)
def test_the_wrong_question_is_sent_to_the_right_one(space, decisions, asked, right):
    found = result(space=space, decisions=decisions)
    with pytest.raises(ValueError, match=f"over {space}, so it found no {asked}; ask for {right}"):
        getattr(found, asked)


@pytest.mark.parametrize("asked", ["best_episode", "values", "preserve_ratios", "plan"])
def test_without_a_winner_the_failures_are_told(asked):
    none = result(episodes=(episode(1, complete=False), FAILED), best=None)
    with pytest.raises(ValueError, match=r"none of 2 episodes finished \(1 failed, 1 were given"):
        getattr(none, asked)
    with pytest.raises(ValueError, match="The last failure: the loss is NaN"):
        getattr(none, asked)


# --- All episodes ---------------------------------------------------------------------------------


def test_episodes_are_counted():
    found = result()
    assert (found.num_failed, found.num_given_up, found.cpu_seconds) == (1, 1, 7.5)
    assert [e.number for e in EPISODES if e.finished] == [0, 2, 4]
    assert not episode(0, math.nan).finished


def test_cost_ratios_are_nan_where_unknown():
    found = result(dense_costs={**DENSE, "weights": 0.0})
    assert found.cost_ratio(EPISODES[2], "macs") == 0.375
    assert math.isnan(found.cost_ratio(EPISODES[0], "num_params"))  # the candidate's
    assert math.isnan(found.cost_ratio(EPISODES[2], "latency_ms"))  # both
    assert math.isnan(found.cost_ratio(EPISODES[2], "weights"))  # nothing to divide by


def test_the_best_of_each_source_comes_by_falling_reward():
    best = result().best_by_source()
    assert {source: e.number for source, e in best.items()} == {"ddpg": 2, "uniform": 0}
    assert list(best) == ["ddpg", "uniform"]


def test_the_first_of_equals_stays():
    found = result(episodes=(episode(0), episode(1)), best=0)
    assert found.best_by_source()["ddpg"].number == 0


numbers = st.floats(allow_nan=True, allow_infinity=True)
many = st.lists(
    st.builds(
        episode,
        st.just(0),
        numbers,
        source=st.sampled_from(["uniform", "ddpg", "mine"]),
        choice=st.tuples(st.integers(0, 1), st.integers(0, 1)),
        score=numbers,
        costs=st.dictionaries(st.sampled_from([*DENSE, "latency_ms"]), numbers),
        complete=st.booleans(),
        failure=st.none() | st.text(),
        seconds=st.floats(0, 1e6),
    ),
    max_size=6,
).map(lambda made: tuple(replace(one, number=2 * i) for i, one in enumerate(made)))


def won(episodes: tuple[Episode, ...]) -> SearchResult:
    finished = [one for one in episodes if one.finished]
    best = max(finished, key=lambda one: one.reward).number if finished else None
    return result(episodes=episodes, best=best)


@settings(deadline=None, max_examples=60)
@given(many)
def test_the_running_best_never_falls_and_ends_at_the_winner(episodes):
    found = won(episodes)
    running = found.running_best()
    assert len(running) == len(episodes)
    known = [best for best in running if not math.isnan(best)]
    assert known == sorted(known)
    if found.best is None:
        assert not known
        assert found.best_by_source() == {}
    else:
        assert known[-1] == found.best_episode.reward
        assert found.best_episode.complete
        assert next(iter(found.best_by_source().values())).reward == known[-1]
    assert all(best.finished for best in found.best_by_source().values())
    assert found.num_failed + found.num_given_up <= len(episodes)


# --- Files ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(many, st.none() | st.just(("macs", 1e6)), st.sampled_from(["max", "min"]), numbers)
def test_every_result_survives_json(episodes, budget, mode, dense_score):
    found = replace(won(episodes), budget=budget, mode=mode, dense_score=dense_score)
    text = found.to_json()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads(text, parse_constant=refuse)  # NaN and Infinity
    back = SearchResult.from_json(text)
    assert back.to_json() == text
    assert repr(back) == repr(found)  # as equality, but for NaN
    assert str(back)


def test_a_file_gives_back_what_was_saved(tmp_path):
    whole = result(episodes=(EPISODES[0], EPISODES[2]))  # NaN is not equal to itself
    path = whole.save(tmp_path / "new" / "search.json")
    assert SearchResult.load(path) == whole
    assert type(SearchResult.load(path).episodes[0].complete) is bool
    assert [file.name for file in path.parent.iterdir()] == ["search.json"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = result().save(tmp_path / "search.json")
    before = path.read_text()

    def full(source: object, target: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        result(best=4).save(path)
    assert path.read_text() == before


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = result().save(tmp_path / "search.json")
    text = path.read_text()
    for content, message in {
        text[: len(text) // 2]: "no JSON .* Was the file cut off",
        "[]": "format None; expected 'lit-compress ratio search 1', as SearchResult.save",
        text.replace("ratio search 1", "sensitivity 1"): "format 'lit-compress sensitivity 1'",
        text.replace('"reward": "score",', ""): r"lacks \['reward'\]",
        text.replace('"seed": "1"', '"seed": 1'): r"SearchResult.setting.seed is 1; expected str",
        text.replace('"space": "channels"', '"space": "depth"'): "space is 'depth'",
        text.replace('"best": 2', '"best": 3'): "number 3, which was not evaluated to its end",
    }.items():
        assert content != text
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"search.json' cannot be read as .*{message}"):
            SearchResult.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"cannot be read as the result of a ratio search: 'utf-8"):
        SearchResult.load(path)
    with pytest.raises(FileNotFoundError):
        SearchResult.load(tmp_path / "none.json")


# --- Contradictions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "depth"}, "space is 'depth'; expected 'channels' or 'sparsity' or 'bits'"),
        ({"mode": "up"}, "mode is 'up'; expected 'max' or 'min'"),
        ({"budget": ("energy", 1.0)}, "on 'energy', which is not .* these are 'macs', 'num_params"),
        ({"best": 7}, "number 7, which is not there; expected the number of an episode that"),
        ({"best": 1}, "number 1, which was not evaluated to its end"),
        ({"best": 3}, "number 3, which was not evaluated to its end"),
        ({"episodes": (episode(1), episode(1)), "best": 1}, "episode 1 comes after episode 1"),
        ({"episodes": (episode(-1),), "best": -1}, "expected rising numbers from 0"),
        ({"episodes": (episode(0, choice=(1,)),)}, "chooses 1 levels, expected 2, one for each"),
        ({"episodes": (episode(0, choice=(1, 2)),)}, "chooses level 2 of 'body', expected 0 to 1"),
        ({"episodes": (episode(0, choice=(-1, 0)),)}, "chooses level -1 of 'stem'"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        result(**changes)


# --- Tables ---------------------------------------------------------------------------------------


def test_the_table_shows_winner_costs_layers_and_sources():
    lines = str(result()).splitlines()
    assert lines[:3] == [
        "val_acc 0.9000 → 0.8000 (-0.1000), found by ddpg in episode 2",
        "budget: macs 1.500 M of at most 2.000 M, 75.0% used; reward: score",
        "5 episodes, 1 failed, 1 given up early, 7.5 s of CPU time",
    ]
    cells = [line.split() for line in lines]
    assert ["macs", "4.000", "M", "1.500", "M", "×0.375"] in cells
    assert ["num_params", "1,000", "400", "×0.4"] in cells
    assert ["stem", "16", "16", "100.0%", "█" * 20] in cells
    assert ["body", "32", "8", "25.0%", "█" * 5 + "░" * 15] in cells
    assert ["dense", "–", "0.9000", "–", "100.0%", "100.0%"] in cells
    assert ["ddpg", "2", "0.8000", "0.8000", "37.5%", "40.0%"] in cells
    assert ["uniform", "0", "0.6000", "0.6000", "50.0%", "–"] in cells


def test_the_table_without_budget_or_winner():
    assert "no budget; reward: score" in str(result(budget=None))
    none = result(episodes=(FAILED,), best=None)
    assert str(none).splitlines() == [
        "search of channels: no episode finished",
        "1 episode, 1 failed, 0 given up early, 1.5 s of CPU time",
    ]
    assert len(source_rows(none)) == 2  # the header and the dense model


@pytest.mark.parametrize(
    ("space", "decisions", "column", "stem"),
    [("sparsity", SPARSITY, "density", "0.125"), ("bits", BITS, "bits", "3")],
)
def test_layers_are_shown_in_the_words_of_the_space(space, decisions, column, stem):
    header, _, body = decision_rows(result(space=space, decisions=decisions))
    assert header[2] == column
    assert body[2] == stem


def test_what_is_nearly_nothing_still_has_a_bar():
    decisions = (Decision("stem", (0.5, 1.0), 1.0), Decision("body", (0.001, 1.0), 1.0))
    bar = decision_rows(result(space="sparsity", decisions=decisions))[2][-1]
    assert bar == "█" + "░" * 19


def test_all_episodes_are_rows_of_numbers():
    header, dense, *rows = episode_rows(result())
    assert header == [
        "episode", "source", "val_acc", "reward", "complete", "macs_ratio", "num_params_ratio",
    ]  # fmt: skip
    assert dense == [None, "dense", 0.9, None, True, 1.0, 1.0]
    assert rows == [
        [0, "uniform", 0.6, 0.6, True, 0.5, None],
        [1, "ddpg", 0.95, 0.95, False, 0.5, None],
        [2, "ddpg", 0.8, 0.8, True, 0.375, 0.4],
        [3, "ddpg", None, None, False, None, None],
        [4, "ddpg", 0.7, 0.7, True, 0.5, None],
    ]

"""Rewards, and who wins."""

import math

import pytest

from lit_compress.search.rewards import best_episode, reward_function
from lit_compress.search.search_result import Episode

COSTS = {"macs": 1000.0, "num_params": 50.0}


def episode(number, score, reward=None, macs=1.0, complete=True, failure=None):
    gained = score if reward is None else reward
    costs = {"macs": macs, "num_params": 10 - macs}
    return Episode(number, "random", (0,), score, gained, costs, complete, failure, 0.0)


# --- Rewards --------------------------------------------------------------------------------------


def test_rewards_are_their_formulas():
    assert reward_function("score")(0.8, COSTS) == 0.8
    assert reward_function("score", "min")(0.8, COSTS) == -0.8
    by_macs = reward_function("error_log_macs")(0.8, COSTS)
    assert by_macs == pytest.approx(-0.2 * math.log(1000))
    by_params = reward_function("error_log_params")(0.8, COSTS)
    assert by_params == pytest.approx(-0.2 * math.log(50))


def test_a_smaller_model_of_the_same_error_is_worth_more():
    reward = reward_function("error_log_macs")
    assert reward(0.8, {"macs": 500.0}) > reward(0.8, COSTS) > reward(0.7, COSTS)


def test_a_function_is_taken_as_it_is():
    def own(score, costs):
        return score - costs["macs"] / 1e4

    assert reward_function(own, "min") is own


def test_unknown_and_unfit_rewards_are_refused():
    with pytest.raises(ValueError, match="reward is 'accuracy'; expected one of 'score', 'error_l"):
        reward_function("accuracy")
    with pytest.raises(ValueError, match="'error_log_macs' .* of which more is better"):
        reward_function("error_log_macs", "min")
    for score in (1.7, -0.1, 85.0):
        with pytest.raises(ValueError, match=rf"metric in \[0, 1\], and it came as {score}"):
            reward_function("error_log_macs")(score, COSTS)


# --- Winners --------------------------------------------------------------------------------------


def test_the_best_reward_wins_and_the_first_of_equals():
    episodes = [episode(0, 0.5), episode(1, 0.7), episode(2, 0.7), episode(3, 0.6)]
    assert best_episode(episodes) == 1


def test_what_did_not_finish_cannot_win():
    episodes = [
        episode(0, 0.5),
        episode(1, 0.9, complete=False),
        episode(2, math.nan, failure="RuntimeError: no"),
        episode(3, 0.9, reward=math.nan),
    ]
    assert best_episode(episodes) == 0
    assert best_episode(episodes[1:]) is None
    assert best_episode([]) is None


def test_the_cheapest_within_the_tolerance_wins():
    episodes = [
        episode(0, 0.90, macs=9.0),
        episode(1, 0.885, macs=4.0),
        episode(2, 0.889, macs=4.0),
        episode(3, 0.87, macs=1.0),
    ]
    rule = {"dense_score": 0.9}
    assert best_episode(episodes, tolerance=0.02, **rule) == 2
    assert best_episode(episodes, tolerance=0.005, **rule) == 0
    assert best_episode(episodes, tolerance=0.1, **rule) == 3
    assert best_episode(episodes, tolerance=0.1, cost="num_params", **rule) == 0


def test_without_one_in_the_tolerance_the_best_reward_wins():
    episodes = [episode(0, 0.5, macs=1.0), episode(1, 0.6, macs=2.0)]
    assert best_episode(episodes, tolerance=0.01, dense_score=0.9) == 1


def test_tolerance_where_less_is_better():
    episodes = [episode(0, 1.02, reward=-1.02, macs=4.0), episode(1, 1.5, reward=-1.5, macs=1.0)]
    rule = {"dense_score": 1.0, "mode": "min"}
    assert best_episode(episodes, tolerance=0.1, **rule) == 0
    assert best_episode(episodes, tolerance=0.6, **rule) == 1

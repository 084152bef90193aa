"""The loop: exact after a kill, alive after failures, honest about the winner."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lit_compress.search.ddpg import DDPGSettings
from lit_compress.search.evaluation import Evaluator, Scored, plain_score
from lit_compress.search.run import SearchTask, search_ratios
from lit_compress.search.searchers import DDPGSearcher, Proposal, RandomSearcher, rules_of_thumb
from tests.search.table_problems import chain_problem

PROBLEM = chain_problem((32, 64, 64), 0.5)
FREE = chain_problem((32, 64, 64), share=None)
QUICK = DDPGSettings(hidden_size=16, batch_size=8, buffer_size=100, learning_starts=5)
EPISODES = 12


class Network(nn.Module):
    """A network that only says which choice it is of."""

    def __init__(self, choice):
        super().__init__()
        self.choice = choice


class Killed(Exception):
    """What ends a process."""


class Listed:
    """Proposes given choices in turn, each by a source of its own or by one of all."""

    def __init__(self, choices, sources=None):
        self.left = [
            Proposal(choice, "list" if sources is None else sources[index])
            for index, choice in enumerate(choices)
        ]
        self.told = []

    def ask(self):
        return self.left.pop(0)

    def tell(self, proposal, reward):
        self.told.append(reward)

    def state_dict(self):
        return {"told": self.told}

    def load_state_dict(self, state):
        self.told = list(state["told"])
        del self.left[: len(self.told)]


def accuracy(choice, problem=PROBLEM):
    """In [0, 1], and worse for choices that keep little of the second layer."""
    ratios = problem.ratios(choice)
    return 1 - sum(w * (1 - r) for w, r in zip((0.1, 0.5, 0.2), ratios, strict=True))


def task_of(problem=PROBLEM, **options):
    return SearchTask("channels", problem, "val_acc", "max", 1.0, **options)


def ddpg(seed=0):
    return DDPGSearcher(PROBLEM, QUICK, seed, rules_of_thumb(PROBLEM, 1))


def evaluator(score=accuracy):
    return Evaluator(Network, plain_score(lambda network: score(network.choice)))


def racing_evaluator():
    """Scores batch after batch, so that candidates are given up."""

    def score(network, give_up=None):
        noise = torch.randn(20, generator=torch.Generator().manual_seed(sum(network.choice)))
        values = (accuracy(network.choice) + 0.02 * noise).cumsum(0) / torch.arange(1, 21)
        seen = tuple(range(10, 210, 10))
        for n in range(1, 20):
            if give_up is not None and give_up(values[:n].tolist(), seen[:n]):
                return Scored(float(values[n - 1]), (), (), complete=False)
        return Scored(float(values[-1]), tuple(values.tolist()), seen)

    return Evaluator(Network, score)


def timeless(result):
    return [replace(e, seconds=0.0) for e in result.episodes], result.best


def same(first, second):
    """Equal but for the seconds; NaN equals NaN."""
    return repr(timeless(first)) == repr(timeless(second))


# --- From the first episode to the last -----------------------------------------------------------


def test_a_search_asks_evaluates_tells_and_picks():
    seen = []
    result = search_ratios(task_of(), ddpg(), evaluator(), EPISODES, on_episode=seen.append)
    assert [e.number for e in result.episodes] == list(range(EPISODES))
    assert [len(r.episodes) for r in seen] == list(range(1, EPISODES + 1))
    assert result.episodes[0].source == "uniform"
    assert result.episodes[-1].source == "ddpg"
    for episode in result.episodes:
        assert episode.score == episode.reward == accuracy(episode.choice)
        assert episode.costs == PROBLEM.cost_of(episode.choice)
        assert episode.costs["macs"] <= PROBLEM.budget.limit
        assert episode.seconds >= 0
    assert result.best_episode.score == max(e.score for e in result.episodes)
    assert result.dense_costs == PROBLEM.full_costs
    assert result.budget == ("macs", PROBLEM.budget.limit)
    assert (result.space, result.metric, result.reward) == ("channels", "val_acc", "score")


def test_equal_searches_have_equal_results():
    first, second = (search_ratios(task_of(), ddpg(), evaluator(), EPISODES) for _ in range(2))
    assert same(first, second)


def test_processes_agree_on_what_is_tried():
    agreed = PROBLEM.scaled([1.0, 0.5, 0.5])
    tried = search_ratios(
        task_of(), ddpg(), evaluator(), 3, agree=lambda proposal: Proposal(agreed, "another")
    )
    assert [(e.choice, e.source) for e in tried.episodes] == [(agreed, "another")] * 3


# --- Interruptions --------------------------------------------------------------------------------


@pytest.mark.parametrize("killed_after", [1, 3, 5, 6, 7, 11])
@pytest.mark.parametrize("evaluator_of", [evaluator, racing_evaluator])
def test_a_killed_search_goes_on_exactly(tmp_path, killed_after, evaluator_of):
    """Among the heuristics, the random ones, and where the actor learns."""
    whole = search_ratios(task_of(), ddpg(), evaluator_of(), EPISODES)
    file = tmp_path / "deep" / "search.pt"

    def kill(result):
        if len(result.episodes) == killed_after:
            raise Killed

    with pytest.raises(Killed):
        search_ratios(task_of(), ddpg(), evaluator_of(), EPISODES, state_file=file, on_episode=kill)
    built = []
    evaluate = evaluator_of()
    evaluate._build = lambda choice: built.append(choice) or Network(choice)
    again = search_ratios(task_of(), ddpg(seed=9), evaluate, EPISODES, state_file=file)
    assert same(again, whole)
    assert not set(built) & {e.choice for e in whole.episodes[:killed_after]}
    assert [p.name for p in file.parent.iterdir()] == ["search.pt"]


def test_a_finished_search_is_read_and_a_longer_one_goes_on(tmp_path):
    file = tmp_path / "search.pt"
    short = search_ratios(task_of(), ddpg(), evaluator(), 4, state_file=file)
    assert same(search_ratios(task_of(), ddpg(), evaluator(), 4, state_file=file), short)
    longer = search_ratios(task_of(), ddpg(), evaluator(), EPISODES, state_file=file)
    assert same(longer, search_ratios(task_of(), ddpg(), evaluator(), EPISODES))


def test_the_keyboard_ends_a_search_with_the_best_so_far(tmp_path):
    tried = []

    def interrupted(choice):
        tried.append(choice)
        if len(tried) == 4:
            raise KeyboardInterrupt
        return accuracy(choice)

    file = tmp_path / "search.pt"
    result = search_ratios(task_of(), ddpg(), evaluator(interrupted), EPISODES, state_file=file)
    whole = search_ratios(task_of(), ddpg(), evaluator(), EPISODES)
    assert [e.choice for e in result.episodes] == [e.choice for e in whole.episodes[:3]]
    assert result.best_episode.score == max(e.score for e in result.episodes)
    again = search_ratios(task_of(), ddpg(), evaluator(), EPISODES, state_file=file)
    assert same(again, whole)


def test_the_keyboard_before_the_first_episode_ends_the_program():
    def interrupted(choice):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_ratios(task_of(), ddpg(), evaluator(interrupted), EPISODES)


# --- Failures -------------------------------------------------------------------------------------


def test_failing_episodes_are_counted_and_cost_only_themselves(tmp_path):
    tried = []

    def fragile(choice):
        tried.append(choice)
        if len(tried) % 4 == 1:
            raise RuntimeError("out of luck")
        return math.nan if len(tried) % 4 == 2 else accuracy(choice)

    file = tmp_path / "search.pt"
    result = search_ratios(task_of(), ddpg(), evaluator(fragile), EPISODES, state_file=file)
    failed = [e for e in result.episodes if e.failure is not None]
    assert {e.failure for e in failed} == {"RuntimeError: out of luck", "the metric is nan"}
    assert 5 <= result.num_failed == len(failed) < EPISODES
    assert all(math.isnan(e.reward) and not e.complete for e in failed)
    assert result.best_episode.score == max(e.score for e in result.episodes if not e.failure)
    again = search_ratios(task_of(), ddpg(), evaluator(fragile), EPISODES, state_file=file)
    assert same(again, result)


def test_where_all_fail_there_is_no_winner_and_the_reason_is_told():
    def broken(choice):
        raise RuntimeError("no data")

    result = search_ratios(task_of(), ddpg(), evaluator(broken), 3, settle=accuracy)
    assert result.best is None
    with pytest.raises(ValueError, match=r"3 failed.*RuntimeError: no data"):
        _ = result.best_episode


def test_a_metric_that_the_reward_cannot_use_ends_the_search():
    with pytest.raises(ValueError, match=r"needs a metric in \[0, 1\], and it came as 80.0"):
        search_ratios(
            task_of(reward="error_log_macs"), ddpg(), evaluator(lambda choice: 80.0), EPISODES
        )


# --- The last word, in full precision -------------------------------------------------------------

CHOICES = [(3, 7, 0), (1, 5, 1), (2, 4, 1), (1, 3, 3), (3, 1, 5)]
SCORES = dict(zip(CHOICES, (0.9, 0.8, 0.7, 0.6, 0.5), strict=True))


def settled_search(exactly, sources=None, choices=CHOICES, **options):
    asked = []

    def settle(choice):
        asked.append(choice)
        return exactly(choice)

    searcher = Listed(choices, sources)
    task = options.pop("task", task_of())
    result = search_ratios(
        task, searcher, evaluator(SCORES.__getitem__), len(choices), settle=settle, **options
    )
    return result, asked


def test_full_precision_decides_on_the_winner():
    exact = {**SCORES, CHOICES[0]: 0.75, CHOICES[1]: 0.85}
    result, asked = settled_search(exact.__getitem__, num_finalists=3)
    assert asked == CHOICES[:3]
    assert result.best == 1
    assert [e.score for e in result.episodes] == [0.75, 0.85, 0.7, 0.6, 0.5]
    assert [e.reward for e in result.episodes] == [0.75, 0.85, 0.7, 0.6, 0.5]


def test_the_winner_is_one_of_those_that_were_settled():
    """Others have scores of another precision, which do not compare."""
    result, _ = settled_search(lambda choice: 0.1, num_finalists=2)
    assert result.best == 0
    assert [e.score for e in result.episodes] == [0.1, 0.1, 0.7, 0.6, 0.5]


def test_the_best_of_each_source_is_settled_too():
    sources = ["ddpg", "ddpg", "deep", "deep", "uniform"]
    result, asked = settled_search(lambda choice: SCORES[choice] - 0.01, sources, num_finalists=1)
    assert sorted(asked) == sorted([CHOICES[0], CHOICES[2], CHOICES[4]])
    assert [round(e.score, 2) for e in result.episodes] == [0.89, 0.8, 0.69, 0.6, 0.49]
    assert result.best == 0


def test_a_choice_of_several_episodes_is_settled_once():
    choices = [*CHOICES[:2], CHOICES[0]]
    result, asked = settled_search(lambda c: 0.95, ["deep", "deep", "uniform"], choices)
    assert asked == CHOICES[:2]
    assert [e.score for e in result.episodes] == [0.95] * 3
    assert result.best == 0


def test_the_cheapest_within_a_tolerance_is_settled_and_stays_the_rule():
    task = replace(task_of(tolerance=0.45), dense_score=1.0)
    plain = search_ratios(task, Listed(CHOICES), evaluator(SCORES.__getitem__), 5)
    within = [e for e in plain.episodes if e.score >= 0.55]
    cheapest = min(within, key=lambda e: e.costs["macs"])
    assert plain.best == cheapest.number != 0
    result, asked = settled_search(SCORES.__getitem__, task=task, num_finalists=1)
    assert cheapest.choice in asked
    assert result.best == plain.best


def test_what_fails_to_be_settled_cannot_win_but_ends_nothing():
    def exactly(choice):
        if choice == CHOICES[0]:
            raise RuntimeError("no memory")
        return math.nan if choice == CHOICES[1] else SCORES[choice]

    result, _ = settled_search(exactly)
    assert result.best == 2
    assert [e.failure for e in result.episodes[:3]] == [
        "RuntimeError: no memory",
        "the metric is nan",
        None,
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_without_a_settled_one_the_result_is_as_before(error):
    def exactly(choice):
        raise error

    plain = search_ratios(task_of(), Listed(CHOICES), evaluator(SCORES.__getitem__), 5)
    assert same(settled_search(exactly)[0], plain)


# --- Rewards and tolerance ------------------------------------------------------------------------


def test_without_a_budget_the_smallest_of_the_same_error_wins():
    """The reward is minus the error times the logarithm of the MACs."""
    task = task_of(FREE, reward="error_log_macs")
    choices = [FREE.highest, (1, 7, 3), (1, 7, 7), (0, 3, 0)]
    scores = dict(zip(choices, (0.9, 0.9, 0.9, 0.5), strict=True))
    result = search_ratios(task, Listed(choices), evaluator(scores.__getitem__), 4)
    assert result.best == 1
    for episode in result.episodes:
        error = 1 - episode.score
        assert episode.reward == pytest.approx(-error * math.log(episode.costs["macs"]))
    assert result.budget is None


def test_ddpg_searches_without_a_budget():
    task = task_of(FREE, reward="error_log_macs")
    searcher = DDPGSearcher(FREE, QUICK)
    result = search_ratios(task, searcher, evaluator(), EPISODES)
    assert [e.source for e in result.episodes[-7:]] == ["ddpg"] * 7
    assert len({e.choice for e in result.episodes}) > EPISODES / 2


def test_a_tolerance_is_counted_from_the_dense_score():
    task = replace(task_of(FREE, tolerance=0.15), dense_score=0.95)
    result = search_ratios(task, Listed(CHOICES), evaluator(SCORES.__getitem__), 5)
    within = [e for e in result.episodes if e.score >= 0.8]
    assert result.best_episode == min(within, key=lambda e: e.costs["macs"])


def test_a_users_reward_decides():
    task = task_of(reward=lambda score, costs: -costs["macs"])
    result = search_ratios(task, Listed(CHOICES), evaluator(), 5)
    assert result.best_episode.costs["macs"] == min(e.costs["macs"] for e in result.episodes)
    assert result.reward == "function"


# --- Refusals -------------------------------------------------------------------------------------


def saved(tmp_path, task=None):
    file = tmp_path / "search.pt"
    search_ratios(task or task_of(), ddpg(), evaluator(), 3, state_file=file)
    return file


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (task_of(setting={"seed": "2"}), r"its setting is \{\} and not \{'seed': '2'\}"),
        (replace(task_of(), metric="val_loss"), r"its metric is \['val_acc', 'max'\] and not"),
        (replace(task_of(), reward="error_log_macs"), "its reward is 'score' and not 'error_log_m"),
        (task_of(FREE), r"its budget is \['macs', .*\] and not None"),
        (task_of(chain_problem((32, 64, 128))), r"its (budget|decisions) is \["),
        (replace(task_of(), space="bits"), "its space is 'channels' and not 'bits'"),
    ],
)
def test_the_state_of_another_search_is_refused(tmp_path, other, what):
    file = saved(tmp_path)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"search.pt' holds another search: {what}"):
        search_ratios(other, ddpg(), evaluator(), 5, state_file=file)
    assert file.read_bytes() == before


def test_damaged_and_foreign_files_are_refused(tmp_path):
    file = saved(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"search.pt' cannot be read as the state of a search"):
        search_ratios(task_of(), ddpg(), evaluator(), 5, state_file=file)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"cannot be read .*remove it to begin again"):
        search_ratios(task_of(), ddpg(), evaluator(), 5, state_file=file)
    assert file.read_text() == "{}"
    for foreign in ({"state_dict": {}}, torch.zeros(2)):
        torch.save(foreign, file)
        with pytest.raises(ValueError, match=r"has the format None, expected 'lit-compress ratio"):
            search_ratios(task_of(), ddpg(), evaluator(), 5, state_file=file)


@pytest.mark.parametrize("name", ["num_episodes", "num_finalists"])
def test_numbers_below_one_are_refused(name):
    numbers = {"num_episodes": 1, "num_finalists": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        search_ratios(task_of(), ddpg(), evaluator(), **numbers)


def test_a_random_search_runs_too():
    result = search_ratios(task_of(), RandomSearcher(PROBLEM), evaluator(), 4)
    assert {e.source for e in result.episodes} == {"random"}

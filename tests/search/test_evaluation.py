"""What a choice is worth: scored once, failures counted, hopeless ones stopped."""

import io
import math

import pytest
import torch
from torch import nn

from lit_compress.search.evaluation import Evaluation, Evaluator, Scored, plain_score

BATCHES = 20


class Network(nn.Module):
    """A network that only says which choice it is of."""

    def __init__(self, choice):
        super().__init__()
        self.choice = choice


class Table:
    """Scores by choice, batch after batch; counts what was built and looked at."""

    def __init__(self, worth):
        self.worth = worth
        self.built = []
        self.looked_at = {}

    def build(self, choice):
        self.built.append(choice)
        return Network(choice)

    def score(self, network, give_up=None):
        generator = torch.Generator().manual_seed(7)  # the same noise for all: paired
        noise = torch.randn(BATCHES, generator=generator) * 0.05
        own = torch.Generator().manual_seed(sum(network.choice))
        noise += torch.randn(BATCHES, generator=own) * 0.01
        values = (self.worth[network.choice] + noise).cumsum(0) / torch.arange(1, BATCHES + 1)
        seen = [100 * (n + 1) for n in range(BATCHES)]
        for n in range(1, BATCHES + 1):
            self.looked_at[network.choice] = n
            running = values[:n].tolist()
            if n < BATCHES and give_up is not None and give_up(running, seen[:n]):
                return Scored(running[-1], tuple(running), tuple(seen[:n]), complete=False)
        return Scored(running[-1], tuple(running), tuple(seen))


def evaluator_of(worth, **options):
    table = Table(worth)
    return Evaluator(table.build, table.score, **options), table


def failing(error):
    def score(network, give_up=None):
        raise error

    return Evaluator(Network, score)


# --- Once each ------------------------------------------------------------------------------------


def test_each_network_is_built_and_scored_once():
    evaluate, table = evaluator_of({(0,): 0.5, (1,): 0.6})
    assert not evaluate.is_known((0,))
    first = evaluate((0,))
    assert evaluate.is_known((0,))
    assert evaluate((0,)) is first
    evaluate((1,))
    evaluate((0,))
    assert table.built == [(0,), (1,)]
    assert first.complete
    assert first.failure is None
    assert first.score == pytest.approx(0.5, abs=0.05)


def test_a_network_is_tuned_before_it_is_scored():
    tuned = []

    def tune(network):
        tuned.append(network)

    def score(network, give_up=None):
        assert tuned[-1] is network
        return Scored(0.5)

    assert Evaluator(Network, score, tune=tune)((0,)) == Evaluation(0.5)
    assert len(tuned) == 1


def test_a_plain_function_is_a_score():
    score = plain_score(lambda network: network.choice[0] / 4)
    assert Evaluator(Network, score)((3,)) == Evaluation(0.75)
    assert Evaluator(Network, score)((1,)) == Evaluation(0.25)


# --- Failures -------------------------------------------------------------------------------------


def test_what_raises_is_a_failure_of_that_choice_only():
    def build(choice):
        if choice == (0,):
            raise RuntimeError("shapes do not fit")
        return Network(choice)

    evaluate = Evaluator(build, plain_score(lambda network: 0.5))
    failed = evaluate((0,))
    assert math.isnan(failed.score)
    assert failed.failure == "RuntimeError: shapes do not fit"
    assert evaluate((1,)) == Evaluation(0.5)
    assert failing(ZeroDivisionError("by zero"))((0,)).failure == "ZeroDivisionError: by zero"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_a_failure(value):
    evaluation = Evaluator(Network, plain_score(lambda network: value))((0,))
    assert math.isnan(evaluation.score)
    assert evaluation.failure == f"the metric is {value}"


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_ends_a_program_passes_through(error):
    evaluate = failing(error())
    with pytest.raises(error):
        evaluate((0,))
    assert not evaluate.is_known((0,))


def test_a_failure_does_not_become_the_one_to_beat():
    worth = {(0,): math.nan, (1,): 0.5, (2,): 0.6}
    evaluate, _ = evaluator_of(worth)
    assert evaluate((0,)).failure is not None
    assert evaluate((1,)).complete
    assert evaluate((2,)).complete


# --- Races ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["max", "min"])
def test_hopeless_ones_are_given_up_and_others_are_not(mode):
    sign = 1 if mode == "max" else -1
    worth = {(0,): 0.5, (1,): 0.5 - 0.3 * sign, (2,): 0.5 + 0.3 * sign, (3,): 0.5}
    evaluate, table = evaluator_of(worth, mode=mode)
    complete = [evaluate((n,)).complete for n in range(4)]
    assert complete == [True, False, True, False]
    assert table.looked_at[(1,)] < 10
    assert table.looked_at[(2,)] == BATCHES


def test_without_a_race_all_are_looked_at():
    evaluate, table = evaluator_of({(0,): 0.9, (1,): 0.1}, race=False)
    assert evaluate((0,)).complete
    assert evaluate((1,)).complete
    assert table.looked_at[(1,)] == BATCHES


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("seed", range(3))
def test_the_winner_is_the_same_as_without_a_race(mode, seed):
    values = torch.rand(40, generator=torch.Generator().manual_seed(seed))
    worth = {(n,): 0.5 + 0.4 * float(value) for n, value in enumerate(values)}
    pick = max if mode == "max" else min
    winners, looks = [], []
    for race in (True, False):
        evaluate, table = evaluator_of(worth, mode=mode, race=race)
        done = {choice: evaluate(choice) for choice in worth}
        complete = {choice: e.score for choice, e in done.items() if e.complete}
        winners.append(pick(complete, key=complete.__getitem__))
        looks.append(sum(table.looked_at.values()))
    assert winners[0] == winners[1]
    assert looks[0] < 0.7 * looks[1]


# --- State ----------------------------------------------------------------------------------------


def test_the_state_goes_through_a_file_and_the_race_goes_on():
    worth = {(0,): 0.8, (1,): 0.2, (2,): 0.9, (3,): 0.3}
    whole, _ = evaluator_of(worth)
    expected = [whole((n,)) for n in range(4)]

    before, _ = evaluator_of(worth)
    assert [before((n,)) for n in range(2)] == expected[:2]
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after, table = evaluator_of(worth)
    after.load_state_dict(torch.load(file, weights_only=True))
    assert [after((n,)) for n in range(4)] == expected
    assert table.built == [(2,), (3,)]
    assert [e.complete for e in expected] == [True, False, True, False]


def test_the_state_of_failures_and_of_nothing():
    empty, _ = evaluator_of({})
    fresh, _ = evaluator_of({(0,): 0.5})
    fresh((0,))
    fresh.load_state_dict(empty.state_dict())
    assert not fresh.is_known((0,))
    failed = failing(RuntimeError("no"))
    failed((0, 1))
    fresh.load_state_dict(failed.state_dict())
    assert fresh((0, 1)).failure == "RuntimeError: no"
    assert math.isnan(fresh((0, 1)).score)

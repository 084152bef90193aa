"""Giving up early: never by mistake more often than said, and soon where it is clear."""

import pytest
import torch

from lit_compress.search.racing import is_hopeless, student_t_quantile

BATCHES, SIZE = 40, 125
SEEN = [SIZE * n for n in range(1, BATCHES + 1)]


def running(correct):
    """The accuracy after each batch, from bools [n, examples]: a list for each row."""
    sums = correct.view(len(correct), BATCHES, SIZE).sum(2).cumsum(1)
    return (sums.double() / torch.tensor(SEEN, dtype=torch.float64)).tolist()


def pairs(count, accuracy, disagree, gain, seed):
    """Running accuracies of an incumbent and of a candidate that is better by ``gain``.

    On a share ``disagree`` of the examples one is right and the other wrong; else they agree.
    """
    generator = torch.Generator().manual_seed(seed)
    which = torch.rand(count, BATCHES * SIZE, generator=generator)
    both = torch.rand(count, BATCHES * SIZE, generator=generator) < accuracy
    worse, differ = (disagree - gain) / 2, disagree
    incumbent = torch.where(which < worse, True, torch.where(which < differ, False, both))
    candidate = torch.where(which < worse, False, torch.where(which < differ, True, both))
    return running(incumbent), running(candidate)


def given_up_after(candidate, incumbent):
    """Batches after which a candidate is given up; None if it never is."""
    for seen in range(1, BATCHES):
        if is_hopeless(candidate[:seen], incumbent, SEEN):
            return seen
    return None


# --- Never by mistake -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("disagree", "gain"), [(0.02, 0.0), (0.2, 0.0), (0.02, 0.005), (0.2, 0.005)]
)
def test_hardly_any_candidate_that_would_win_is_given_up(disagree, gain):
    """Each look errs once in 10,000 at most, there are 34, and many of them err together."""
    count = 1200
    incumbents, candidates = pairs(count, 0.85, disagree, gain, seed=1)
    would_win = mistakes = 0
    for incumbent, candidate in zip(incumbents, candidates, strict=True):
        if candidate[-1] > incumbent[-1]:
            would_win += 1
            mistakes += given_up_after(candidate, incumbent) is not None
    assert would_win > count / 4
    assert mistakes <= 34 * 1e-4 * would_win


def test_an_equal_is_never_given_up():
    for row in pairs(20, 0.85, 0.0, 0.0, seed=2)[0]:
        assert given_up_after(row, row) is None


def test_a_better_one_is_never_given_up():
    for row in pairs(20, 0.5, 0.0, 0.0, seed=3)[0]:
        assert given_up_after([value + 0.01 for value in row], row) is None


def test_never_before_six_batches_and_not_after_the_last():
    incumbent = [0.9] * BATCHES
    assert not is_hopeless([0.1] * 5, incumbent, SEEN)
    assert is_hopeless([0.1] * 6, incumbent, SEEN)
    assert not is_hopeless([0.1] * BATCHES, incumbent, SEEN)
    assert not is_hopeless([0.1] * 4, [0.9] * 4, SEEN[:4])


# --- Soon where it is clear -----------------------------------------------------------------------


@pytest.mark.parametrize(("behind", "within"), [(0.3, 8), (0.1, 12), (0.05, 20)])
def test_clearly_worse_ones_are_given_up_early(behind, within):
    incumbents, candidates = pairs(50, 0.85, 0.05 + behind, -behind, seed=4)
    after = [given_up_after(c, i) for i, c in zip(incumbents, candidates, strict=True)]
    assert None not in after
    assert sum(after) / len(after) <= within


def test_batches_of_different_sizes_count_by_their_examples():
    """The last batch is a small one in which the candidate loses everything."""
    sizes = [100, 200, 300, 400, 500, 600, 601, 700, 800]
    incumbent = [0.9] * 9
    even = [0.9, 0.895, 0.9, 0.9, 0.905, 0.9]
    assert not is_hopeless([*even, 0.9 * 600 / 601], incumbent, sizes)
    worse = [0.8, 0.81, 0.8, 0.8, 0.79, 0.8]
    assert is_hopeless([*worse, 0.8 * 600 / 601 + 1 / 601], incumbent, sizes)


@pytest.mark.parametrize("seed", range(6))
def test_a_race_has_the_winner_of_all_scores(seed):
    """30 candidates of close accuracy, one after another, each raced against the best so far."""
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.rand(BATCHES * SIZE, generator=generator)
    skill = 0.6 + 0.3 * torch.rand(30, 1, generator=generator)
    noise = 0.1 * torch.randn(30, BATCHES * SIZE, generator=generator)
    scores = running(difficulty + noise < skill)
    best, batches = None, 0
    for number, candidate in enumerate(scores):
        after = None if best is None else given_up_after(candidate, scores[best])
        batches += after or BATCHES
        if after is None and (best is None or candidate[-1] > scores[best][-1]):
            best = number
    assert scores[best][-1] == max(row[-1] for row in scores)
    assert batches < 0.6 * 30 * BATCHES


# --- Student's t ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probability", "degrees", "known", "within"),
    [
        (0.975, 5, 2.5706, 2e-3),
        (0.975, 10, 2.2281, 1e-4),
        (0.995, 10, 3.1693, 1e-3),
        (0.9999, 5, 9.6776, 0.05),
        (0.9999, 6, 8.0248, 0.03),
        (0.9999, 9, 6.0101, 0.01),
        (0.9999, 39, 4.1047, 1e-3),
        (0.975, 100000, 1.95998, 1e-4),
    ],
)
def test_quantiles_are_those_of_the_tables(probability, degrees, known, within):
    assert student_t_quantile(probability, degrees) == pytest.approx(known, rel=within)

"""What an agent sees, and that an episode can be walked again."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.search.environment import num_features, transitions, walk
from tests.search.table_problems import chain_problem, problems


@given(problems(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_walking_again_with_its_actions_gives_the_same_choice(problem, chance):
    seen = []

    def act(state):
        seen.append(state)
        return chance.random()

    choice = walk(problem, act)
    assert problem.meets(choice)
    states, actions = transitions(problem, choice)
    assert states.shape == (len(choice), num_features(problem)) == (len(seen), len(seen[0]))
    assert states.dtype == actions.dtype == torch.float32
    assert bool(((states >= 0) & (states <= 1)).all())

    replay = iter(actions.tolist())
    again = []
    assert walk(problem, lambda state: again.append(state) or next(replay)) == choice
    assert torch.equal(torch.stack(again), states)


@given(problems(), st.data())
@settings(deadline=None, max_examples=30)
def test_whoever_made_the_choice(problem, data):
    count = len(problem.decisions)
    shape = data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    choice = problem.scaled(shape)
    replay = iter(transitions(problem, choice)[1].tolist())
    assert walk(problem, lambda state: next(replay)) == choice


@given(problems(with_budget=False), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=20)
def test_without_a_budget_actions_are_carried_out_as_they_are(problem, chance):
    actions = [chance.random() for _ in problem.decisions]
    remaining = iter(actions)
    choice = walk(problem, lambda state: next(remaining))
    pairs = zip(problem.decisions, actions, strict=True)
    assert choice == tuple(decision.taken_by(action) for decision, action in pairs)


def test_what_is_seen_before_each_decision():
    """Features, what was saved, what can still be, the last action, the position."""
    problem = chain_problem((16, 32, 16), share=0.5)
    states, actions = transitions(problem, problem.filled((1, 0, 0)))
    dense = 3 * 16 + 16 * 32 + 32 * 16 + 16 * 10
    frugal = 3 * 8 + 8 * 8 + 8 * 8 + 8 * 10
    first, second, third = problem.values([problem.filled((1, 0, 0))])[0].tolist()
    torch.testing.assert_close(states[:, :2], torch.tensor([d.features for d in problem.decisions]))
    torch.testing.assert_close(states[:, 5], torch.tensor([0.0, 0.5, 1.0]))  # position
    torch.testing.assert_close(states[:, 4], torch.tensor([1.0, first / 16, second / 32]))
    torch.testing.assert_close(actions, torch.tensor([first / 16, second / 32, third / 16]))
    after_first = 3 * first + first * 32 + 32 * 16 + 16 * 10  # the others at their highest
    least_then = 3 * first + first * 8 + 8 * 8 + 8 * 10
    expected = [[0.0, (dense - frugal) / dense]]
    expected += [[(dense - after_first) / dense, (after_first - least_then) / dense]]
    torch.testing.assert_close(states[:2, 2:4], torch.tensor(expected))

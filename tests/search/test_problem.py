"""The budget, met by every finished choice, whatever the decisions and their cost."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lit_compress.search.problem import Budget, Decision, RatioProblem
from lit_compress.search.searchers import rules_of_thumb
from tests.search.table_problems import chain_macs, chain_problem, problems, raised


def cost(problem, choice):
    return problem.cost_of(choice)["macs"]


def assert_meets_and_spends(problem, choice):
    """Within the budget, and any single level more would be beyond it."""
    limit = problem.budget.limit
    assert cost(problem, choice) <= limit * (1 + 2e-9)
    assert problem.meets(choice)
    for more in raised(problem, choice):
        assert cost(problem, more) > limit


# --- The budget, as properties --------------------------------------------------------------------


@given(problems(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_every_walk_within_the_bounds_meets_the_budget_and_leaves_none_out(problem, chance):
    chosen = ()
    for decision in problem.decisions:
        low, high = problem.allowed(chosen)
        assert 0 <= low <= high < len(decision.levels)
        index = problem.clip(chosen, chance.random())
        assert low <= index <= high
        chosen = (*chosen, index)
    assert problem.meets(chosen)
    assert_meets_and_spends(problem, problem.filled(chosen))


@given(problems(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_the_bounds_are_the_tightest(problem, chance):
    """One more than the highest cannot be fixed later; one below the lowest cannot be spent."""
    count = len(problem.decisions)
    chosen = ()
    for step in range(count):
        low, high = problem.allowed(chosen)
        if high + 1 < len(problem.decisions[step].levels):
            assert not problem.meets((*chosen, high + 1, *[0] * (count - step - 1)))
        for index in range(low):  # the next level is within the budget whatever follows
            assert problem.meets((*chosen, index + 1, *problem.highest[step + 1 :]))
        chosen = (*chosen, chance.randint(low, high))


@given(problems(), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_a_filled_choice_lies_within_the_bounds_at_each_step(problem, chance):
    start = tuple(chance.randint(0, top) for top in problem.highest)
    assume(problem.meets(start))
    choice = problem.filled(start)
    assert all(after >= before for before, after in zip(start, choice, strict=True))
    assert problem.filled(choice) == choice
    for step, index in enumerate(choice):
        low, high = problem.allowed(choice[:step])
        assert low <= index <= high


@given(problems(), st.data())
@settings(deadline=None, max_examples=60)
def test_a_scaled_shape_meets_the_budget_and_spends_it(problem, data):
    count = len(problem.decisions)
    numbers = st.one_of(st.just(0.0), st.floats(1e-4, 100))
    shape = data.draw(st.lists(numbers, min_size=count, max_size=count))
    assert_meets_and_spends(problem, problem.scaled(shape))


@given(problems(), st.data())
@settings(deadline=None, max_examples=60)
def test_the_farthest_place_on_a_path_meets_the_budget_and_spends_it(problem, data):
    count = len(problem.decisions)
    powers = data.draw(st.lists(st.floats(0.1, 10), min_size=count, max_size=count))
    choice = problem.along(lambda place: [place**power for power in powers])
    assert_meets_and_spends(problem, choice)


@given(problems())
@settings(deadline=None, max_examples=25)
def test_rules_of_thumb_meet_the_budget_and_spend_it(problem):
    for proposal in rules_of_thumb(problem, num_each=3):
        assert_meets_and_spends(problem, proposal.choice)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.7])
def test_the_highest_is_the_closed_form_of_amc(share):
    """He et al. 2018, algorithm 1: what the budget leaves, over what this layer's channels cost."""
    problem = chain_problem((32, 64, 64, 128), share, step=1)
    levels = [torch.tensor(d.levels) for d in problem.decisions]
    generator = torch.Generator().manual_seed(0)
    chosen = ()
    for step in range(4):
        kept = [float(levels[i][index]) for i, index in enumerate(chosen)]
        least = [float(level[0]) for level in levels[step + 1 :]]
        values = [3.0, *kept, 0.0, *least, 10.0]  # with none of this layer's channels
        f_other = sum(a * b for a, b in itertools.pairwise(values))
        per_channel = values[step] + values[step + 2]
        f_this = per_channel * problem.decisions[step].full
        ratio = (problem.budget.limit - f_other) / f_this
        expected = min(math.floor(ratio * problem.decisions[step].full + 1e-9), len(levels[step]))
        low, high = problem.allowed(chosen)
        assert problem.decisions[step].levels[high] == expected
        pick = torch.randint(low, high + 1, (), generator=generator)
        chosen = (*chosen, int(pick))
    assert problem.meets(chosen)


def test_a_budget_that_is_met_exactly_is_met():
    """Sums in another order differ in the last bits."""
    decisions = tuple(Decision(f"l{i}", (0.1, 0.2, 0.3), 0.3) for i in range(3))
    problem = RatioProblem(decisions, {"size": lambda v: v.sum(1)}, Budget("size", 0.6))
    assert problem.cost_of((0, 1, 2))["size"] > 0.6
    for choice in itertools.permutations((0, 1, 2)):
        assert problem.meets(choice)
        assert problem.filled(choice) == choice


@given(problems())
@settings(deadline=None, max_examples=30)
def test_without_a_budget_everything_is_allowed(problem):
    free = RatioProblem(problem.decisions, problem.costs)
    chosen = ()
    for decision in free.decisions:
        assert free.allowed(chosen) == (0, len(decision.levels) - 1)
        chosen = (*chosen, 0)
    assert free.meets(free.highest)
    assert free.filled(chosen) == chosen
    assert free.scaled([0.0] * len(chosen)) == free.highest


# --- Values ---------------------------------------------------------------------------------------


def test_levels_ratios_values_and_costs():
    problem = chain_problem((16, 32), share=0.5)
    first, second = problem.decisions
    assert first.levels == (8.0, 16.0)
    assert second.ratios == (0.25, 0.5, 0.75, 1.0)
    assert [second.nearest(r) for r in (0.0, 0.3, 0.375, 0.9, 1.0)] == [0, 0, 1, 3, 3]
    assert problem.highest == (1, 3)
    assert problem.ratios((0, 2)) == (0.5, 0.75)
    assert problem.values([(0, 2), (1, 0)]).tolist() == [[8.0, 24.0], [16.0, 8.0]]
    assert problem.cost_of((0, 2)) == {"macs": 3 * 8 + 8 * 24 + 24 * 10}
    assert problem.full_costs == {"macs": 3 * 16 + 16 * 32 + 32 * 10}


def test_an_action_is_a_ratio_or_says_which_level():
    ratio = Decision("a", (0.05, 0.1, 0.2), 1.0)
    level = Decision("a", (0.05, 0.1, 0.2), 1.0, by_level=True)
    assert ratio.actions == ratio.ratios == level.ratios == (0.05, 0.1, 0.2)
    assert level.actions == (0.0, 0.5, 1.0)
    actions = (0.0, 0.07, 0.24, 0.26, 0.74, 0.76, 1.0)
    assert [ratio.taken_by(a) for a in actions] == [0, 0, 2, 2, 2, 2, 2]
    assert [level.taken_by(a) for a in actions] == [0, 0, 0, 1, 1, 2, 2]
    only = Decision("b", (0.5,), 1.0, by_level=True)
    assert (only.actions, only.taken_by(0.7)) == ((0.0,), 0)


@given(problems(), st.data())
@settings(deadline=None, max_examples=30)
def test_the_actions_of_a_choice_take_it_again(problem, data):
    choice = tuple(data.draw(st.integers(0, top)) for top in problem.highest)
    pairs = zip(problem.decisions, problem.actions(choice), strict=True)
    assert tuple(decision.taken_by(action) for decision, action in pairs) == choice


def test_a_scaled_shape_keeps_its_proportions():
    problem = chain_problem((64, 64, 64), share=0.3, step=1)
    ratios = problem.ratios(problem.scaled([0.2, 0.4, 0.6]))
    assert ratios[1] / ratios[0] == pytest.approx(2, rel=0.05)
    assert ratios[2] / ratios[0] == pytest.approx(3, rel=0.05)
    uniform = problem.ratios(problem.scaled([1.0, 1.0, 1.0]))
    assert max(uniform) - min(uniform) <= 1.01 / 64


def test_filling_closes_the_most_first():
    """From 8, 8 of a budget of 17 units, the dearer decision is raised."""
    decisions = (Decision("cheap", (1.0, 2.0), 2.0), Decision("dear", (1.0, 2.0), 2.0))
    weights = torch.tensor([1.0, 5.0], dtype=torch.float64)
    problem = RatioProblem(decisions, {"size": lambda v: v @ weights}, Budget("size", 11.5))
    assert problem.filled((0, 0)) == (0, 1)


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "full"),
    [
        ((), 8.0),
        ((4.0, 4.0), 8.0),
        ((8.0, 4.0), 8.0),
        ((0.0, 4.0), 8.0),
        ((4.0, 9.0), 8.0),
        ((math.nan, 4.0), 8.0),
        ((4.0, math.nan), 8.0),
    ],
)
def test_levels_that_do_not_rise_are_refused(levels, full):
    with pytest.raises(ValueError, match=r"levels of decision 'conv' are .*rising, in \(0, 8.0\]"):
        Decision("conv", levels, full)


def test_nothing_to_search_is_refused():
    fixed = Decision("conv", (8.0,), 8.0)
    with pytest.raises(ValueError, match="nothing to search: no layer has more than one value"):
        RatioProblem((fixed,), {"macs": chain_macs})
    with pytest.raises(ValueError, match="nothing to search"):
        RatioProblem((), {"macs": chain_macs})


def test_two_decisions_of_one_name_are_refused():
    decision = Decision("conv", (4.0, 8.0), 8.0)
    with pytest.raises(ValueError, match="two decisions are named 'conv'"):
        RatioProblem((decision, decision), {"macs": chain_macs})


def test_descriptions_of_different_lengths_are_refused():
    decisions = (Decision("a", (4.0, 8.0), 8.0, (0.5,)), Decision("b", (4.0, 8.0), 8.0))
    with pytest.raises(ValueError, match=r"'b' has 0 features and 'a' has 1"):
        RatioProblem(decisions, {"macs": chain_macs})


def test_a_problem_without_costs_is_refused():
    with pytest.raises(ValueError, match="no costs; expected at least one"):
        RatioProblem((Decision("a", (4.0, 8.0), 8.0),), {})


def test_budgets_that_cannot_be_are_refused():
    decisions = chain_problem((16, 32), share=None).decisions
    costs = {"macs": chain_macs}
    lowest = 3 * 8 + 8 * 8 + 8 * 10
    with pytest.raises(ValueError, match=rf"100 macs, and the lowest .* is {lowest} \(19.1%"):
        RatioProblem(decisions, costs, Budget("macs", 100))
    with pytest.raises(ValueError, match="budget is on 'latency_ms'; expected one of 'macs'"):
        RatioProblem(decisions, costs, Budget("latency_ms", 100))
    with pytest.raises(ValueError, match="most that can be chosen costs 880: nothing is to be sav"):
        RatioProblem(decisions, costs, Budget("macs", 880))
    for limit in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"budget is {limit}; expected a finite number above"):
            RatioProblem(decisions, costs, Budget("macs", limit))
    assert RatioProblem(decisions, costs, Budget("macs", lowest)).meets((0, 0))


@pytest.mark.parametrize("shape", [[1.0], [1.0, -0.1], [1.0, math.nan], [1.0, math.inf]])
def test_shapes_that_are_none_are_refused(shape):
    with pytest.raises(ValueError, match=r"shape is .*expected 2 finite numbers of at least 0"):
        chain_problem((16, 32)).scaled(shape)

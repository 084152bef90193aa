"""Who proposes choices: all within the budget, repeatable, and the agent better than chance."""

import copy
import io
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_compress.search.ddpg import DDPGSettings
from lit_compress.search.evaluation import Evaluation
from lit_compress.search.searchers import (
    DDPGSearcher,
    Proposal,
    RandomSearcher,
    RulesSearcher,
    ranking,
    rules_of_thumb,
    sensitivity_proposals,
    sensitivity_shape,
)
from tests.search.table_problems import chain_problem, problems

QUICK = DDPGSettings(
    hidden_size=24, actor_lr=1e-3, batch_size=16, buffer_size=500, learning_starts=12
)
WORTH = (0.1, 0.6, 0.2, 1.0, 0.3)
PROBLEM = chain_problem((32, 64, 64, 96, 128), 0.4)


def reward_of(choice, problem=PROBLEM):
    """Each layer by itself: more channels help, less and less, some layers more than others."""
    ratios = problem.ratios(choice)
    return sum(w * ratio**0.3 for w, ratio in zip(WORTH, ratios, strict=True))


def episodes(searcher, count, reward=reward_of):
    """The next proposals of a searcher that is told what they are worth."""
    made = []
    for _ in range(count):
        proposal = searcher.ask()
        searcher.tell(proposal, reward(proposal.choice))
        made.append(proposal)
    return made


def ddpg(seed=0, **options):
    options.setdefault("first", rules_of_thumb(PROBLEM, 2))
    return DDPGSearcher(PROBLEM, QUICK, seed, **options)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- Heuristics -------------------------------------------------------------------------------


def test_rules_of_thumb_are_uniform_falling_and_rising():
    proposals = rules_of_thumb(PROBLEM, 5)
    assert [p.source for p in proposals].count("uniform") == 1
    assert 7 < len({(p.choice, p.source) for p in proposals}) == len(proposals) <= 11
    by_source = {p.source: PROBLEM.ratios(p.choice) for p in proposals}  # the steepest of each
    deep, shallow, uniform = (by_source[s] for s in ("deep", "shallow", "uniform"))
    assert deep[0] == 1.0
    assert deep[-1] < 0.1
    assert shallow[0] == 0.25  # the least that there is
    assert shallow[-1] > 0.8
    assert max(uniform) - min(uniform) < 0.25
    assert [p.source for p in rules_of_thumb(PROBLEM, 0)] == ["uniform"]


def test_what_is_worth_most_in_all_decisions_is_a_rule_where_that_is_known():
    worth = [torch.full((32,), 9.0), *(torch.arange(n) / n for n in (64, 64, 96, 128))]
    proposals = rules_of_thumb(PROBLEM, 1, worth)
    assert [p.source for p in proposals] == ["uniform", "global", "deep", "shallow"]
    first, *others = PROBLEM.ratios(proposals[1].choice)
    assert first == 1.0
    assert max(others) - min(others) < 0.3  # the same share of each, but for levels
    assert PROBLEM.meets(proposals[1].choice)


@given(
    st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=12), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_a_ranking_keeps_what_is_worth_most(worth, place):
    at = ranking([torch.tensor(values, dtype=torch.float32) for values in worth])
    shares = at(place)
    parts = sorted((value for values in worth for value in values), reverse=True)
    number = round(place * len(parts))
    least = parts[number - 1] if number else 51
    kept = [sum(value >= least for value in values) for values in worth]
    assert shares == pytest.approx([k / len(v) for k, v in zip(kept, worth, strict=True)])
    assert at(0.0) == [0.0] * len(worth)
    assert at(1.0) == [1.0] * len(worth)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6).map(sorted))
def test_a_ranking_never_keeps_less_of_a_decision_farther_on(places):
    generator = torch.Generator().manual_seed(1)
    at = ranking([torch.rand(5, 3, generator=generator), torch.rand(40, generator=generator)])
    shares = [at(place) for place in places]
    for before, after in pairwise(shares):
        assert all(a <= b for a, b in zip(before, after, strict=True))


def test_rules_of_thumb_of_one_decision():
    problem = chain_problem((64,), 0.5)
    choices = {p.choice for p in rules_of_thumb(problem)}
    assert choices == {problem.scaled([1.0])}


def test_sensitive_layers_keep_more():
    problem = chain_problem((64, 64, 64), 0.4)
    curves = {
        "conv0": {0.25: 0.5, 0.5: 0.04, 0.75: 0.01},
        "conv1": {0.25: 0.01, 0.5: 0.0, 0.75: 0.2},  # beyond the tolerance at .75 already
    }
    assert sensitivity_shape(problem, curves, tolerance=0.05) == [0.5, 1.0, 1.0]
    assert sensitivity_shape(problem, curves, tolerance=0.3) == [0.5, 0.25, 1.0]
    choice = problem.scaled(sensitivity_shape(problem, curves, tolerance=0.3))
    ratios = problem.ratios(choice)
    assert ratios[1] < ratios[0] < ratios[2]


def test_sensitivities_are_probed_one_decision_at_a_time():
    """The layer that does not matter gives way first, the one that does last."""
    problem = chain_problem((64, 64, 64), 0.25)
    worth = (0.5, 0.0, 1.0)
    probed = []

    def probe(choice):
        probed.append(choice)
        if choice == (0, 7, 7):
            return Evaluation(math.nan, failure="RuntimeError: no")
        ratios = problem.ratios(choice)
        return Evaluation(1 - sum(w * (1 - r) for w, r in zip(worth, ratios, strict=True)))

    proposals = sensitivity_proposals(problem, probe, num_points=3)
    assert probed[0] == problem.highest == (7, 7, 7)
    assert all(sum(index < 7 for index in choice) == 1 for choice in probed[1:])
    assert len(set(probed)) == len(probed) == 1 + 3 * 4
    assert {p.source for p in proposals} == {"sensitivity"}
    assert len({p.choice for p in proposals}) == len(proposals)
    assert all(problem.meets(p.choice) for p in proposals)
    first = problem.ratios(proposals[0].choice)
    assert first[1] < min(first[0], first[2])
    assert any(first[1] < r[0] < r[2] for r in (problem.ratios(p.choice) for p in proposals))


def test_a_loss_is_what_the_metric_makes_worse():
    """Where less of the metric is better, the same curves give the same proposals."""
    problem = chain_problem((64, 64, 64), 0.25)

    def loss(choice):
        return sum(
            w * (1 - r) for w, r in zip((0.5, 0.1, 1.0), problem.ratios(choice), strict=True)
        )

    rising = sensitivity_proposals(problem, lambda choice: Evaluation(loss(choice)), "min")
    falling = sensitivity_proposals(problem, lambda choice: Evaluation(-loss(choice)), "max")
    assert rising == falling
    assert rising != sensitivity_proposals(problem, lambda choice: Evaluation(loss(choice)), "max")


def test_proposals_made_beforehand_come_in_turn():
    proposals = rules_of_thumb(PROBLEM, 2)
    searcher = RulesSearcher(proposals)
    made = episodes(searcher, 7)
    assert made == [*proposals, *proposals[:2]]
    after = RulesSearcher(proposals)
    after.load_state_dict(through_a_file(searcher.state_dict()))
    assert after.ask() == proposals[2]
    with pytest.raises(ValueError, match="there are no proposals; expected at least one"):
        RulesSearcher([])


# --- Random search --------------------------------------------------------------------------------


@given(problems(), st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_random_choices_meet_the_budget(problem, seed):
    searcher = RandomSearcher(problem, seed)
    for _ in range(2):
        assert problem.meets(searcher.ask().choice)


def test_random_choices_differ_and_repeat_by_seed():
    first = [p.choice for p in episodes(RandomSearcher(PROBLEM, 1), 20)]
    assert first == [p.choice for p in episodes(RandomSearcher(PROBLEM, 1), 20)]
    assert first != [p.choice for p in episodes(RandomSearcher(PROBLEM, 2), 20)]
    assert len(set(first)) > 15


def test_random_choices_without_a_budget_span_the_levels():
    free = chain_problem((32, 64, 64, 96, 128), share=None)
    choices = [p.choice for p in episodes(RandomSearcher(free), 60, lambda choice: 0.0)]
    ratios = [ratio for choice in choices for ratio in free.ratios(choice)]
    assert min(ratios) < 0.3
    assert max(ratios) == 1.0


# --- Seeds and state ------------------------------------------------------------------------------


def test_ddpg_repeats_by_seed():
    first = episodes(ddpg(3), 20)
    assert first == episodes(ddpg(3), 20)
    assert first != episodes(ddpg(4), 20)


@pytest.mark.parametrize("searcher", [ddpg, lambda: RandomSearcher(PROBLEM)])
def test_the_global_random_state_is_neither_read_nor_advanced(searcher):
    def run():
        state = torch.get_rng_state()
        made = episodes(searcher(), 20)
        assert torch.equal(torch.get_rng_state(), state)
        return made

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(2)
    assert first == run()


@pytest.mark.parametrize("stop", [0, 4, 13, 14, 18])
def test_ddpg_goes_on_exactly_after_any_number_of_episodes(stop):
    """Among the heuristics, the random ones, and while the last episode is being learned."""
    expected = episodes(ddpg(), 20)
    before = ddpg()
    assert episodes(before, stop) == expected[:stop]
    state = through_a_file(before.state_dict())
    after = ddpg(seed=99)
    episodes(after, 14)  # whatever it did before
    after.load_state_dict(state)
    whole = ddpg()
    episodes(whole, stop + 1)
    assert episodes(after, 1) == expected[stop : stop + 1]
    asked = after.state_dict()["acting"]  # it is an episode behind the actor that learns
    assert all(torch.equal(asked[k], t) for k, t in whole.state_dict()["acting"].items())
    assert episodes(after, 19 - stop) == expected[stop + 1 :]
    assert episodes(before, 20 - stop) == expected[stop:]  # asking for the state changes nothing


def test_ddpg_goes_on_exactly_after_failures():
    def reward(choice):
        return math.nan if sum(choice) % 3 == 0 else reward_of(choice)

    expected = episodes(ddpg(), 20, reward)
    for stop in (14, 15, 16):
        before = ddpg()
        episodes(before, stop, reward)
        after = ddpg(99)
        after.load_state_dict(through_a_file(before.state_dict()))
        assert episodes(after, 20 - stop, reward) == expected[stop:]


def test_random_search_goes_on_exactly():
    before = RandomSearcher(PROBLEM, 5)
    episodes(before, 7)
    after = RandomSearcher(PROBLEM)
    after.load_state_dict(through_a_file(copy.deepcopy(before.state_dict())))
    assert episodes(after, 5) == episodes(before, 5)


def test_the_state_of_an_agent_with_other_settings_is_refused():
    other = DDPGSearcher(PROBLEM, DDPGSettings(hidden_size=8))
    with pytest.raises(ValueError, match="the saved agent has hidden_size = 24 and this one 8"):
        other.load_state_dict(ddpg().state_dict())


# --- The agent ------------------------------------------------------------------------------------


def test_first_the_given_ones_then_random_ones_then_the_actor():
    first = rules_of_thumb(PROBLEM, 2)
    made = episodes(ddpg(), 20)
    assert made[:5] == first
    assert [p.source for p in made[5:]] == ["random"] * 7 + ["ddpg"] * 8
    assert all(PROBLEM.meets(p.choice) for p in made)


def test_all_failing_so_far_means_random_ones():
    made = episodes(ddpg(first=()), 20, lambda choice: math.nan)
    assert {p.source for p in made} == {"random"}


@pytest.mark.parametrize("worthless", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_teaches_nothing_but_is_not_tried_again(worthless):
    plain, told = ddpg(), ddpg()
    extra = Proposal(PROBLEM.scaled([0.3, 1.0, 0.5, 1.0, 0.2]), "other")
    told.tell(extra, worthless)
    assert told.state_dict()["tried"] == [list(extra.choice)]
    assert episodes(told, 12) == episodes(plain, 12)
    assert told.state_dict()["agent"]["num_episodes"] == 12
    assert told.state_dict()["best"] == plain.state_dict()["best"]


@pytest.mark.parametrize("elite_share", [0.0, 0.5, 1.0])
def test_the_actor_repeats_no_choice(elite_share):
    """Also when noise has fallen to nothing and the actor would always do the same."""
    fading = DDPGSettings(**{**vars(QUICK), "exploration_noise": 0.1, "noise_decay": 0.5})
    searcher = DDPGSearcher(PROBLEM, fading, elite_share=elite_share)
    made = [p.choice for p in episodes(searcher, 40)][fading.learning_starts :]
    assert len(set(made)) == len(made)


def test_where_all_was_tried_choices_repeat():
    small = chain_problem((16, 16), 0.7)
    searcher = DDPGSearcher(small, QUICK)
    made = episodes(searcher, 20, lambda choice: float(choice[0]))
    assert all(small.meets(p.choice) for p in made)
    assert made[-1].source == "ddpg"
    assert len({p.choice for p in made}) < 5


def test_the_best_so_far_is_searched_around():
    """With all noise around the best, proposals stay near it."""
    searcher = DDPGSearcher(
        PROBLEM, DDPGSettings(**{**vars(QUICK), "exploration_noise": 0.02}), elite_share=1.0
    )
    best = PROBLEM.scaled([0.2, 1.0, 0.3, 1.0, 0.4])
    searcher.tell(Proposal(best, "other"), 100.0)
    near = PROBLEM.ratios(best)
    made = episodes(searcher, 24)[QUICK.learning_starts :]
    assert len({p.choice for p in made}) == len(made)
    distances = [
        sum(abs(a - b) for a, b in zip(PROBLEM.ratios(p.choice), near, strict=True)) / len(near)
        for p in made
    ]
    assert sum(distances) / len(distances) < 0.15


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"elite_share is {share}, expected a share in \[0, 1\]"):
        DDPGSearcher(PROBLEM, elite_share=share)


def search_by_agent_and_by_chance(seed):
    """Ten layers of which five matter: rewards of the rules, of 90 episodes, of as many draws."""
    worth = (1.0, 1.0, 0.05, 0.3, 1.0, 1.0, 0.3, 1.0, 0.3, 0.1)
    problem = chain_problem((32, 64, 64, 128, 64, 128, 128, 64, 128, 64), 0.4)

    def reward(choice):
        return sum(w * r**0.5 for w, r in zip(worth, problem.ratios(choice), strict=True))

    first = rules_of_thumb(problem, 3)
    learning = DDPGSettings(
        **{**vars(QUICK), "hidden_size": 32, "batch_size": 32, "critic_lr": 3e-3}
    )
    ours = episodes(DDPGSearcher(problem, learning, seed, first), 90, reward)
    chance = episodes(RandomSearcher(problem, seed), 90, reward)
    return [[reward(p.choice) for p in made] for made in (first, ours, chance)]


def test_the_agent_finds_more_than_its_rules_of_thumb_and_learns():
    rules, ours, chance = search_by_agent_and_by_chance(seed=0)
    assert max(ours) > max(rules)
    assert sum(ours[-10:]) / 10 > sum(chance) / 90 + 0.1


@pytest.mark.slow
def test_the_agent_beats_random_search():
    """On average: the best of 90 random draws beats one in seven agents on this problem."""
    leads = []
    for seed in range(4):
        _, ours, chance = search_by_agent_and_by_chance(seed)
        leads.append(max(ours) - max(chance))
    assert sum(leads) / len(leads) > 0

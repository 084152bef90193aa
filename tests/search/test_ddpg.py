"""DDPG: its parts by their formulas, the whole on a problem whose optimum is known."""

import copy
import io
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lit_compress.search.actor_critic import Actor, Critic, follow
from lit_compress.search.ddpg import DDPGAgent, DDPGSettings, truncated_normal
from lit_compress.search.replay import Replay

SMALL = DDPGSettings(
    hidden_size=8,
    actor_lr=1e-3,
    critic_lr=1e-2,
    batch_size=8,
    buffer_size=24,
    learning_starts=2,
    exploration_noise=0.5,
)
TARGETS = (0.8, 0.3, 0.6, 0.2, 0.9)

# Seed 7: the actions of each episode; from the third on, the losses of critic and actor.
GOLDEN = [
    [0.933001, 0.4525, 0.753834, 0.908849, 0.257995],
    [0.374342, 0.3303, 0.134088, 0.190065, 0.246805],
    [0.211945, 0.156506, 0.012043, 0.312748, 0.830068, 0.019137, 0.109513],
    [0.061666, 0.650882, 0.5788, 0.005145, 0.322766, 0.029031, 0.071929],
    [0.476922, 0.222224, 0.672087, 0.630602, 0.844648, 0.099501, 0.098816],
]

unit = st.floats(0, 1)
stds = st.floats(1e-3, 10)


def episode(act, targets=TARGETS):
    """States (which step, last action), actions and reward of one walk; the optimum is 1."""
    states, actions, last = [], [], 1.0
    for step in range(len(targets)):
        position = [float(step == other) for other in range(len(targets))]
        states.append(torch.tensor([*position, last]))
        last = act(states[-1])
        actions.append(last)
    reward = 1 - sum((a - target) ** 2 for a, target in zip(actions, targets, strict=True))
    return torch.stack(states), torch.tensor(actions), reward


def step(agent):
    """One episode, random while learning has not started, then near the actor's."""
    number = agent.num_episodes
    if number < agent.settings.learning_starts:
        states, actions, reward = episode(lambda state: agent.random_action())
    else:
        noise = agent.noise_at(number)
        states, actions, reward = episode(lambda state: agent.explore(state, noise))
    return actions, reward, agent.learn(states, actions, reward)


def agent_of(options=SMALL, seed=0):
    return DDPGAgent(len(TARGETS) + 1, options, seed)


def assert_same(ours, theirs):
    """Nested plain data and tensors, equal bit for bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


# --- Truncated normal -----------------------------------------------------------------------------


@given(unit, stds, unit)
@settings(deadline=None, max_examples=100)
def test_the_distribution_function_gives_the_quantile_back(mean, std, quantile):
    value = truncated_normal(mean, std, quantile)
    normal = NormalDist(mean, std)
    below = normal.cdf(value) - normal.cdf(0)
    assert 0 <= value <= 1
    assert below / (normal.cdf(1) - normal.cdf(0)) == pytest.approx(quantile, abs=1e-9)


@given(unit, st.floats(0, 1e300), unit, unit)
@settings(deadline=None, max_examples=100)
def test_a_higher_quantile_is_no_lower_value(mean, std, one, other):
    low, high = sorted((one, other))
    assert 0 <= truncated_normal(mean, std, low) <= truncated_normal(mean, std, high) <= 1


@given(unit, st.floats(0.02, 5))
@settings(deadline=None, max_examples=10)
def test_mean_and_variance_are_those_of_the_formulas(mean, std):
    count = 2000
    values = [truncated_normal(mean, std, (i + 0.5) / count) for i in range(count)]
    found = sum(values) / count
    spread = sum((v - found) ** 2 for v in values) / count

    unit_normal, low, high = NormalDist(), -mean / std, (1 - mean) / std
    mass = unit_normal.cdf(high) - unit_normal.cdf(low)
    shift = (unit_normal.pdf(low) - unit_normal.pdf(high)) / mass
    tails = (low * unit_normal.pdf(low) - high * unit_normal.pdf(high)) / mass
    assert found == pytest.approx(mean + std * shift, abs=1e-4)
    assert spread == pytest.approx(std**2 * (1 + tails - shift**2), abs=1e-4)


@given(unit, st.floats(0.001, 0.999))
@settings(deadline=None, max_examples=50)
def test_without_noise_it_is_the_mean_and_with_endless_noise_uniform(mean, quantile):
    assert truncated_normal(mean, 0.0, quantile) == mean
    assert truncated_normal(mean, 1e-9, quantile) == pytest.approx(mean, abs=1e-8)
    for std in (1e4, 1e100):
        assert truncated_normal(mean, std, quantile) == pytest.approx(quantile, abs=1e-7)


@pytest.mark.parametrize("wrong", [(-0.1, 1, 0.5), (math.nan, 1, 0.5), (0.5, -1, 0.5), (0.5, 1, 2)])
def test_a_normal_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=r"expected mean and quantile in \[0, 1\] and a finite"):
        truncated_normal(*wrong)


# --- Networks and replay --------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, 0.01, 1.0])
def test_the_slow_copy_goes_a_part_of_the_way(tau):
    draws = torch.Generator().manual_seed(0)
    slow, network = Actor(3, 4, draws), Actor(3, 4, draws)
    before = copy.deepcopy(slow.state_dict())
    follow(slow, network, tau)
    for name, p in network.state_dict().items():
        expected = (1 - tau) * before[name] + tau * p
        torch.testing.assert_close(slow.state_dict()[name], expected)
    assert not tau or not torch.equal(slow.first.weight, before["first.weight"])


def test_first_weights_are_torchs_usual_ones_from_the_generator():
    critic = Critic(25, 400, torch.Generator().manual_seed(3))
    for layer, inputs in [(critic.first, 25), (critic.action, 1), (critic.second, 400)]:
        assert layer.weight.abs().max() <= inputs**-0.5
        assert layer.weight.std().item() == pytest.approx((3 * inputs) ** -0.5, rel=0.1)
    again = Critic(25, 400, torch.Generator().manual_seed(3))
    assert_same(critic.state_dict(), again.state_dict())


@given(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=6))
@settings(deadline=None, max_examples=40)
def test_the_ring_holds_the_newest_steps_with_their_next_ones(size, lengths):
    replay, kept, count = Replay(size, 1), [], 0
    for number, length in enumerate(min(n, size) for n in lengths):
        rows = torch.arange(count, count + length, dtype=torch.float32)
        replay.add(rows.unsqueeze(1), rows / 1000, float(number))
        for row in rows.tolist():
            is_last = row == count + length - 1
            kept.append((row, number, None if is_last else row + 1))
        count += length
        kept = kept[-size:]
        assert len(replay) == len(kept)

    def drawn(replay):
        batch = replay.sample(len(replay), torch.Generator().manual_seed(0))
        torch.testing.assert_close(batch.actions, batch.states[:, 0] / 1000)
        table = torch.stack([batch.states[:, 0], batch.rewards, batch.next_states[:, 0]], 1)
        pairs = zip(table.tolist(), batch.is_last.tolist(), strict=True)
        return [(row, reward, None if last else after) for (row, reward, after), last in pairs]

    assert sorted(drawn(replay), key=lambda t: t[0]) == kept  # each once
    again = Replay(size, 1)
    again.load_state_dict(replay.state_dict())
    assert drawn(again) == drawn(replay)


# --- Learning -------------------------------------------------------------------------------------


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=5), st.floats(0, 0.99))
@settings(deadline=None, max_examples=20)
def test_the_mean_of_the_rewards_moves_by_its_momentum(rewards, momentum):
    agent = agent_of(replace(SMALL, reward_momentum=momentum, learning_starts=9))
    mean = rewards[0]
    for reward in rewards:
        agent.learn(torch.zeros(2, 6), torch.zeros(2), reward)
        mean = momentum * mean + (1 - momentum) * reward
    assert agent.mean_reward == pytest.approx(mean, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_losses_are_those_of_the_equations(gamma):
    # Learning so slow that the networks stay; batches of all there is.
    still = replace(SMALL, actor_lr=1e-30, critic_lr=1e-30, tau=1e-30, gamma=gamma, batch_size=4)
    agent = agent_of(replace(still, learning_starts=0, reward_momentum=0.5))
    draws = torch.Generator().manual_seed(1)
    states, actions = torch.rand(4, 6, generator=draws), torch.rand(4, generator=draws)
    # The first episode is too short for a batch, and is no part of the next one's steps.
    assert agent.learn(states[:1], actions[:1], 0.2) is None
    losses = agent.learn(states[1:], actions[1:], 0.8)

    actor, critic = Actor(6, 8, draws), Critic(6, 8, draws)
    actor.load_state_dict(agent.state_dict()["actor"])
    critic.load_state_dict(agent.state_dict()["critic"])
    mean = 0.5 * 0.2 + 0.5 * 0.8
    with torch.no_grad():
        best = critic(states, actor(states))
        values = torch.tensor([0.2, 0.8, 0.8, 0.8]) - mean
        values[1:3] += gamma * best[2:4]  # the other two steps are last ones
        expected = F.mse_loss(critic(states, actions), values)
    assert losses.critic == pytest.approx(expected.item(), rel=1e-5)
    assert losses.actor == pytest.approx(-best.mean().item(), rel=1e-5)


def test_a_constant_on_all_rewards_changes_nothing():
    plain, raised = agent_of(), agent_of()
    for _ in range(6):
        states, actions, reward = episode(lambda state: plain.random_action())
        ours = plain.learn(states, actions, reward)
        theirs = raised.learn(states, actions, reward + 0.25)
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert plain.mean_reward + 0.25 == pytest.approx(raised.mean_reward)
    assert plain.act(states[0]) == pytest.approx(raised.act(states[0]), abs=1e-5)


def test_updates_begin_after_the_first_episodes_and_with_a_full_batch():
    agent = agent_of()  # two episodes of five steps; a batch has eight
    untouched = agent.state_dict()
    assert [step(agent)[2] for _ in range(2)] == [None, None]
    assert_same(agent.state_dict()["actor"], untouched["actor"])
    assert step(agent)[2] is not None
    assert not torch.equal(
        agent.state_dict()["actor"]["last.weight"], untouched["actor"]["last.weight"]
    )
    agent = agent_of(replace(SMALL, learning_starts=0))
    assert [step(agent)[2] is None for _ in range(3)] == [True, False, False]


def test_noise_falls_once_learning_started():
    agent = agent_of(replace(SMALL, learning_starts=10, noise_decay=0.9))
    assert agent.noise_at(0) == agent.noise_at(10) == 0.5
    assert agent.noise_at(12) == pytest.approx(0.5 * 0.81)


def test_exploration_is_near_the_actor_and_random_actions_are_anywhere():
    agent, state = agent_of(), torch.full((6,), 0.3)
    best = agent.act(state)
    assert agent.explore(state, 0.0) == best
    near = [agent.explore(state, 0.01) for _ in range(200)]
    assert max(abs(a - best) for a in near) < 0.05
    assert sum(near) / 200 == pytest.approx(best, abs=0.005)
    anywhere = sorted(agent.random_action() for _ in range(400))
    assert max(abs(a - i / 400) for i, a in enumerate(anywhere)) < 0.08  # Kolmogorov, p < .02


@pytest.mark.parametrize("seed", [0, 1])
def test_a_known_optimum_is_found(seed):
    options = DDPGSettings(
        hidden_size=32,
        actor_lr=1e-3,
        critic_lr=1e-2,
        batch_size=128,
        learning_starts=40,
        noise_decay=0.98,
    )
    agent = agent_of(options, seed)
    for _ in range(200):
        step(agent)
    _, actions, reward = episode(agent.act)
    rand = torch.rand(200, 5, generator=torch.Generator().manual_seed(seed))
    best_random = 1 - (rand - torch.tensor(TARGETS)).square().sum(1).min()
    assert (actions - torch.tensor(TARGETS)).abs().mean() < 0.1
    assert reward > best_random


def test_a_seeded_trace_repeats():
    agent, trace = agent_of(seed=7), []
    for _ in GOLDEN:
        actions, _, losses = step(agent)
        trace.append([*actions.tolist(), *(losses or ())])
    assert trace == [pytest.approx(row, abs=1e-4) for row in GOLDEN]


# --- Randomness, threads, state -------------------------------------------------------------------


def test_the_global_generator_is_neither_read_nor_advanced():
    traces = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        agent = agent_of()
        traces.append([step(agent)[1] for _ in range(5)])
        assert torch.equal(torch.get_rng_state(), before)
    assert traces[0] == traces[1]
    assert traces[0] != [step(other)[1] for other in [agent_of(seed=1)] for _ in range(5)]


def test_learning_in_another_thread_gives_the_same():
    alone, threaded = agent_of(), agent_of()
    with ThreadPoolExecutor(1) as pool:
        for _ in range(6):
            states, actions, reward = episode(lambda state: alone.random_action())
            for action in actions:  # as many draws as that walk took, and the same ones
                assert threaded.random_action() == pytest.approx(action.item())
            one, two = alone.acting_copy(), threaded.acting_copy()
            before = one.act(states[0])
            alone.learn(states, actions, reward)
            learning = pool.submit(threaded.learn, states, actions, reward)
            theirs = [threaded.explore(state, 0.1, two) for state in states]
            learning.result()
            assert [alone.explore(state, 0.1, one) for state in states] == theirs
            assert one.act(states[0]) == before
    assert alone.act(states[0]) != before
    assert_same(alone.state_dict(), threaded.state_dict())


def test_it_learns_inside_inference_mode_too():
    outside, inside = agent_of(), agent_of()
    for _ in range(4):
        step(outside)
        with torch.inference_mode():
            step(inside)
    assert_same(outside.state_dict(), inside.state_dict())


@pytest.mark.parametrize("saved_after", [0, 2, 7])
def test_a_restored_agent_goes_on_bit_for_bit(saved_after):
    agent = agent_of()
    for _ in range(saved_after):
        step(agent)
    state, file = agent.state_dict(), io.BytesIO()
    torch.save(state, file)
    going_on = [step(agent) for _ in range(5)]

    file.seek(0)
    stored = torch.load(file, weights_only=True)
    assert_same(stored, state)  # which going on left as it was
    restored = agent_of(seed=99)
    restored.load_state_dict(stored)
    assert_same([step(restored) for _ in range(5)], going_on)
    assert_same(restored.state_dict(), agent.state_dict())


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden_size": 0}, "hidden_size is 0, expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"buffer_size": 0}, "buffer_size is 0, expected at least 1"),
        ({"learning_starts": -1}, "learning_starts is -1, expected at least 0"),
        ({"actor_lr": 0.0}, "actor_lr is 0.0, expected a finite number above 0"),
        ({"critic_lr": math.inf}, "critic_lr is inf, expected a finite number above 0"),
        ({"tau": 0.0}, r"tau is 0.0, expected a number in \(0, 1\]"),
        ({"noise_decay": 1.5}, r"noise_decay is 1.5, expected a number in \(0, 1\]"),
        ({"gamma": math.nan}, r"gamma is nan, expected a number in \[0, 1\]"),
        ({"reward_momentum": 1.0}, r"reward_momentum is 1.0, expected a number in \[0, 1\)"),
        ({"exploration_noise": -1.0}, "exploration_noise is -1.0, expected a finite number of at"),
        ({"buffer_size": 63}, "no batch would ever be there. Raise buffer_size or lower batch_siz"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DDPGSettings(**wrong)


def test_an_agent_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_features is 0, expected at least 1"):
        DDPGAgent(0, SMALL)
    with pytest.raises(ValueError, match=r"seed is -1, expected an integer in \[0, 2\*\*63\)"):
        DDPGAgent(3, SMALL, seed=-1)


@pytest.mark.parametrize("state", [torch.zeros(5), torch.zeros(1, 6), torch.full((6,), math.nan)])
def test_a_state_of_another_kind_is_refused(state):
    agent = agent_of()
    for ask in (agent.act, lambda s: agent.explore(s, 0.1), agent.acting_copy().act):
        with pytest.raises(ValueError, match="expected 6 finite numbers"):
            ask(state)


def test_an_episode_before_the_first_has_no_noise():
    with pytest.raises(ValueError, match="episode is -1, expected at least 0"):
        agent_of().noise_at(-1)


@pytest.mark.parametrize(
    ("states", "actions", "reward", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3), 0.5, r"expected \[T, 6\] and \[T\]"),
        (torch.zeros(3, 6), torch.zeros(3, 1), 0.5, r"shapes \[3, 6\] and \[3, 1\], expected"),
        (torch.zeros(3, 6), torch.zeros(2), 0.5, r"shapes \[3, 6\] and \[2\], expected"),
        (torch.zeros(0, 6), torch.zeros(0), 0.5, "has 0 steps, expected 1 to buffer_size = 24"),
        (torch.zeros(25, 6), torch.zeros(25), 0.5, "has 25 steps, expected 1 to buffer_size = 24"),
        (torch.full((1, 6), math.inf), torch.zeros(1), 0.5, "states hold NaN or infinity"),
        (torch.zeros(1, 6), torch.tensor([1.5]), 0.5, r"actions are \[1.5\], expected numbers in"),
        (torch.zeros(1, 6), torch.tensor([math.nan]), 0.5, r"actions are \[nan\], expected"),
        (torch.zeros(1, 6), torch.zeros(1), math.nan, "reward is nan, expected a finite number"),
        (torch.zeros(1, 6), torch.zeros(1), -math.inf, "reward is -inf, expected a finite number"),
    ],
)
def test_an_episode_of_another_kind_is_refused_and_not_kept(states, actions, reward, message):
    agent = agent_of()
    before = agent.state_dict()
    with pytest.raises(ValueError, match=message):
        agent.learn(states, actions, reward)
    assert_same(agent.state_dict(), before)


def test_the_state_of_another_agent_is_refused():
    agent = agent_of()
    state = agent.state_dict()
    with pytest.raises(ValueError, match="saved agent has num_features = 6 and this one 4; go on"):
        DDPGAgent(4, SMALL).load_state_dict(state)
    with pytest.raises(ValueError, match=r"saved agent has tau = 0.01 and this one 0.5; go on"):
        agent_of(replace(SMALL, tau=0.5)).load_state_dict(state)

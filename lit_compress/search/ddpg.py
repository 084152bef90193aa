"""Deep deterministic policy gradient for episodes with one reward, as AMC uses it.

Lillicrap et al. 2016, "Continuous control with deep reinforcement learning", algorithm 1, with what
He et al. 2018, "AMC", section 3.1, made of it: an action is a preserve ratio, noise is a truncated
normal, every step of an episode has the episode's final reward, and a moving mean of the rewards is
subtracted. An actor learns ``a = actor(s)`` from a critic, and the critic learns

    critic(s_t, a_t) = reward - mean + gamma * critic'(s_t+1, actor'(s_t+1))

from episodes that were kept, where ``'`` marks copies that follow slowly and the last step has no
next one. Networks are small and live on the CPU in float32. All randomness is the agent's own:
torch's global generator is neither read nor advanced.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_compress.search.actor_critic import Actor, Critic, follow
from lit_compress.search.replay import Replay

__all__ = ["DDPGAgent", "DDPGSettings", "Losses", "truncated_normal"]


@dataclass(frozen=True)
class DDPGSettings:
    """What the agent learns with; the defaults are AMC's.

    Attributes:
        hidden_size: Width of the two hidden layers of actor and critic, at least 1.
        actor_lr: Adam's learning rate for the actor, above 0.
        critic_lr: Adam's learning rate for the critic, above 0.
        tau: How far the slow copies go towards the networks in one update, in (0, 1].
        gamma: What the next step's value counts, in [0, 1].
        batch_size: Transitions in one update, at least 1.
        buffer_size: Transitions that are kept, at least ``batch_size``; the oldest go first.
        learning_starts: Episodes before the first update, at least 0; meant for random actions.
        exploration_noise: Standard deviation of the noise in the first episode after them, at
            least 0.
        noise_decay: What the noise is multiplied by after each episode, in (0, 1].
        reward_momentum: What the mean of the rewards keeps at each new reward, in [0, 1).

    Raises:
        ValueError: If a value is out of range.
    """

    hidden_size: int = 300
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    tau: float = 0.01
    gamma: float = 1.0
    batch_size: int = 64
    buffer_size: int = 2000
    learning_starts: int = 100
    exploration_noise: float = 0.5
    noise_decay: float = 0.95
    reward_momentum: float = 0.95

    def __post_init__(self) -> None:
        for name in ("hidden_size", "batch_size", "buffer_size"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        self._check("learning_starts", self.learning_starts >= 0, "at least 0")
        for name in ("actor_lr", "critic_lr"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a finite number above 0")
        for name in ("tau", "noise_decay"):
            self._check(name, 0 < getattr(self, name) <= 1, "a number in (0, 1]")
        self._check("gamma", 0 <= self.gamma <= 1, "a number in [0, 1]")
        self._check("reward_momentum", 0 <= self.reward_momentum < 1, "a number in [0, 1)")
        noise = self.exploration_noise
        self._check("exploration_noise", 0 <= noise < math.inf, "a finite number of at least 0")
        if self.buffer_size < self.batch_size:
            raise ValueError(
                f"buffer_size is {self.buffer_size} and batch_size {self.batch_size}: no batch "
                "would ever be there. Raise buffer_size or lower batch_size."
            )

    def _check(self, name: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}.")


def truncated_normal(mean: float, std: float, quantile: float) -> float:
    """A quantile of the normal distribution cut to [0, 1]: sampling without rejection.

    With ``Phi`` the distribution function of the normal distribution before the cut, the result is
    ``Phi^-1(Phi(0) + quantile * (Phi(1) - Phi(0)))``.

    Args:
        mean: Where the normal distribution lies, in [0, 1].
        std: Its standard deviation before the cut, at least 0; with 0 the mean is returned.
        quantile: In [0, 1]; uniform numbers give samples.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> truncated_normal(0.5, 0.2, 0.0), truncated_normal(0.5, 0.2, 1.0)
        (0.0, 1.0)
        >>> round(truncated_normal(0.0, 0.1, 0.5), 4)
        0.0674
    """
    if not (0 <= mean <= 1 and 0 <= std < math.inf and 0 <= quantile <= 1):
        raise ValueError(
            f"mean, std and quantile are {mean}, {std} and {quantile}; expected mean and quantile "
            "in [0, 1] and a finite std of at least 0."
        )
    if std == 0:
        return mean
    if quantile == 0 or quantile == 1:
        return float(quantile)
    # What is wider than this is uniform up to 1e-9, and differences of Phi would lose their digits.
    normal = NormalDist(mean, min(std, 1e4))
    lowest, highest = normal.cdf(0.0), normal.cdf(1.0)
    share = lowest + quantile * (highest - lowest)
    # Rounding may reach the ends, where the inverse is infinite.
    share = min(max(share, math.ulp(0.0)), 1.0 - math.ulp(0.5))
    return min(max(normal.inv_cdf(share), 0.0), 1.0)


class Losses(NamedTuple):
    """Means over the updates of one episode."""

    critic: float  # squared error of the values
    actor: float  # minus the value of the actor's own actions


class DDPGAgent:
    """An actor that is asked for actions and learns from finished episodes.

    One thread may :meth:`learn` while another asks an :meth:`acting_copy` taken before and draws
    with :meth:`explore` from that copy; everything else wants the agent to itself.

    Args:
        num_features: Length of a state, at least 1.
        settings: What the agent learns with.
        seed: At least 0. Agents with the same seed and the same episodes do the same.

    Raises:
        ValueError: If ``num_features`` or ``seed`` is out of range.
    """

    def __init__(
        self, num_features: int, settings: DDPGSettings | None = None, seed: int = 0
    ) -> None:
        if num_features < 1:
            raise ValueError(f"num_features is {num_features}, expected at least 1.")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed is {seed}, expected an integer in [0, 2**63).")
        self.num_features = num_features
        self.settings = settings = settings or DDPGSettings()
        self.num_episodes = 0
        self.mean_reward: float | None = None
        # Learning and acting draw from streams of their own: they may run in two threads.
        self._learning_draws = torch.Generator().manual_seed(seed)
        self._acting_draws = torch.Generator().manual_seed(
            int(torch.randint(2**62, (), generator=self._learning_draws, device="cpu"))
        )
        sizes = (num_features, settings.hidden_size)
        self._actor = Actor(*sizes, self._learning_draws)
        self._critic = Critic(*sizes, self._learning_draws)
        self._slow_actor = copy.deepcopy(self._actor).requires_grad_(False)
        self._slow_critic = copy.deepcopy(self._critic).requires_grad_(False)
        # Fused: with networks this small, a third of the time of an update otherwise.
        self._actor_optimizer = torch.optim.Adam(
            self._actor.parameters(), settings.actor_lr, fused=True
        )
        self._critic_optimizer = torch.optim.Adam(
            self._critic.parameters(), settings.critic_lr, fused=True
        )
        self._replay = Replay(settings.buffer_size, num_features)

    # --- Acting -----------------------------------------------------------------------------------

    def act(self, state: Tensor) -> float:
        """What the actor thinks best; see :meth:`Actor.act`."""
        return self._actor.act(state)

    def explore(self, state: Tensor, noise: float, actor: Actor | None = None) -> float:
        """An action near the actor's: normal around it, cut to [0, 1].

        Args:
            state: Of shape ``[num_features]``, each number in [0, 1].
            noise: Standard deviation before the cut, at least 0; see :meth:`noise_at`.
            actor: An :meth:`acting_copy` to ask in place of the actor that learns.

        Raises:
            ValueError: If the state or the noise is not of this kind.
        """
        best = (actor or self._actor).act(state)
        return truncated_normal(best, noise, self.random_action())

    def random_action(self) -> float:
        """A uniform number in [0, 1)."""
        draw = torch.rand((), generator=self._acting_draws, dtype=torch.float64, device="cpu")
        return float(draw)

    def noise_at(self, episode: int) -> float:
        """The standard deviation of the noise in an episode, counted from 0.

        ``exploration_noise`` up to the first episode after ``learning_starts`` random ones, then a
        factor of ``noise_decay`` less in each.

        Raises:
            ValueError: If the episode is below 0.
        """
        if episode < 0:
            raise ValueError(f"episode is {episode}, expected at least 0.")
        late = max(episode - self.settings.learning_starts, 0)
        return self.settings.exploration_noise * self.settings.noise_decay**late

    def acting_copy(self) -> Actor:
        """The actor as it is now; it does not change when the agent learns."""
        return copy.deepcopy(self._actor).requires_grad_(False)

    # --- Learning ---------------------------------------------------------------------------------

    def learn(self, states: Tensor, actions: Tensor, reward: float) -> Losses | None:
        """Keep a finished episode, and make one update for each of its steps.

        The moving mean starts at the first reward and follows each new one. It is subtracted when a
        batch is drawn, from old and new rewards alike, so that they stay comparable.

        Args:
            states: What was seen, ``[T, num_features]``, each number in [0, 1].
            actions: What was carried out, ``[T]``, each number in [0, 1].
            reward: Of the whole episode.

        Returns:
            The mean losses; ``None`` where there was no update, that is in the first
            ``learning_starts`` episodes and while there are fewer steps than a batch needs.

        Raises:
            ValueError: If shapes do not fit, the episode is empty or longer than ``buffer_size``,
                actions are outside [0, 1], or a number is NaN or infinite. Nothing is kept then.
        """
        self._check_episode(states, actions, reward)
        mean = reward if self.mean_reward is None else self.mean_reward
        self.mean_reward = reward + self.settings.reward_momentum * (mean - reward)
        self._replay.add(states, actions, reward)
        self.num_episodes += 1
        is_early = self.num_episodes <= self.settings.learning_starts
        if is_early or len(self._replay) < self.settings.batch_size:
            return None
        with torch.inference_mode(False), torch.enable_grad():
            losses = [self._update(self.mean_reward) for _ in range(len(actions))]
        critic, actor = torch.tensor(losses, dtype=torch.float64).mean(0).tolist()
        return Losses(critic, actor)

    def _update(self, mean_reward: float) -> Losses:
        """One step of critic, actor and slow copies."""
        batch = self._replay.sample(self.settings.batch_size, self._learning_draws)
        with torch.no_grad():
            to_come = self._slow_critic(batch.next_states, self._slow_actor(batch.next_states))
            to_come = torch.where(batch.is_last, 0.0, to_come)
            values = batch.rewards - mean_reward + self.settings.gamma * to_come

        critic_loss = F.mse_loss(self._critic(batch.states, batch.actions), values)
        self._critic_optimizer.zero_grad()
        critic_loss.backward()  # type: ignore[no-untyped-call]
        self._critic_optimizer.step()

        actor_loss = -self._critic(batch.states, self._actor(batch.states)).mean()
        self._actor_optimizer.zero_grad()
        actor_loss.backward(inputs=list(self._actor.parameters()))
        self._actor_optimizer.step()

        follow(self._slow_actor, self._actor, self.settings.tau)
        follow(self._slow_critic, self._critic, self.settings.tau)
        return Losses(critic_loss.item(), actor_loss.item())

    def _check_episode(self, states: Tensor, actions: Tensor, reward: float) -> None:
        steps, most = len(actions), self.settings.buffer_size
        if actions.shape != (steps,) or states.shape != (steps, self.num_features):
            raise ValueError(
                f"states and actions have the shapes {list(states.shape)} and "
                f"{list(actions.shape)}, expected [T, {self.num_features}] and [T]."
            )
        if not 1 <= steps <= most:
            raise ValueError(
                f"the episode has {steps} steps, expected 1 to buffer_size = {most}; raise "
                "buffer_size for longer ones."
            )
        if not states.isfinite().all():
            raise ValueError("the states hold NaN or infinity, expected numbers in [0, 1].")
        if not ((actions >= 0) & (actions <= 1)).all():
            raise ValueError(f"the actions are {actions.tolist()}, expected numbers in [0, 1].")
        if not math.isfinite(reward):
            raise ValueError(
                f"the reward is {reward}, expected a finite number; leave the episode out."
            )

    # --- State ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that later episodes depend on, as copies: plain data and tensors."""
        state = {
            "num_features": self.num_features,
            "settings": asdict(self.settings),
            "num_episodes": self.num_episodes,
            "mean_reward": self.mean_reward,
            "replay": self._replay.state_dict(),
            **{name: part.state_dict() for name, part in self._parts.items()},
            **{name: draws.get_state() for name, draws in self._draws.items()},
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the agent that wrote the state was, bit for bit.

        Raises:
            ValueError: If that agent had another length of states or other settings.
        """
        ours = {"num_features": self.num_features, **asdict(self.settings)}
        theirs = {"num_features": state["num_features"], **state["settings"]}
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"the saved agent has {name} = {theirs.get(name)} and this one "
                    f"{ours.get(name)}; go on with the problem and the settings that it had."
                )
        self.num_episodes, self.mean_reward = state["num_episodes"], state["mean_reward"]
        self._replay.load_state_dict(state["replay"])
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        for name, draws in self._draws.items():
            draws.set_state(state[name].cpu())

    @property
    def _parts(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {
            "actor": self._actor,
            "critic": self._critic,
            "slow_actor": self._slow_actor,
            "slow_critic": self._slow_critic,
            "actor_optimizer": self._actor_optimizer,
            "critic_optimizer": self._critic_optimizer,
        }

    @property
    def _draws(self) -> dict[str, torch.Generator]:
        return {"learning_draws": self._learning_draws, "acting_draws": self._acting_draws}

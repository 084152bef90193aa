"""The replay buffer of DDPG: steps of finished episodes, sampled in batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Replay", "Transitions"]

_PLACE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


class Transitions(NamedTuple):
    """Steps of episodes, ``n`` of them: ``next_states`` means nothing where ``is_last``."""

    states: Tensor  # [n, num_features]
    actions: Tensor  # [n]
    rewards: Tensor  # [n]
    next_states: Tensor  # [n, num_features]
    is_last: Tensor  # [n], bool


class Replay:
    """The newest transitions, in a ring.

    Episodes lie one after another, so that the next state of a step is the state in the next row,
    also where the ring closes, and also in an episode whose beginning was overwritten.

    Args:
        size: Transitions that are kept.
        num_features: Length of a state.
    """

    def __init__(self, size: int, num_features: int) -> None:
        self._states = torch.zeros(size, num_features, **_PLACE)
        self._actions = torch.zeros(size, **_PLACE)
        self._rewards = torch.zeros(size, **_PLACE)
        self._is_last = torch.zeros(size, dtype=torch.bool, device="cpu")
        self._added = 0  # ever, so that the next row is this modulo the size

    def __len__(self) -> int:
        return min(self._added, len(self._actions))

    def add(self, states: Tensor, actions: Tensor, reward: float) -> None:
        """Keep an episode, in place of the oldest steps where the ring is full.

        Args:
            states: ``[T, num_features]``, with ``T`` at most the ring's size.
            actions: ``[T]``, as they were carried out.
            reward: Of the whole episode; every step gets it.
        """
        steps = len(actions)
        rows = (torch.arange(steps, device="cpu") + self._added) % len(self._actions)
        self._states[rows] = states.to(**_PLACE)
        self._actions[rows] = actions.to(**_PLACE)
        self._rewards[rows] = reward
        self._is_last[rows] = torch.arange(steps, device="cpu") == steps - 1
        self._added += steps

    def sample(self, count: int, generator: torch.Generator) -> Transitions:
        """Draw ``count`` different transitions, at most ``len(self)``."""
        rows = torch.randperm(len(self), generator=generator, device="cpu")[:count]
        following = self._states[(rows + 1) % len(self._actions)]
        return Transitions(
            self._states[rows], self._actions[rows], self._rewards[rows], following,
            self._is_last[rows],
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Copies of the rows in use."""
        used = len(self)
        tensors = {"states": self._states, "actions": self._actions, "rewards": self._rewards}
        tensors["is_last"] = self._is_last
        return {"added": self._added, **{name: t[:used].clone() for name, t in tensors.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the rows that a ring of the same size held."""
        used = len(state["actions"])
        self._states[:used] = state["states"]
        self._actions[:used] = state["actions"]
        self._rewards[:used] = state["rewards"]
        self._is_last[:used] = state["is_last"]
        self._added = state["added"]

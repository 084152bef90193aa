"""The actor and the critic of DDPG, and soft updates of their targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Actor", "Critic", "follow"]


class Actor(nn.Module):
    """From what is seen to what is done: two hidden layers, ReLU, and a sigmoid.

    Args:
        num_features: Length of a state.
        hidden_size: Width of the hidden layers.
        generator: Where the first weights come from.
    """

    def __init__(self, num_features: int, hidden_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = _linear(num_features, hidden_size, generator)
        self.second = _linear(hidden_size, hidden_size, generator)
        self.last = _linear(hidden_size, 1, generator)

    def forward(self, states: Tensor) -> Tensor:
        """Actions ``[...]`` in [0, 1] for states ``[..., num_features]``."""
        hidden = F.relu(self.second(F.relu(self.first(states))))
        return torch.sigmoid(self.last(hidden)).squeeze(-1)

    @torch.no_grad()
    def act(self, state: Tensor) -> float:
        """The action, in [0, 1], for one state.

        Args:
            state: Of shape ``[num_features]``, each number in [0, 1].

        Raises:
            ValueError: If the state has another shape or holds NaN or infinity.
        """
        if state.shape != (self.first.in_features,) or not state.isfinite().all():
            raise ValueError(
                f"the state is {state.tolist()}, expected {self.first.in_features} finite numbers."
            )
        return float(self(state.to("cpu", torch.float32)))


class Critic(nn.Module):
    """From a state and an action to the sum of rewards still to come.

    The action joins at the first hidden layer's sum, as in AMC. It has weights of its own, so that
    it starts as strong as all features of the state together.

    Args:
        num_features: Length of a state.
        hidden_size: Width of the hidden layers.
        generator: Where the first weights come from.
    """

    def __init__(self, num_features: int, hidden_size: int, generator: torch.Generator) -> None:
        super().__init__()
        self.first = _linear(num_features, hidden_size, generator)
        self.action = _linear(1, hidden_size, generator)
        self.second = _linear(hidden_size, hidden_size, generator)
        self.last = _linear(hidden_size, 1, generator)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Values ``[n]`` for states ``[n, num_features]`` and actions ``[n]``."""
        hidden = F.relu(self.first(states) + self.action(actions.unsqueeze(-1)))
        return torch.as_tensor(self.last(F.relu(self.second(hidden)))).squeeze(-1)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with torch's usual first weights, drawn from ``generator``."""
    # On "meta" no numbers are drawn, and none from the global generator.
    layer = nn.Linear(inputs, outputs, dtype=torch.float32, device="meta").to_empty(device="cpu")
    for p in layer.parameters():
        nn.init.uniform_(p, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


@torch.no_grad()
def follow(slow: nn.Module, network: nn.Module, tau: float) -> None:
    """Move a slow copy towards its network: ``slow <- (1 - tau) * slow + tau * network``.

    Source: Lillicrap et al. 2016, algorithm 1, last lines.

    Args:
        slow: A copy of the network; changed in place.
        network: What it follows.
        tau: How far, in [0, 1]; with 1 the copy equals the network.
    """
    pairs = zip(slow.parameters(), network.parameters(), strict=True)
    ours, theirs = zip(*pairs, strict=True)
    torch._foreach_lerp_(ours, theirs, tau)

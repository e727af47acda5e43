"""TD3's policy; its critics are plain SAC's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Actor(nn.Module):
    """Observations (B, D) to a mean before tanh, (B, A), and a log standard deviation of minus infinity."""

    def __init__(self, observation_dim: int, action_dim: int, width: int) -> None:
        super().__init__()
        self.observation_dim = observation_dim
        # `rlplastic.export` can read a chain of torch's own layers under this name.
        self.mean = nn.Sequential(
            nn.Linear(observation_dim, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, action_dim),
        )

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """A policy that is deterministic."""
        mean = self.mean(observation)
        return mean, torch.full_like(mean, -math.inf)


def actor_like(state: Mapping[str, Tensor]) -> Actor:
    """An actor of the sizes of saved tensors."""
    width, observation_dim = state["mean.0.weight"].shape
    return Actor(observation_dim, len(state["mean.4.bias"]), width)

"""Actor and critic of FlashSAC (arXiv 2604.04539): a norm-bounded trunk and a head each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlplastic.agents.heads import CategoricalHead, GaussianHead
from rlplastic.agents.layers import Trunk


class Actor(nn.Module):
    """Policy observations (B, D) to the mean and log standard deviation of an unsquashed Gaussian."""

    def __init__(self, observation_dim: int, action_dim: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.observation_dim = observation_dim
        self.trunk = Trunk(observation_dim, width, num_blocks)
        self.head = GaussianHead(width, action_dim)

    def forward(self, observation: Tensor, batch_statistics: bool = False, bf16: bool = False) -> tuple[Tensor, Tensor]:
        """Mean (B, A) and log_std (B, A)."""
        mean, log_std = self.head(self.trunk(observation.mT, batch_statistics, bf16))
        return mean, log_std


class Critic(nn.Module):
    """An ensemble of categorical critics as one batched module."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        width: int,
        num_blocks: int,
        num_atoms: int,
        support: float,
        members: int,
    ) -> None:
        super().__init__()
        self.trunk = Trunk(observation_dim + action_dim, width, num_blocks, members)
        self.head = CategoricalHead(width, num_atoms, support, members)

    def forward(self, observation: Tensor, action: Tensor, batch_statistics: bool, bf16: bool = False) -> Tensor:
        """(B, D) and (B, A) to logits (members, B, num_atoms)."""
        x = torch.cat((observation.mT, action.mT))
        logits: Tensor = self.head(self.trunk(x, batch_statistics, bf16))
        return logits


def actor_like(state: Mapping[str, Tensor]) -> Actor:
    """An actor of the sizes of saved tensors, initialised anew.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has another number of dimensions.
    """
    width, observation_dim = state["trunk.embed.weight"].shape
    blocks = {name.split(".")[2] for name in state if name.startswith("trunk.blocks.")}
    return Actor(observation_dim, len(state["head.mean_bias"]), width, len(blocks))

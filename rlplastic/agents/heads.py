"""Output heads and the closed forms that go with them: categorical values and squashed Gaussian actions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlplastic.agents.layers import UnitLinear

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0


class CategoricalHead(nn.Module):
    """Logits over fixed atoms: unit rows plus a free bias that starts at 0 (FlashSAC; C51, arXiv 1707.06887)."""

    atoms: Tensor

    def __init__(self, width: int, num_atoms: int, support: float, members: int | None = None) -> None:
        super().__init__()
        self.support = support
        self.linear = UnitLinear(width, num_atoms, members)
        self.bias = nn.Parameter(torch.zeros(*(() if members is None else (members,)), num_atoms))
        self.register_buffer("atoms", torch.linspace(-support, support, num_atoms), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., width, B) to logits (..., B, num_atoms)."""
        return self.linear.to_rows(features) + self.bias.unsqueeze(-2)

    def expected(self, logits: Tensor) -> Tensor:
        """The value sum_k p_k v_k of logits (..., num_atoms), shape (...)."""
        return (F.softmax(logits, -1) * self.atoms).sum(-1)


class GaussianHead(nn.Module):
    """Mean and log standard deviation of an unsquashed Gaussian; unit rows plus free biases."""

    def __init__(self, width: int, action_dim: int) -> None:
        super().__init__()
        self.mean = UnitLinear(width, action_dim)
        self.mean_bias = nn.Parameter(torch.zeros(action_dim))
        self.spread = UnitLinear(width, action_dim)
        self.spread_bias = nn.Parameter(torch.zeros(action_dim))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (width, B) to mean and log_std, both (B, action_dim); log_std lies in [-10, 2]."""
        mean = self.mean.to_rows(features) + self.mean_bias
        spread = torch.tanh(self.spread.to_rows(features) + self.spread_bias)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (1 + spread)


def squashed_sample(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Action tanh(u), u = mean + std * noise, and its log-probability.

    The change of variables uses log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), exact for large |u|.

    Args:
        mean: (B, A).
        log_std: (B, A).
        noise: standard normal, (B, A).

    Returns:
        Action (B, A) in (-1, 1) and log pi (B,).
    """
    unsquashed = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    jacobian = 2 * (math.log(2) - unsquashed - F.softplus(-2 * unsquashed))
    return torch.tanh(unsquashed), (gaussian - jacobian).sum(-1)

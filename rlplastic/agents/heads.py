"""What networks end with: outputs that represent a value, and squashed Gaussian actions.

A critic's outputs and what they mean are two things, so that both agents learn either representation: `Categorical`
and `Scalar` say what value outputs have, where the next state's say that they should go, and how far they are from it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlplastic.agents.layers import UnitLinear
from rlplastic.kernels.categorical import categorical_target, categorical_target_triton

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0


class Categorical(nn.Module):
    """Logits over fixed atoms (C51, arXiv 1707.06887): cross-entropy against the projected target.

    Args:
        num_atoms: K.
        support: atoms are linspace(-support, support, K).
        kernels: "torch", or "triton" for a projection in one launch on a GPU.
    """

    atoms: Tensor

    def __init__(self, num_atoms: int, support: float, kernels: str = "torch") -> None:
        super().__init__()
        self.num_outputs, self.support, self._kernels = num_atoms, support, kernels
        self.register_buffer("atoms", torch.linspace(-support, support, num_atoms), persistent=False)

    def expected(self, logits: Tensor) -> Tensor:
        """The value sum_k p_k v_k of logits (..., K), shape (...)."""
        return (F.softmax(logits, -1) * self.atoms).sum(-1)

    def target(self, logits: Tensor, reward: Tensor, discount: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
        """Target probabilities (B, K) and their mean (B,) before clipping, of the next state's logits (members, B, K).

        The other arguments are (B,), and explained with `rlplastic.kernels.categorical.categorical_target`.
        """
        project = categorical_target_triton if self._kernels == "triton" else categorical_target
        target, mean = project(logits, reward, discount, bonus, self.atoms, self.support)
        return target, mean

    def losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy (members, B) of logits (members, B, K) against ``target`` (B, K)."""
        return -(target * F.log_softmax(logits, -1)).sum(-1)


class Scalar(nn.Module):
    """One number: squared error against the smaller member's discounted value (SAC, arXiv 1812.05905)."""

    num_outputs = 1
    support = math.inf

    def expected(self, values: Tensor) -> Tensor:
        """The outputs are the values."""
        return values

    def target(self, values: Tensor, reward: Tensor, discount: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
        """y = r + discount (min Q' + bonus), (B,), twice: as target and as its mean; values are (members, B)."""
        target = reward + discount * (values.amin(0) + bonus)
        return target, target

    def losses(self, values: Tensor, target: Tensor) -> Tensor:
        """(Q - y)^2 of values (members, B) and ``target`` (B,)."""
        return (values - target).square()


Values = Categorical | Scalar


class UnitHead(nn.Module):
    """A norm-bounded critic's outputs: unit rows plus a free bias that starts at 0 (FlashSAC)."""

    def __init__(self, width: int, num_outputs: int, members: int | None = None) -> None:
        super().__init__()
        self.linear = UnitLinear(width, num_outputs, members)
        self.bias = nn.Parameter(torch.zeros(*(() if members is None else (members,)), num_outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Features (..., width, B) to (..., B, num_outputs)."""
        return self.linear.to_rows(features) + self.bias.unsqueeze(-2)


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

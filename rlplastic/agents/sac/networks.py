"""Actor and critics of plain SAC (arXiv 1812.05905): ReLU layers, optionally with layer normalisation before each ReLU.

As in FlashSAC's layers, ``members=N`` puts a leading dimension N before every parameter: twin critics are one module
and one batched product. Activations lie rows first here, (N, B, dim), since no norm sums over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlplastic.agents.flow import BINS, Encoding, FlowCritic, Velocity
from rlplastic.agents.heads import Categorical, Scalar, Values
from rlplastic.config import CategoricalCriticConfig, CriticConfig, FlowCriticConfig

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


class Linear(nn.Module):
    """Affine map, initialised as ``torch.nn.Linear``: weights and biases uniform within 1/sqrt(in_features)."""

    def __init__(self, in_features: int, out_features: int, members: int | None = None) -> None:
        super().__init__()
        lead = () if members is None else (members,)
        bound = 1 / math.sqrt(in_features)
        self.weight = nn.Parameter(torch.empty(*lead, out_features, in_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*lead, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., B, in_features) to (..., B, out_features)."""
        if self.weight.ndim == 2:
            return F.linear(x, self.weight, self.bias)
        shared = x.expand(len(self.weight), *x.shape[-2:])
        return torch.baddbmm(self.bias.unsqueeze(-2), shared, self.weight.mT)


class LayerNorm(nn.Module):
    """Layer normalisation (arXiv 1607.06450) with a gain and a bias per member."""

    def __init__(self, dim: int, members: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        lead = () if members is None else (members,)
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(*lead, dim))
        self.bias = nn.Parameter(torch.zeros(*lead, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every row of (..., B, dim)."""
        normalised = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return normalised * self.gain.unsqueeze(-2) + self.bias.unsqueeze(-2)


def trunk(input_dim: int, width: int, depth: int, layer_norm: bool, members: int | None = None) -> nn.Sequential:
    """``depth`` hidden layers of ``width``: linear, layer normalisation if asked for, ReLU."""
    layers: list[nn.Module] = []
    for index in range(depth):
        layers.append(Linear(width if index else input_dim, width, members))
        if layer_norm:
            layers.append(LayerNorm(width, members))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class Actor(nn.Module):
    """Policy observations (B, D) to the mean and log standard deviation of an unsquashed Gaussian."""

    def __init__(self, observation_dim: int, action_dim: int, width: int, depth: int, layer_norm: bool = False) -> None:
        super().__init__()
        self.observation_dim = observation_dim
        self.trunk = trunk(observation_dim, width, depth, layer_norm)
        self.mean = Linear(width, action_dim)
        self.log_std = Linear(width, action_dim)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, A) and log_std (B, A), cut off to [-20, 2]."""
        features = self.trunk(observation)
        return self.mean(features), self.log_std(features).clamp(LOG_STD_MIN, LOG_STD_MAX)


class Critic(nn.Module):
    """An ensemble of critics as one batched module; ``values`` says what the outputs mean."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        width: int,
        depth: int,
        values: Values,
        members: int,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.trunk = trunk(observation_dim + action_dim, width, depth, layer_norm, members)
        self.head = Linear(width, values.num_outputs, members)
        self.values, self.support = values, values.support

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """(B, D) and (B, A) to values (members, B), or to logits (members, B, num_atoms)."""
        outputs: Tensor = self.head(self.trunk(torch.cat((observation, action), -1)))
        return outputs.squeeze(-1)

    def value(self, observation: Tensor, action: Tensor) -> Tensor:
        """What an actor climbs: the smaller of the members' values, (B,)."""
        return self.values.expected(self(observation, action)).amin(0)


class VelocityField(nn.Module):
    """Velocities v(t, z | s, a) of an ensemble of flows, from [s; a; code of z; cosines of t]: `rlplastic.agents.flow`.

    What [s; a] adds to the first layer is computed once for all noises and Euler steps.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        width: int,
        depth: int,
        settings: FlowCriticConfig,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoding = Encoding(settings.support, settings.time_embedding, dim=-1)
        self._inputs = [observation_dim + action_dim, BINS, self.encoding.num_times]
        self.trunk = trunk(sum(self._inputs), width, depth, layer_norm, settings.num_members)
        self.head = Linear(width, 1, settings.num_members)

    @property
    def num_inputs(self) -> int:
        """Dimensions of [s; a]."""
        return self._inputs[0]

    @property
    def _first(self) -> Linear:
        first = self.trunk[0]
        assert isinstance(first, Linear)
        return first

    def given(self, observation: Tensor, action: Tensor) -> Velocity:
        """The velocity at observations (B, D) and actions (B, A), or (m, B, A) where each noise has its own."""
        pairs = torch.cat((observation.expand(*action.shape[:-1], -1), action), -1)
        of_pairs, _, _ = torch.split(self._first.weight, self._inputs, -1)
        context = _product(pairs.view(-1, *pairs.shape[-2:]), of_pairs)
        return partial(self, context + self._first.bias[:, None, None])

    def forward(self, context: Tensor, z: Tensor, time: Tensor) -> Tensor:
        """What [s; a] adds, (members, 1 or m, B, H), z and time as in `Velocity`, to (members, m, B)."""
        _, of_code, of_time = torch.split(self._first.weight, self._inputs, -1)
        hidden = context + _product(self.encoding.code(z), of_code)
        hidden = hidden + _product(self.encoding.time(time), of_time)
        features = hidden.flatten(1, 2)
        for layer in list(self.trunk)[1:]:
            features = layer(features)
        return torch.unflatten(self.head(features), 1, hidden.shape[1:3]).squeeze(-1)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """(…, m, B, in) by (members, out, in) to (members, m, B, out)."""
    return torch.unflatten(x.flatten(-3, -2) @ weight.mT, -2, x.shape[-3:-1])


def make_critic(
    observation_dim: int, action_dim: int, width: int, depth: int, critic: CriticConfig, layer_norm: bool = False
) -> Critic | FlowCritic:
    """The critic of a value representation."""
    sizes = observation_dim, action_dim, width, depth
    if isinstance(critic, FlowCriticConfig):
        field = VelocityField(*sizes, critic, layer_norm)
        regressed = critic.reading == "distilled"
        distilled = Critic(*sizes, Scalar(), critic.num_members, layer_norm) if regressed else None
        return FlowCritic(field, distilled, critic)
    if isinstance(critic, CategoricalCriticConfig):
        values: Values = Categorical(critic.num_atoms, critic.support)
        return Critic(*sizes, values, critic.num_members, layer_norm)
    return Critic(*sizes, Scalar(), critic.num_members, layer_norm)


def actor_like(state: Mapping[str, Tensor]) -> Actor:
    """An actor of the sizes of saved tensors, initialised anew.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has another number of dimensions.
    """
    width, observation_dim = state["trunk.0.weight"].shape
    depth = sum(name.startswith("trunk.") and value.ndim == 2 for name, value in state.items())
    normed = any(name.startswith("trunk.") and name.endswith(".gain") for name in state)
    return Actor(observation_dim, len(state["mean.bias"]), width, depth, normed)

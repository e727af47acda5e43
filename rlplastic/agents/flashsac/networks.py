"""Actor and critics of FlashSAC (arXiv 2604.04539): a norm-bounded trunk and a head each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from rlplastic.agents.flow import BINS, Encoding, FlowCritic, Velocity
from rlplastic.agents.heads import Categorical, GaussianHead, Scalar, UnitHead, Values
from rlplastic.agents.layers import BatchNorm, RMSNorm, RowNormBlock, Trunk, UnitLinear
from rlplastic.config import CategoricalCriticConfig, CriticConfig, FlowCriticConfig


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
    """An ensemble of critics as one batched module; ``values`` says what the outputs mean."""

    def __init__(
        self, observation_dim: int, action_dim: int, width: int, num_blocks: int, values: Values, members: int
    ) -> None:
        super().__init__()
        self.trunk = Trunk(observation_dim + action_dim, width, num_blocks, members)
        self.head = UnitHead(width, values.num_outputs, members)
        self.values, self.support = values, values.support

    def forward(self, observation: Tensor, action: Tensor, batch_statistics: bool, bf16: bool = False) -> Tensor:
        """(B, D) and (B, A) to values (members, B), or to logits (members, B, num_atoms)."""
        x = torch.cat((observation.mT, action.mT))
        outputs: Tensor = self.head(self.trunk(x, batch_statistics, bf16))
        return outputs.squeeze(-1)

    def value(self, observation: Tensor, action: Tensor, batch_statistics: bool, bf16: bool = False) -> Tensor:
        """What an actor climbs: the smaller of the members' values, (B,)."""
        return self.values.expected(self(observation, action, batch_statistics, bf16)).amin(0)


class VelocityField(nn.Module):
    """Velocities v(t, z | s, a) of an ensemble of flows, norm-bounded: see `rlplastic.agents.flow`.

    A batch norm would mix rows of different t and z, and one that reads at a single t would see other statistics than
    one that learns at all t. So only the raw [s; a] is normalised by batch, as in `Trunk`, and everything after z and t
    came in by row. The three inputs are embedded by unit rows each: rows over all of them could not grow to hear the
    code of z, whose features are small and few beside a long observation.
    """

    def __init__(
        self, observation_dim: int, action_dim: int, width: int, num_blocks: int, settings: FlowCriticConfig
    ) -> None:
        super().__init__()
        members = settings.num_members
        self.encoding = Encoding(settings.support, settings.time_embedding, dim=-3)
        self.input_norm = BatchNorm(observation_dim + action_dim, members)
        self.embed = UnitLinear(observation_dim + action_dim, width, members)
        self.code_norm = RMSNorm(BINS, members)
        self.embed_code = UnitLinear(BINS, width, members)
        self.embed_time = UnitLinear(self.encoding.num_times, width, members) if self.encoding.num_times else None
        self.blocks = nn.ModuleList(RowNormBlock(width, members) for _ in range(num_blocks))
        self.post_norm = RMSNorm(width, members)
        self.head = UnitHead(width, 1, members)

    def given(
        self,
        observation: Tensor,
        action: Tensor,
        batch_statistics: bool,
        bf16: bool = False,
        rows: slice = slice(None),
        noises: int = 1,
    ) -> Velocity:
        """The velocity at pairs of (…, D) and (…, A).

        Batch statistics are those of all that is given, and the velocity is that at ``rows`` of it: B pairs that all
        noises share, or with ``noises`` m B pairs, those of the first noise first.
        """
        between = torch.bfloat16 if bf16 else observation.dtype
        x = self.input_norm(torch.cat((observation.mT, action.mT)), batch_statistics, dtype=between)
        context = self.embed(x[..., rows], bf16).to(observation.dtype)
        return partial(self, torch.unflatten(context, -1, (noises, -1)), bf16=bf16)

    def forward(self, context: Tensor, z: Tensor, time: Tensor, bf16: bool = False) -> Tensor:
        """Embedded pairs (members, H, 1 or m, B), z and time as in `Velocity`, to (members, m, B)."""
        code = self.embed_code(self.code_norm(self.encoding.code(z).flatten(-2)), bf16)
        hidden = context + torch.unflatten(code, -1, z.shape[-2:])
        if self.embed_time is not None:
            cosines = self.embed_time(self.encoding.time(time).flatten(-2), bf16)
            hidden = hidden + torch.unflatten(cosines, -1, time.shape[-2:])
        columns = hidden.flatten(-2)
        for block in self.blocks:
            columns = block(columns, bf16)
        velocities = self.head(self.post_norm(columns))
        return torch.unflatten(velocities, -2, hidden.shape[-2:]).squeeze(-1)


def make_critic(
    observation_dim: int, action_dim: int, width: int, num_blocks: int, critic: CriticConfig, kernels: str = "torch"
) -> Critic | FlowCritic:
    """The critic of a value representation; for ``kernels`` see `rlplastic.agents.heads.Categorical`."""
    sizes = observation_dim, action_dim, width, num_blocks
    if isinstance(critic, FlowCriticConfig):
        field = VelocityField(*sizes, critic)
        distilled = Critic(*sizes, Scalar(), critic.num_members) if critic.reading == "distilled" else None
        return FlowCritic(field, distilled, critic)
    if isinstance(critic, CategoricalCriticConfig):
        return Critic(*sizes, Categorical(critic.num_atoms, critic.support, kernels), critic.num_members)
    return Critic(*sizes, Scalar(), critic.num_members)


def actor_like(state: Mapping[str, Tensor]) -> Actor:
    """An actor of the sizes of saved tensors, initialised anew.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has another number of dimensions.
    """
    width, observation_dim = state["trunk.embed.weight"].shape
    blocks = {name.split(".")[2] for name in state if name.startswith("trunk.blocks.")}
    return Actor(observation_dim, len(state["head.mean_bias"]), width, len(blocks))

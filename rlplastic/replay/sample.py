"""What a batch is, and how it is drawn: uniform over all transitions, n-step returns, exact discounts.

For a transition at slot t, rewards are summed over k <= n steps, sum_i gamma^i r_{t+1+i}, and the critic bootstraps
from the observation k slots later with ``discount`` = gamma^k, or 0 if the episode terminated there. The sum stops
after a row that terminated or truncated and before a row that is no transition (the ring's head, the last row before a
rebuild), so k is the number of rewards really summed, and a truncation bootstraps from its true final observation.
n-step targets: Sutton, "Learning to predict by the methods of temporal differences", 1988; time limits: Pardo et al.,
"Time limits in reinforcement learning", arXiv 1712.00378.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlplastic import seeding
from rlplastic.errors import ConfigurationError
from rlplastic.replay.ring import TERMINATED, TRUNCATED, VALID, ReplayRing


@dataclass(frozen=True, slots=True)
class Batch:
    """B transitions on the ring's device, float32.

    The tensors are the sampler's own buffers: its next call overwrites them.
    """

    observation: dict[str, Tensor]
    """Groups of (B, D)."""
    action: Tensor
    """(B, A), in [-1, 1]."""
    reward: Tensor
    """(B,), the discounted sum of k rewards, times the reward scale."""
    discount: Tensor
    """(B,), gamma^k, 0 where the episode terminated."""
    next_observation: dict[str, Tensor]
    """Groups of (B, D), k steps after ``observation``."""
    rows: Tensor
    """(B, 2) int64, the (slot, column) that each transition came from; for diagnosis."""


class Sampler:
    """Draws batches from a ring into preallocated tensors, without ever waiting for the device.

    Draw d of a run is a function of (seed, rank, d) and the ring's content alone.
    """

    def __init__(self, ring: ReplayRing, batch_size: int, n_step: int, gamma: float, seed: int, rank: int = 0) -> None:
        """Allocate the buffers.

        Raises:
            ConfigurationError: ``batch_size`` exceeds the ring's capacity, or ``n_step`` or ``batch_size`` is below 1.
        """
        if not 1 <= batch_size <= ring.capacity:
            raise ConfigurationError(
                f"replay.batch_size is {batch_size:,} but the replay holds {ring.capacity:,} transitions; "
                "expected a batch between 1 and that, so lower replay.batch_size or raise replay.capacity"
            )
        if n_step < 1:
            raise ConfigurationError(
                f"agent.n_step is {n_step}; expected at least 1, so set the number of steps to sum"
            )
        self.ring, self.batch_size, self.n_step = ring, batch_size, n_step
        self._key = seeding.key("replay", seed, rank)
        device = ring.device
        # Each transition's row, and after all of them the rows of their next observations, as flat indices.
        self._flat = torch.empty(2 * batch_size, dtype=torch.int64, device=device)
        self._rows = torch.empty(2, batch_size, dtype=torch.int64, device=device)
        self._stored = {
            group: torch.empty(2 * batch_size, dim, dtype=ring.observation[group].dtype, device=device)
            for group, dim in ring.observation_dims.items()
        }
        observations = {
            group: stored if stored.dtype == torch.float32 else torch.empty(stored.shape, device=device)
            for group, stored in self._stored.items()
        }
        self._observations = observations
        self._batch = Batch(
            observation={group: both[:batch_size] for group, both in observations.items()},
            action=torch.empty(batch_size, ring.action_dim, device=device),
            reward=torch.empty(batch_size, device=device),
            discount=torch.empty(batch_size, device=device),
            next_observation={group: both[batch_size:] for group, both in observations.items()},
            rows=self._rows.T,
        )
        self._powers = torch.tensor([gamma**k for k in range(n_step + 1)], device=device)
        by_flags = [0.0 if bits & TERMINATED else gamma for bits in range(8)]
        self._discount_of_flags = torch.tensor(by_flags, device=device)
        self._ahead = torch.arange(n_step, device=device)[:, None] * ring.num_envs

    def sample(self, draw: int, reward_scale: Tensor | None = None) -> Batch:
        """Batch number ``draw``: ``batch_size`` independent uniform transitions.

        Args:
            draw: non-negative; equal draws from an equal ring give equal batches.
            reward_scale: scalar on the ring's device that the summed rewards are multiplied by.

        Raises:
            ConfigurationError: the ring holds no transition yet.
        """
        ring, size, batch = self.ring, self.batch_size, self._batch
        if ring.transitions == 0:
            raise ConfigurationError(
                "the replay holds no transition to sample; expected at least one, so raise replay.minimum"
            )
        ranks = seeding.uniform_integers(size, ring.cumulative[-1], draw, self._key, ring.device)
        rows = self._locate(ranks)
        following = self._flat[size:]
        if self.n_step == 1:
            self._one_step(rows, following)
        else:
            self._many_steps(rows, following)
        if reward_scale is not None:
            batch.reward.mul_(reward_scale)
        torch.index_select(ring.action.flatten(0, 1), 0, rows, out=batch.action)
        for group, storage in ring.observation.items():
            stored, observation = self._stored[group], self._observations[group]
            torch.index_select(storage.flatten(0, 1), 0, self._flat, out=stored)
            if stored is not observation:
                observation.copy_(stored)
        return batch

    def _locate(self, ranks: Tensor) -> Tensor:
        """Flat rows (B,) of the transitions with these ranks, as proved in `rlplastic.replay.ring`."""
        ring, (slot, column) = self.ring, self._rows
        torch.searchsorted(ring.cumulative, ranks, right=True, out=column)
        position = ring.offset.index_select(0, column).add_(ranks).remainder_(ring.num_slots)
        entry = torch.add(column, position, alpha=ring.num_envs)
        slot.copy_(ring.queue.flatten().index_select(0, entry))
        return torch.add(column, slot, alpha=ring.num_envs, out=self._flat[: self.batch_size])

    def _one_step(self, rows: Tensor, following: Tensor) -> None:
        """Reward and discount of one step; writes ``following``, the rows of the next observations."""
        ring, batch = self.ring, self._batch
        torch.add(rows, ring.num_envs, out=following).remainder_(ring.flags.numel())
        torch.index_select(ring.reward.flatten(), 0, rows, out=batch.reward)
        flags = ring.flags.flatten().index_select(0, rows).int()
        torch.index_select(self._discount_of_flags, 0, flags, out=batch.discount)

    def _many_steps(self, rows: Tensor, following: Tensor) -> None:
        """The same for n steps: all n rows ahead are read at once, and those behind the first stop are masked."""
        ring, batch = self.ring, self._batch
        ahead = (rows + self._ahead).remainder_(ring.flags.numel())  # (n, B)
        flat = ahead.flatten()
        flags = ring.flags.flatten().index_select(0, flat).view(ahead.shape)
        summed = (flags & VALID).bool()
        summed[1:] &= (flags[:-1] & (TERMINATED | TRUNCATED)) == 0
        summed = summed.cumprod(0).bool()
        rewards = ring.reward.flatten().index_select(0, flat).view(ahead.shape)
        # Masked by selection, not multiplication: what lies behind the stop may be anything.
        rewards = rewards.where(summed, torch.zeros_like(rewards)).mul_(self._powers[:-1, None])
        torch.sum(rewards, 0, out=batch.reward)
        steps = summed.sum(0)
        torch.index_select(self._powers, 0, steps, out=batch.discount)
        batch.discount.masked_fill_((summed & (flags & TERMINATED).bool()).any(0), 0.0)
        torch.add(rows, steps, alpha=ring.num_envs, out=following).remainder_(ring.flags.numel())

"""What a batch is, and how it is drawn: uniform over all transitions, n-step returns, exact discounts.

For a transition at slot t, rewards are summed over k <= n steps, sum_i gamma^i r_{t+1+i}, and the critic bootstraps
from the observation k slots later with ``discount`` = gamma^k, or 0 if the episode terminated there. The sum stops
after a row that terminated or truncated and before a row that is no transition (the ring's head, the last row before a
rebuild), so k is the number of rewards really summed, and a truncation bootstraps from its true final observation.
n-step targets: Sutton, "Learning to predict by the methods of temporal differences", 1988; time limits: Pardo et al.,
"Time limits in reinforcement learning", arXiv 1712.00378.

Two options leave uniform draws, both off by default. *Recency*: the weight of a transition halves every ``half_life``
transitions of age ("experience replay decay", Kang et al., arXiv 2507.02712, with an exponential). The column is drawn
by its number of transitions, and the age within the column. *Priorities*: see `rlplastic.replay.priority`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlplastic import seeding
from rlplastic.errors import ConfigurationError
from rlplastic.kernels.replay_sample import Draw, sample_numpy, sample_torch, sample_triton
from rlplastic.kernels.replay_tensors import implementation
from rlplastic.replay.priority import importance_weights, priorities_from_errors, uniform_fractions
from rlplastic.replay.ring import ReplayRing

PRIORITY_EPSILON = 1e-6
"""Added to every TD error, so that no transition is lost for ever (arXiv 1511.05952)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B transitions on the learner's device, float32.

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
    """(B,) int64, where in the ring each transition lies: slot * num_envs + column."""
    weight: Tensor | None = None
    """(B,) factors of the losses that undo the bias of prioritised draws; None where there is none."""


@dataclass(frozen=True)
class Prioritisation:
    """Exponents of prioritised replay (arXiv 1511.05952)."""

    priority: float
    """alpha: 0 draws uniformly, 1 in proportion to the TD error."""
    importance: float
    """beta: 1 corrects the bias fully."""


class Sampler:
    """Draws batches from a ring into preallocated tensors, without ever waiting for the device.

    Draw d of a run is a function of (seed, rank, d) and the ring's content alone.
    """

    def __init__(
        self,
        ring: ReplayRing,
        batch_size: int,
        n_step: int,
        gamma: float,
        seed: int,
        rank: int = 0,
        *,
        held_out: bool = False,
        half_life: float | None = None,
        prioritisation: Prioritisation | None = None,
        kernels: str = "auto",
        pinned: bool = False,
    ) -> None:
        """Allocate the buffers.

        Args:
            ring: what to draw from.
            batch_size: B.
            n_step: the most rewards to sum.
            gamma: discount of one step.
            seed: of the run.
            rank: of this process.
            held_out: draw from the held-out episodes instead of the others.
            half_life: age in transitions at which a transition's weight has halved; None: all weigh the same.
            prioritisation: draw by TD error; needs a ring with priorities.
            kernels: numpy, torch or triton; auto: numpy on a CPU, torch elsewhere.
            pinned: put the buffers into page-locked memory.

        Raises:
            ConfigurationError: ``batch_size`` exceeds the ring's capacity, ``n_step`` or ``batch_size`` is below 1, or
                the ring lacks what is to be drawn from.
        """
        self._check(ring, batch_size, n_step, held_out, half_life, prioritisation)
        self.ring, self.batch_size, self.n_step, self.held_out = ring, batch_size, n_step, held_out
        self.prioritisation, self.device = prioritisation, ring.device
        self._kernels = implementation(kernels, ring.device)
        self._key = seeding.key("held out" if held_out else "replay", seed, rank)
        layout, device = ring.layout, ring.device
        self.buffers = Draw(
            ring=ring.tensors,
            key=self._key,
            queue=int(held_out),
            powers=torch.tensor([gamma**k for k in range(n_step + 1)], device=device),
            ages=None if half_life is None else _ages(half_life / ring.num_envs, ring.num_slots).to(device),
            block=torch.zeros(2 * batch_size, layout.batch_width, device=device, pin_memory=pinned),
            rows=torch.zeros(batch_size, dtype=torch.int64, device=device, pin_memory=pinned),
            reward=torch.zeros(batch_size, device=device, pin_memory=pinned),
            discount=torch.zeros(batch_size, device=device, pin_memory=pinned),
        )
        self._number = torch.zeros((), dtype=torch.int64, device=device)
        self._batch = batch_of(ring, self.buffers)

    @staticmethod
    def _check(
        ring: ReplayRing,
        batch_size: int,
        n_step: int,
        held_out: bool,
        half_life: float | None,
        prioritisation: Prioritisation | None,
    ) -> None:
        if not 1 <= batch_size <= ring.capacity:
            raise ConfigurationError(
                f"replay.batch_size is {batch_size:,} but the replay holds {ring.capacity:,} transitions; "
                "expected a batch between 1 and that, so lower replay.batch_size or raise replay.capacity"
            )
        if n_step < 1:
            raise ConfigurationError(
                f"agent.n_step is {n_step}; expected at least 1, so set the number of steps to sum"
            )
        if held_out and ring.holdout is None:
            raise ConfigurationError("the replay holds out no episodes; expected some, so set replay.holdout above 0")
        if prioritisation is not None and (ring.priorities is None or held_out or half_life is not None):
            raise ConfigurationError(
                "prioritised draws need a replay with priorities and go with neither held-out episodes nor "
                "replay.half_life; expected one way to draw, so set only one"
            )

    def sample(self, draw: int, reward_scale: Tensor | None = None) -> Batch:
        """Batch number ``draw``: ``batch_size`` independent transitions.

        Args:
            draw: non-negative; equal draws from an equal ring give equal batches.
            reward_scale: scalar on the ring's device that the summed rewards are multiplied by.

        Raises:
            ConfigurationError: the ring holds no transition yet.
        """
        if (self.ring.held_out if self.held_out else self.ring.transitions) == 0:
            raise ConfigurationError(
                "the replay holds no transition to sample; expected at least one, so raise replay.minimum"
            )
        given, weight = None, None
        if self.prioritisation is not None:
            given, weight = self._prioritised(draw, self.prioritisation)
        if self._kernels == "triton":
            self._number.fill_(draw)
            sample_triton(self.buffers, self._number, reward_scale, given)
        elif self._kernels == "torch":
            sample_torch(self.buffers, draw, reward_scale, given)
        else:
            sample_numpy(self.buffers, draw, reward_scale, given)
        return self._batch if weight is None else replace(self._batch, weight=weight)

    def batches(self, first: int, count: int, reward_scale: Tensor | None = None) -> Iterator[Batch]:
        """Draws ``first`` .. ``first + count - 1``, one after the other; see `sample`."""
        for draw in range(first, first + count):
            yield self.sample(draw, reward_scale)

    def _prioritised(self, draw: int, exponents: Prioritisation) -> tuple[Tensor, Tensor]:
        tree = self.ring.priorities
        assert tree is not None, "checked in the constructor"
        rows, chances = tree.draw(uniform_fractions(self.batch_size, draw, self._key, self.device))
        return rows, importance_weights(chances, exponents.importance)

    def reprioritise(self, rows: Tensor, td_error: Tensor) -> None:
        """Give the drawn ``rows`` (B,) priorities by their new ``td_error`` (B,); nothing without prioritisation."""
        if self.prioritisation is not None and self.ring.priorities is not None:
            priorities = priorities_from_errors(td_error, self.prioritisation.priority, PRIORITY_EPSILON)
            self.ring.priorities.set(rows, priorities)


def batch_of(ring: ReplayRing, draw: Draw) -> Batch:
    """A batch of views of what ``draw`` writes to."""
    size, layout, block = len(draw.rows), ring.layout, draw.block
    return Batch(
        observation={group: block[:size, part] for group, part in layout.groups.items()},
        action=block[:size, layout.observation_size : layout.observation_size + ring.action_dim],
        reward=draw.reward,
        discount=draw.discount,
        next_observation={group: block[size:, part] for group, part in layout.groups.items()},
        rows=draw.rows,
    )


def _ages(half_life: float, num_slots: int) -> Tensor:
    """(T,) int64: entry a is the weight of ages 0 .. a, in units of which there are 2**31 - 1 in all.

    Integers, so that every device and kernel finds the same age for the same random bits.
    """
    weights = np.exp2(-np.arange(num_slots, dtype=np.float64) / half_life)
    cumulative = np.cumsum(weights)
    return torch.from_numpy(np.floor(cumulative / cumulative[-1] * (2**31 - 1)).astype(np.int64).clip(1))

"""Exploration noise that is held for a while (FlashSAC, arXiv 2604.04539).

A standard-normal eps is kept for k steps, P(k) proportional to k^-2 on 1..max: long enough now and then to move a body.
What is drawn at a step depends on (seed, step) alone; the state is what is being held.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rlplastic import seeding


def hold_probabilities(longest: int) -> NDArray[np.float64]:
    """P(k) ~ k^-2 for k = 1..longest, as a vector that sums to 1."""
    weights = 1.0 / np.arange(1, longest + 1, dtype=np.float64) ** 2
    probabilities: NDArray[np.float64] = weights / weights.sum()
    return probabilities


class HeldNoise:
    """Noise (num_envs, action_dim) with a hold counter per environment, or the published single counter for all."""

    def __init__(self, num_envs: int, action_dim: int, longest: int, per_env: bool, seed: int, rank: int = 0) -> None:
        self._noise = np.zeros((num_envs, action_dim), np.float32)
        self._remaining = np.zeros(num_envs, np.int64)
        self._per_env = per_env
        self._cumulative = np.cumsum(hold_probabilities(longest))
        self._seed = seeding.key("exploration", seed, rank)

    def at(self, step: int, active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """The noise of vector step ``step``, a fresh array (N, A) float32.

        Counters of environments where ``active`` (N,) is False do not advance: their action will be ignored. (The
        single shared counter advances whenever any environment is active.)
        """
        rng = seeding.generator("cpu", self._seed, "noise", step)
        num_envs, action_dim = self._noise.shape
        fresh = torch.randn(num_envs, action_dim, generator=rng).numpy()
        uniform = torch.rand(num_envs, generator=rng, dtype=torch.float64).numpy()
        if not self._per_env:
            active, uniform = np.full(num_envs, active.any()), np.full(num_envs, uniform[0])
        expired = active & (self._remaining == 0)
        holds = np.minimum(np.searchsorted(self._cumulative, uniform, side="right"), len(self._cumulative) - 1) + 1
        self._noise = np.where(expired[:, None], fresh, self._noise)
        self._remaining = np.where(expired, holds, self._remaining) - active
        return self._noise.copy()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is being held."""
        return {"noise": torch.from_numpy(self._noise.copy()), "remaining": torch.from_numpy(self._remaining.copy())}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict`."""
        self._noise, self._remaining = state["noise"].numpy().copy(), state["remaining"].numpy().copy()

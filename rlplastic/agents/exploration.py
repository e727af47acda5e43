"""Randomness of acting that is a function of (seed, rank, step) alone, so that there is no state to save.

Drawn for `BLOCK` steps at once: making a generator takes longer than a step of a small simulation.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from rlplastic import seeding

BLOCK = 64
"""Steps whose actions or noise are drawn together."""


def uniform_actions(num_envs: int, action_dim: int, seed: int, step: int, rank: int = 0) -> NDArray[np.float32]:
    """Uniform random actions (N, A) in [-1, 1] for the phase before learning."""
    block = _uniform_block(num_envs, action_dim, seed, rank, step // BLOCK)
    action: NDArray[np.float32] = block[step % BLOCK].copy()
    return action


def gaussian_noise(num_envs: int, action_dim: int, seed: int, step: int, rank: int = 0) -> NDArray[np.float32]:
    """Standard normal noise (N, A), fresh in every step."""
    block = _gaussian_block(num_envs, action_dim, seed, rank, step // BLOCK)
    noise: NDArray[np.float32] = block[step % BLOCK].copy()
    return noise


@lru_cache(maxsize=2)
def _uniform_block(num_envs: int, action_dim: int, seed: int, rank: int, block: int) -> NDArray[np.float32]:
    rng = seeding.generator("cpu", seeding.key("exploration", seed, rank), "uniform", block)
    return torch.rand(BLOCK, num_envs, action_dim, generator=rng).mul_(2).sub_(1).numpy()


@lru_cache(maxsize=2)
def _gaussian_block(num_envs: int, action_dim: int, seed: int, rank: int, block: int) -> NDArray[np.float32]:
    rng = seeding.generator("cpu", seeding.key("exploration", seed, rank), "gaussian", block)
    return torch.randn(BLOCK, num_envs, action_dim, generator=rng).numpy()

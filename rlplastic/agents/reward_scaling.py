"""Running scale of the discounted return, by which rewards are divided at sampling time (FlashSAC, arXiv 2604.04539).

Per environment G <- gamma (1 - done) G + r. With M the largest |G| seen and Var the variance of G over environments and
time, rewards are divided by max(sqrt(Var + 1e-8), M / support): returns then stay within the critic's support. Nothing
is centred; the buffer keeps raw rewards.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from rlplastic.distributed import ALONE, Group


class RewardScaler:
    """Statistics of G in float64, merged one vector step at a time (Chan et al. 1983, parallel variance).

    Over several ranks they are those of all environments: every rank merges the same parts in the same order.
    """

    def __init__(self, num_envs: int, gamma: float, support: float, enabled: bool = True, group: Group = ALONE) -> None:
        self._gamma, self._support, self._enabled, self._group = gamma, support, enabled, group
        self._returns = np.zeros(num_envs)
        self._count, self._mean, self._squares, self._largest = 0.0, 0.0, 0.0, 0.0

    def observe(self, reward: NDArray[np.float32], done: NDArray[np.bool_], valid: NDArray[np.bool_]) -> None:
        """Take in one vector step, all (N,); rows that are no transition (``valid`` False) touch nothing."""
        moved = self._gamma * (1.0 - done) * self._returns + reward
        everywhere = valid.all()
        self._returns = moved if everywhere else np.where(valid, moved, self._returns)
        for size, mean, squares, largest in self._group.numbers(_moments(moved if everywhere else moved[valid])):
            if size:
                self._merge(size, mean, squares, largest)

    def _merge(self, size: float, mean: float, squares: float, largest: float) -> None:
        delta, total = mean - self._mean, self._count + size
        self._squares += squares + delta**2 * self._count * size / total
        self._mean += delta * size / total
        self._count = total
        self._largest = max(self._largest, largest)

    @property
    def scale(self) -> float:
        """The factor that rewards are multiplied with; 1 before anything was seen or when switched off."""
        if not self._enabled or self._count == 0:
            return 1.0
        deviation = float(np.sqrt(self._squares / self._count + 1e-8))
        return 1.0 / max(deviation, self._largest / self._support)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Exact state, float64."""
        moments = torch.tensor([self._count, self._mean, self._squares, self._largest], dtype=torch.float64)
        return {"returns": torch.from_numpy(self._returns.copy()), "moments": moments}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state_dict`."""
        self._returns = state["returns"].numpy().copy()
        self._count, self._mean, self._squares, self._largest = state["moments"].tolist()


def _moments(rows: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """How many there are, their mean, squared distances from it, and the largest of them in size."""
    if not rows.size:
        return 0.0, 0.0, 0.0, 0.0
    mean = float(np.add.reduce(rows)) / rows.size
    centred = rows - mean
    largest = max(float(np.maximum.reduce(rows)), -float(np.minimum.reduce(rows)))
    return float(rows.size), mean, float(centred @ centred), largest

"""Observations in 8 bits: each dimension has a centre and a cell width, a power of two that grows when it must.

A value x is stored as the number of its cell, floor((x - centre) / 2**e), an int8, and read back as the middle of that
cell: the error is at most half a cell, and a value within 128 cells of the centre always has one (up to 2**125, where
the arithmetic of float32 ends). The centre is the dimension's first value; e starts so low that a constant costs
nothing, and grows to what the values seen so far need, a factor of two at a time.

When e grows by k, stored numbers are shifted right by k. Since floor(floor(y) / 2**k) = floor(y / 2**k), that is the
number that the value itself would have got with the wider cells: growing loses no more than wider cells do, and neither
the order of growing nor a save and a load in between changes a bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlplastic.envs.base import Observation
from rlplastic.kernels.replay_tensors import ReplayTensors

LOWEST = -40
"""The exponent at the start: cells of 1e-12."""


class Quantiser:
    """Centres and cell widths of the observations of a ring, on the host and (for reading back) on its device."""

    def __init__(self, tensors: ReplayTensors) -> None:
        assert tensors.cell is not None and tensors.centre is not None, "made for 8-bit storage"
        self._tensors, self._cell, self._centre = tensors, tensors.cell, tensors.centre
        size = len(self._cell)
        self.centre = np.zeros(size)
        self.exponent = np.full(size, LOWEST, np.int64)
        self._used = np.zeros(size, np.bool_)
        for part in tensors.groups.values():
            self._used[part] = True
        self.started = False
        self._publish()

    def encode(self, observation: Observation, slots: int) -> dict[str, NDArray[np.int8]]:
        """Numbers of the cells, groups of (N, D); cells grow first where they must.

        Args:
            observation: groups of (N, D).
            slots: of the ring, from 0, that hold anything yet: what growing has to go through.
        """
        if not self.started:
            self.started = True
            for group, part in self._tensors.groups.items():
                self.centre[part] = observation[group][0]
            self._publish()
        needed = np.full(len(self.exponent), LOWEST, np.int64)
        distance = {g: observation[g] - self.centre[part] for g, part in self._tensors.groups.items()}
        for group, part in self._tensors.groups.items():
            farthest = np.abs(distance[group]).max(0)
            # frexp gives the power of two above it; it must be 128 cells away at most.
            needed[part] = np.where(farthest > 0, np.frexp(farthest)[1] - 7, LOWEST)
        self.grow(needed, slots)
        return {
            group: np.floor(np.ldexp(distance[group], -self.exponent[part])).astype(np.int8)
            for group, part in self._tensors.groups.items()
        }

    def grow(self, exponent: NDArray[np.int64], slots: int) -> None:
        """Widen the cells to at least 2**exponent, (E,), and renumber what is stored in the first ``slots`` slots."""
        wider = np.maximum(self.exponent, exponent)
        (dims,) = np.nonzero(wider > self.exponent)
        if not len(dims):
            return
        stored = self._tensors.observation[: slots * self._tensors.num_envs]
        index = torch.from_numpy(dims).to(stored.device)
        shift = torch.from_numpy(_shifts(wider - self.exponent)[dims]).to(stored.device)
        stored.index_copy_(1, index, stored.index_select(1, index) >> shift)
        self.exponent = wider
        self._publish()

    def _publish(self) -> None:
        cell = np.where(self._used, np.ldexp(1.0, self.exponent), 0.0)
        self._cell.copy_(torch.from_numpy(cell.astype(np.float32)))
        self._centre.copy_(torch.from_numpy(self.centre.astype(np.float32)))

    def state_dict(self) -> dict[str, Tensor]:
        """Centres and exponents, (E,) each; every saved segment needs its own."""
        return {
            "centre": torch.from_numpy(self.centre.copy()),
            "exponent": torch.from_numpy(self.exponent.copy()),
            "started": torch.tensor(self.started),
        }

    def align(self, state: Mapping[str, Tensor], slots: int) -> NDArray[np.int8]:
        """Widen the cells to those of a saved segment; returns how far its numbers must be shifted to fit, (E,)."""
        if not self.started:
            self.centre, self.started = state["centre"].numpy().copy(), bool(state["started"])
        saved = state["exponent"].numpy()
        self.grow(saved, slots)
        self._publish()
        return _shifts(self.exponent - saved)

    def reset(self) -> None:
        """Forget everything, before segments are imported."""
        self.centre[:], self.exponent[:], self.started = 0.0, LOWEST, False


def _shifts(growth: NDArray[np.int64]) -> NDArray[np.int8]:
    """Shifts by so many bits; by more than 7 an int8 keeps nothing but its sign anyway."""
    return np.minimum(growth, 7).astype(np.int8)

"""The tensors of a replay ring as its kernels see them: flat rows, one per (slot, column), and their index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_LANES = 2048
"""Elements of an observation that a kernel moves at once."""

VALID, TERMINATED, TRUNCATED, HELD_OUT = 1, 2, 4, 8
"""Bits of a row's flags; a row without VALID has no other bit either."""


@dataclass(frozen=True)
class ReplayTensors:
    """Storage of T slots of N columns; the flat row of (slot, column) is ``slot * N + column``, R = T N rows.

    `rlplastic.replay.ring` says what the parts mean and proves the index.
    """

    storage: Tensor
    """(R, row bytes) uint8: the packed rows."""
    observation: Tensor
    """(R, E) in the storage dtype, all groups side by side with their padding; a strided view of the packed rows."""
    action: Tensor
    """(R, A') float32 with its padding; a strided view of the same rows."""
    reward: Tensor
    """(R,) float32."""
    flags: Tensor
    """(R,) uint8."""
    queue: Tensor
    """(Q, T, N) int32: slots of the transitions, oldest first in a circle, of each column; Q = 2 with held-out ones."""
    index: Tensor
    """(Q, 2, N) int64: transitions in columns 0 .. n, and the offset of column n's ranks in its circle."""
    groups: Mapping[str, slice]
    """Elements of each observation group in a row."""
    action_dim: int
    num_slots: int
    num_envs: int
    cell: Tensor | None = None
    """(E,) float32, widths of the cells of 8-bit observations; None for other storage."""
    centre: Tensor | None = None
    """(E,) float32, where cell 0 begins; None for other storage."""

    def unpack(self, rows: Tensor, out: Tensor) -> None:
        """Write the observations of these flat rows (n,) to ``out`` (n, E) float32."""
        out.copy_(self.observation.index_select(0, rows))
        if self.cell is not None and self.centre is not None:
            out.add_(0.5).mul_(self.cell).add_(self.centre)

    @cached_property
    def host(self) -> dict[str, NDArray[Any]]:
        """The same memory as numpy arrays, for tensors on a CPU, but for observations in half precision."""
        tensors = {
            "action": self.action[:, : self.action_dim],
            "reward": self.reward,
            "flags": self.flags,
            "queue": self.queue.view(-1),
            "index": self.index,
        }
        if self.observation.dtype in (torch.float32, torch.int8):
            tensors["observation"] = self.observation
        return {name: tensor.numpy() for name, tensor in tensors.items()}

    @cached_property
    def packed(self) -> Tensor | None:
        """(R, E + A') float32, whole rows, where observations are float32 too."""
        return self.storage.view(torch.float32) if self.observation.dtype == torch.float32 else None

    @property
    def rows(self) -> int:
        """R."""
        return self.num_slots * self.num_envs

    @property
    def lanes(self) -> int:
        """Elements of an observation that a kernel moves at once: a power of two."""
        return min(1 << (self.observation.shape[1] - 1).bit_length(), MOST_LANES)

    @property
    def warps(self) -> int:
        """Warps of a kernel that moves them, so that each thread has 16 bytes."""
        return max(1, min(8, self.lanes * self.observation.element_size() // 512))


def implementation(kernels: str, device: torch.device) -> str:
    """numpy, torch or triton; ``auto`` is numpy for tensors on a CPU and torch elsewhere."""
    if kernels != "auto":
        return kernels
    return "numpy" if device.type == "cpu" else "torch"


def row_numbers(rows: slice | NDArray[np.int64]) -> NDArray[np.int64]:
    """Flat rows as numbers, where they may be a slice."""
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


@dataclass(frozen=True, slots=True)
class Insertion:
    """One vector step on its way into the ring; rows are flat.

    All arrays are the host's, but for actions and observations that come as tensors, which `insert_torch` alone takes.
    ``row`` and the rows in ``opened`` are slices where they are neighbours, which is the usual case.
    """

    row: slice | NDArray[np.int64]
    """(N,) rows that this step completes."""
    action: NDArray[np.float32] | Tensor
    """(N, A)."""
    reward: NDArray[np.float32]
    """(N,)."""
    flags: NDArray[np.uint8]
    """(N,)."""
    entry: NDArray[np.int64]
    """(N,) places in the flat ``queue``, each behind its column's end: an entry counts only once the index says so."""
    slot: NDArray[np.int32]
    """(N,) the slots to enter there."""
    opened: tuple[tuple[slice | NDArray[np.int64], Mapping[str, Any]], ...]
    """Rows that receive an observation and lose their flags: the heads of all columns, last; before them, final
    observations of the columns that ended, if those lie in rows of their own. Groups of float32, or of int8 cells."""
    index: NDArray[np.int64]
    """(Q, 2, N), the index after this step."""

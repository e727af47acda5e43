"""Insertion of one vector step into the replay ring: plain torch, numpy for tensors on a CPU, and one Triton launch.

All three write the same bits. Values beyond the range of a half-precision storage become its largest finite number,
since an infinity would poison every batch it is drawn into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlplastic.kernels._triton import tl, triton
from rlplastic.kernels.replay_tensors import Insertion, ReplayTensors, row_numbers


def upload(array: NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """``array`` on ``device``, without waiting; on a CPU it shares the array's memory. A tensor there is itself."""
    if isinstance(array, Tensor):
        return array.to(device)
    tensor = torch.from_numpy(np.require(array, requirements=("C", "W")))
    # A pinned block goes back to its pool only after the copy has left it, so no buffer is overwritten too early.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``values`` in the storage dtype, clamped to its finite range; 8-bit cells are numbered before."""
    if values.dtype == dtype:
        return values
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def insert_torch(ring: ReplayTensors, step: Insertion) -> None:
    """The reference: a handful of indexed copies on any device; what is on it already stays there."""
    device = ring.reward.device
    row = _rows(step.row, device)
    ring.action[:, : ring.action_dim].index_copy_(0, row, upload(step.action, device))
    ring.reward.index_copy_(0, row, upload(step.reward, device))
    ring.flags.index_copy_(0, row, upload(step.flags, device))
    ring.queue.view(-1).index_copy_(0, upload(step.entry, device), upload(step.slot, device))
    for rows, observation in step.opened:
        at = _rows(rows, device)
        ring.flags.index_fill_(0, at, 0)
        for group, part in ring.groups.items():
            values = narrow(upload(observation[group], device), ring.observation.dtype)
            ring.observation[:, part].index_copy_(0, at, values)
    ring.index.copy_(upload(step.index, device), non_blocking=True)


def _rows(rows: slice | NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else upload(rows, device)


def insert_numpy(ring: ReplayTensors, step: Insertion) -> None:
    """The same for tensors on a CPU; less overhead per operation, which is most of the time here."""
    host = ring.host
    host["action"][step.row] = step.action
    host["reward"][step.row] = step.reward
    host["flags"][step.row] = step.flags
    host["queue"][step.entry] = step.slot
    for rows, observation in step.opened:
        host["flags"][rows] = 0
        for group, part in ring.groups.items():
            if "observation" in host:
                host["observation"][rows, part] = observation[group]
            else:  # numpy knows no bfloat16
                values = narrow(upload(observation[group], ring.reward.device), ring.observation.dtype)
                ring.observation[rows, part] = values
    host["index"][:] = step.index


_INTEGERS = 6  # row, flags, entry, slot, head, final


class StagedInsertion:
    """One copy to the device and one Triton launch per vector step.

    Everything a step brings is packed into one block of host memory: int64 (`_INTEGERS` and the index, N each),
    observations in the storage dtype, actions and rewards and, only copied when there are any, final observations.
    """

    def __init__(self, ring: ReplayTensors) -> None:
        self.ring = ring
        count, size = ring.num_envs, ring.observation.shape[1]
        self._integers = (_INTEGERS + 2 * ring.index.shape[0]) * count
        observations = count * size * ring.observation.element_size()
        # Byte offsets of the parts, all multiples of 16.
        self._observations_at = 8 * self._integers
        self._floats_at = self._observations_at + observations
        self._finals_at = self._floats_at + -(-count * (ring.action_dim + 1) // 4) * 16
        self._bytes = self._finals_at + observations
        # The host narrows; the kernel then moves bits, whatever they mean.
        self._bits = ring.observation.view(torch.int16) if ring.observation.element_size() == 2 else ring.observation

    def __call__(self, step: Insertion) -> None:
        """Copy and launch; nothing waits for the device."""
        ring, count = self.ring, self.ring.num_envs
        device = ring.reward.device
        block = torch.zeros(self._bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        integers = block[: self._observations_at].view(torch.int64).numpy()
        columns = integers[: _INTEGERS * count].reshape(_INTEGERS, count)
        (*finals, (heads, observation)) = step.opened
        columns[0], columns[1], columns[2], columns[3] = row_numbers(step.row), step.flags, step.entry, step.slot
        columns[4], columns[5] = row_numbers(heads), -1
        integers[_INTEGERS * count :] = step.index.reshape(-1)
        self._fill(block[self._observations_at : self._floats_at], slice(None), observation)
        floats = block[self._floats_at : self._finals_at].view(torch.float32).numpy()
        floats[: count * ring.action_dim] = step.action.reshape(-1)
        floats[count * ring.action_dim : count * (ring.action_dim + 1)] = step.reward
        for rows, final in finals:
            numbers = row_numbers(rows)
            columns[5, numbers % count] = numbers
            self._fill(block[self._finals_at :], torch.from_numpy(numbers % count), final)
        sent = block if finals else block[: self._finals_at]
        sent = sent.to(device, non_blocking=True)
        bits = self._bits.dtype
        _insert[(count,)](
            sent[: self._observations_at].view(torch.int64),
            sent[self._observations_at : self._floats_at].view(bits),
            sent[self._floats_at : self._finals_at].view(torch.float32),
            sent[self._finals_at :].view(bits) if finals else self._bits,
            self._bits,
            ring.action,
            ring.reward,
            ring.flags,
            ring.queue,
            ring.index,
            **self.constants(),
            **self.options(),
        )

    def constants(self) -> dict[str, int]:
        """What `_insert` is compiled for."""
        ring, size = self.ring, self.ring.observation.shape[1]
        return {
            "COLUMNS": ring.num_envs,
            "SIZE": size,
            "ROW_STRIDE": ring.observation.stride(0),
            "DIM": ring.action_dim,
            "ACTION_STRIDE": ring.action.stride(0),
            "QUEUES": ring.index.shape[0],
            "BLOCK": ring.lanes,
            "ACTIONS": triton.next_power_of_2(ring.action_dim),
        }

    def options(self) -> dict[str, int]:
        """How it is compiled: 16 bytes for each thread."""
        return {"num_warps": self.ring.warps}

    def _fill(self, part: Tensor, at: slice | Tensor, observation: Mapping[str, NDArray[Any]]) -> None:
        rows = part.view(self.ring.observation.dtype).view(self.ring.num_envs, -1)
        for group, elements in self.ring.groups.items():
            rows[at, elements] = narrow(upload(observation[group], part.device), rows.dtype)


@triton.jit
def _insert(
    integers: tl.tensor,
    observations: tl.tensor,
    floats: tl.tensor,
    finals: tl.tensor,
    observation: tl.tensor,
    action: tl.tensor,
    reward: tl.tensor,
    flags: tl.tensor,
    queue: tl.tensor,
    index: tl.tensor,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    ACTION_STRIDE: tl.constexpr,
    QUEUES: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIONS: tl.constexpr,
) -> None:
    """One program per column; `StagedInsertion` says what the first four hold."""
    n = tl.program_id(0)
    row = tl.load(integers + n)
    entry = tl.load(integers + 2 * COLUMNS + n)
    head = tl.load(integers + 4 * COLUMNS + n)
    final = tl.load(integers + 5 * COLUMNS + n)
    lanes = tl.arange(0, ACTIONS)
    sent = tl.load(floats + n * DIM + lanes, mask=lanes < DIM)
    tl.store(action + row * ACTION_STRIDE + lanes, sent, mask=lanes < DIM)
    tl.store(reward + row, tl.load(floats + COLUMNS * DIM + n))
    tl.store(flags + row, tl.load(integers + COLUMNS + n).to(tl.uint8))
    tl.store(queue + entry, tl.load(integers + 3 * COLUMNS + n).to(tl.int32))
    for part in tl.static_range(2 * QUEUES):
        tl.store(index + part * COLUMNS + n, tl.load(integers + (6 + part) * COLUMNS + n))
    tl.store(flags + head, tl.zeros((), tl.uint8))
    _copy(observations + n * SIZE, observation + head * ROW_STRIDE, SIZE, BLOCK)
    if final >= 0:
        tl.store(flags + final, tl.zeros((), tl.uint8))
        _copy(finals + n * SIZE, observation + final * ROW_STRIDE, SIZE, BLOCK)


@triton.jit
def _copy(source: tl.tensor, target: tl.tensor, SIZE: tl.constexpr, BLOCK: tl.constexpr) -> None:
    for begin in tl.static_range(0, SIZE, BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        tl.store(target + lanes, tl.load(source + lanes, mask=lanes < SIZE), mask=lanes < SIZE)

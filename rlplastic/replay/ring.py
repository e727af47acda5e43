"""The replay ring: a time-major ring ``[T, N, ...]`` that stores every observation once.

Slot t of column n (one column per environment) holds obs_t, action_t, reward_{t+1} and flags; the next observation of
slot t is the observation of slot t + 1. That takes half the memory of a buffer of (obs, next obs) pairs. Rows that are
no transition carry no VALID flag, and there are three kinds: the *head*, which is the column's write cursor and holds
only the newest observation; the true final observation of an episode; and the last observation before the environments
were rebuilt. Rows are numbered from 0 in each column; row r lies in slot r % T, and the head is row ``written``.

The index of transitions. A draw must be uniform over the VALID rows, which are neither contiguous nor equally many per
column. So each column has a circular queue of the slots of its transitions, oldest first. A row is pushed when it
becomes a transition, and leaves when its slot is overwritten. Slots are overwritten in the order of their rows, so the
transition that leaves is the oldest of its column: the queue's front. Pushing and popping are therefore two counters,
no entry ever moves, and after every write the queue lists exactly the VALID rows of its column, each once. A queue of T
entries never overflows: one of the T slots is the head.

Why draws are uniform. Number all transitions 0 .. total - 1, column after column, each column in queue order; by the
above this numbering is a bijection. A rank drawn uniformly from [0, total) thus selects each transition with
probability 1 / total, in a fixed number of operations: no rejection, no dependence on how uneven the columns are, and
nothing for the host to wait for. The rank itself comes from 64 random bits (`rlplastic.seeding.uniform_integers`), so a
probability differs from 1 / total by a relative total / 2**64 at most, under 2e-10 for any ring.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlplastic.envs.base import AutoresetMode, Observation, Step
from rlplastic.errors import CheckpointError, ConfigurationError, nearest

Integers = NDArray[np.int64]

VALID, TERMINATED, TRUNCATED = 1, 2, 4
"""Bits of a row's flags; a row without VALID has no other bit either."""

OBSERVATION_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_EXPORTED_AT_ONCE = 1 << 18
_USABLE = 0.9
"""The share of the available memory that replay may take; the learner needs the rest."""


class ReplayRing:
    """Storage of N columns of T = ceil(capacity / N) + 1 slots, on the learner's device.

    Writing copies from the host to the device and never waits for the device. All bookkeeping that decides anything
    lives on the host; the device holds what a draw reads: ``queue``, ``cumulative`` and ``offset``.

    Attributes:
        observation: groups of (T, N, D) in the storage dtype. float16 and bfloat16 clamp values beyond their range
            to their largest finite number, since an infinity would poison every batch it is drawn into.
        action: (T, N, A) float32; reward: (T, N) float32; flags: (T, N) uint8, VALID | TERMINATED | TRUNCATED.
        queue: (T, N) int32, the slots of each column's transitions in a circle.
        cumulative: (N,) int64, transitions in columns 0 .. n.
        offset: (N,) int64; the transition of rank r in column n is ``queue[(offset[n] + r) % T, n]``.
        written: (N,) int64 on the host, rows ever completed in each column (the head is not complete).
        transitions: rows that can be sampled now, a host integer.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        observation_dims: Mapping[str, int],
        action_dim: int,
        autoreset: AutoresetMode,
        observation_dtype: str = "float32",
        device: torch.device | str = "cpu",
    ) -> None:
        """Check the memory, then allocate all of it.

        Raises:
            ConfigurationError: a size below 1, an unknown dtype, or more than fits (see `check_memory`).
        """
        self.check_memory(capacity, num_envs, observation_dims, action_dim, observation_dtype, device)
        self.capacity, self.num_envs, self.num_slots = capacity, num_envs, _num_slots(capacity, num_envs)
        self.observation_dims, self.action_dim = dict(observation_dims), action_dim
        self.autoreset, self.device = autoreset, torch.device(device)
        shape = (self.num_slots, num_envs)
        dtype = OBSERVATION_DTYPES[observation_dtype]
        self.observation = {
            group: torch.zeros(*shape, dim, dtype=dtype, device=self.device) for group, dim in observation_dims.items()
        }
        self.action = torch.zeros(*shape, action_dim, device=self.device)
        self.reward = torch.zeros(shape, device=self.device)
        # The host's copy of the flags decides evictions; on a CPU it is the same memory as the tensor.
        self._flags = np.zeros(shape, np.uint8)
        host_flags = torch.from_numpy(self._flags)
        self.flags = host_flags if self.device.type == "cpu" else host_flags.to(self.device)
        self.queue = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._index = torch.zeros(2, num_envs, dtype=torch.int64, device=self.device)
        self.cumulative, self.offset = self._index.unbind(0)
        self.written = np.zeros(num_envs, np.int64)
        self.transitions = 0
        self._pushed, self._popped = np.zeros(num_envs, np.int64), np.zeros(num_envs, np.int64)
        self._columns = np.arange(num_envs)
        self._started = False
        self._in_step = True  # whether all heads are in the same slot, so that a write is one contiguous row

    # Memory

    @staticmethod
    def bytes_per_transition(observation_dims: Mapping[str, int], action_dim: int, observation_dtype: str) -> int:
        """Bytes of one row: observations, action and reward in float32, one byte of flags, four of the queue."""
        return sum(observation_dims.values()) * _dtype(observation_dtype).itemsize + 4 * action_dim + 4 + 1 + 4

    @staticmethod
    def memory_bytes(
        capacity: int, num_envs: int, observation_dims: Mapping[str, int], action_dim: int, observation_dtype: str
    ) -> int:
        """Bytes of all tensors that a ring of these sizes puts on its device."""
        rows = _num_slots(capacity, num_envs) * num_envs
        return rows * ReplayRing.bytes_per_transition(observation_dims, action_dim, observation_dtype) + 16 * num_envs

    @staticmethod
    def check_memory(
        capacity: int,
        num_envs: int,
        observation_dims: Mapping[str, int],
        action_dim: int,
        observation_dtype: str,
        device: torch.device | str,
    ) -> int:
        """`memory_bytes`, after checking that it is at most nine tenths of what is available on ``device``.

        Raises:
            ConfigurationError: it does not fit; the message names the largest capacity that does.
        """
        sizes = {"capacity": capacity, "num_envs": num_envs, "action_dim": action_dim, **observation_dims}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigurationError(f"the replay's {name} is {size}; expected at least 1, so set a larger one")
        if _num_slots(capacity, num_envs) * num_envs >= 2**31:
            raise ConfigurationError(
                f"a replay of {capacity:,} transitions is beyond what the index counts; set replay.capacity below 2**31"
            )
        needed = ReplayRing.memory_bytes(capacity, num_envs, observation_dims, action_dim, observation_dtype)
        available = available_memory(torch.device(device))
        usable = int(_USABLE * available)
        if needed > usable:
            row = ReplayRing.bytes_per_transition(observation_dims, action_dim, observation_dtype) * num_envs
            largest = max(0, (usable - 16 * num_envs) // row - 1) * num_envs
            raise ConfigurationError(
                f"a replay of {capacity:,} transitions needs {needed / 1e9:.2f} GB but {device} has "
                f"{available / 1e9:.2f} GB available, of which a tenth is left to the learner; set replay.capacity to "
                f"at most {largest} or store observations as float16"
            )
        return needed

    # Writing

    def begin(self, observation: Observation) -> None:
        """Start every column at ``observation``, groups of (N, D): the first reset, or rebuilt environments.

        In the latter case the old head stays as a row that is no transition and holds the last observation, so the
        transition before it keeps its next observation.
        """
        if self._started:
            at = self._locate(self._columns)
            for storage in (self.action, self.reward):  # the earlier lap's values are in no checkpoint
                _write(storage, at, torch.zeros(self.num_envs, *storage.shape[2:], device=self.device))
            self._advance(self._columns)
        self._started = True
        self._write_observation(self._columns, observation)
        self._publish()

    def add(self, action: NDArray[np.float32], step: Step, valid: NDArray[np.bool_]) -> None:
        """Complete the head row of every column with what the environments answered, and open the next one.

        Args:
            action: (N, A), in [-1, 1].
            step: the environments' answer. Under SAME_STEP its ``info["final_observation"]`` is stored in a row of its
                own where an episode ended, before the reset observation.
            valid: (N,), False where the row is no transition (the reset row of NEXT_STEP).
        """
        at = self._locate(self._columns)
        _write(self.action, at, self._upload(action))
        _write(self.reward, at, self._upload(step.reward))
        flags = (VALID + TERMINATED * step.terminated + TRUNCATED * step.truncated) * valid
        self._set_flags(self._columns, flags.astype(np.uint8))
        self._push(valid)
        self._advance(self._columns)
        done = step.terminated | step.truncated
        if self.autoreset is AutoresetMode.SAME_STEP and done.any():
            self._add_final(np.flatnonzero(done), step)
        else:
            self._write_observation(self._columns, step.observation)
        self._publish()

    def _add_final(self, ended: Integers, step: Step) -> None:
        """Store the final observations in rows of their own; the heads of the ``ended`` columns move once more."""
        newest = {group: step.observation[group].copy() for group in self.observation}
        for group, array in newest.items():
            array[ended] = step.info["final_observation"][group][ended]
        self._write_observation(self._columns, newest)
        self._advance(ended)
        self._write_observation(ended, {group: step.observation[group][ended] for group in self.observation})

    def _advance(self, columns: Integers) -> None:
        """Move the heads of ``columns`` to their next slot and evict what is in it."""
        self.written[columns] += 1
        self._in_step = len(columns) == self.num_envs and self._in_step
        if not self._in_step:
            self._in_step = bool((self.written == self.written[0]).all())
        slots = self.written[columns] % self.num_slots
        self._popped[columns] += self._flags[slots, columns] & VALID
        self._set_flags(columns, np.zeros(len(columns), np.uint8))

    def _push(self, valid: NDArray[np.bool_]) -> None:
        """Enter the head rows into the queues where ``valid``.

        Every column writes behind its queue's end; only where the count grows does the entry become part of it.
        """
        behind = self._pushed % self.num_slots * self.num_envs + self._columns
        slots = (self.written % self.num_slots).astype(np.int32)
        self.queue.flatten().index_copy_(0, self._upload(behind), self._upload(slots))
        self._pushed += valid

    def _publish(self) -> None:
        """Bring ``transitions`` and the device's view of the queues up to date."""
        count = self._pushed - self._popped
        cumulative = np.cumsum(count)
        self.transitions = int(cumulative[-1])
        self._index.copy_(self._upload(np.stack((cumulative, self._popped - (cumulative - count)))))

    def _locate(self, columns: Integers) -> int | Tensor:
        """Where the heads of ``columns`` are: a slot if it is the same for all columns, else indices of flat rows."""
        if self._in_step and len(columns) == self.num_envs:
            return int(self.written[0] % self.num_slots)
        return self._upload(self.written[columns] % self.num_slots * self.num_envs + columns)

    def _write_observation(self, columns: Integers, observation: Observation) -> None:
        at = self._locate(columns)
        for group, storage in self.observation.items():
            source = self._upload(observation[group])
            if storage.dtype != torch.float32:
                largest = torch.finfo(storage.dtype).max
                source = source.clamp(-largest, largest)
            _write(storage, at, source)

    def _set_flags(self, columns: Integers, flags: NDArray[np.uint8]) -> None:
        """Set the head rows' flags on the host and, where that is other memory, on the device."""
        self._flags[self.written[columns] % self.num_slots, columns] = flags
        if self.device.type != "cpu":
            _write(self.flags, self._locate(columns), self._upload(flags))

    def _upload(self, array: NDArray[Any]) -> Tensor:
        """``array`` on the ring's device, without waiting; on a CPU it shares the array's memory."""
        tensor = torch.from_numpy(np.require(array, requirements=("C", "W")))
        # A pinned block goes back to its pool only after the copy has left it, so no buffer is overwritten too early.
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    # Persistence

    def clear(self) -> None:
        """Forget all rows, so that segments can be imported."""
        self._flags[:] = 0
        for counter in (self.written, self._pushed, self._popped):
            counter[:] = 0
        self.transitions, self._started, self._in_step = 0, False, True

    def export_rows(self, start: Integers, stop: Integers) -> dict[str, Tensor]:
        """Rows [start_n, stop_n) of every column n, cut to what is still in the ring, column after column.

        A complete row never changes, so exports of adjoining ranges are immutable segments. The successor of a row's
        observation is in the next row, or in the head (`export_head`).

        Returns:
            CPU tensors: ``start`` and ``stop`` as cut, (N,) int64; with M = sum(stop - start), ``action`` (M, A),
            ``reward`` (M,), ``flags`` (M,) and ``observation.<group>`` (M, D) in the storage dtype.
        """
        oldest = np.maximum(self.written - (self.num_slots - 1), 0)
        stop = np.clip(stop, oldest, self.written)
        start = np.clip(start, oldest, stop)
        # In pieces: gathered at once, the rows of a full ring would need its memory a second time on the device.
        pieces = torch.split(self._upload(self._flat_rows(start, stop)), _EXPORTED_AT_ONCE)
        rows = {
            name: torch.cat([storage.flatten(0, 1).index_select(0, piece).cpu() for piece in pieces])
            for name, storage in self._storages().items()
        }
        return {"start": torch.from_numpy(start), "stop": torch.from_numpy(stop), **rows}

    def import_rows(self, tensors: Mapping[str, Tensor]) -> None:
        """Put an exported segment back; segments come oldest first into a ring that has not begun, then the head.

        Raises:
            CheckpointError: the segment does not fit this ring or comes out of order.
        """
        start, stop = tensors["start"].numpy(), tensors["stop"].numpy()
        storages = self._storages()
        total = int((stop - start).sum())
        if start.shape != self.written.shape or any(
            tensors[name].shape != (total, *storage.shape[2:]) or tensors[name].dtype != storage.dtype
            for name, storage in storages.items()
        ):
            raise CheckpointError(
                "a replay segment differs from this replay in environments, widths or dtype; expected the "
                "configuration that wrote it, so restore that or start with fresh=true"
            )
        length = stop - start
        if self._started or (start < self.written).any() or (length < 0).any() or (length >= self.num_slots).any():
            raise CheckpointError(
                f"a replay segment of rows {start.min()} to {stop.max()} comes out of order or exceeds the capacity; "
                "expected segments oldest first into an empty replay of the same capacity, so use an older checkpoint"
            )
        self._forget(self.written, start)
        rows = self._flat_rows(start, stop)
        index = self._upload(rows)
        for name, storage in storages.items():
            storage.flatten(0, 1).index_copy_(0, index, tensors[name].to(self.device))
        self._flags.reshape(-1)[rows] = tensors["flags"].numpy()
        self.written = stop.copy()

    def export_head(self) -> dict[str, Tensor]:
        """CPU tensors: the cursors ``written`` (N,) int64 and each column's newest ``observation.<group>`` (N, D)."""
        index = self._upload(self.written % self.num_slots * self.num_envs + self._columns)
        heads = {
            f"observation.{group}": storage.flatten(0, 1).index_select(0, index).cpu()
            for group, storage in self.observation.items()
        }
        return {"written": torch.from_numpy(self.written.copy()), **heads}

    def import_head(self, tensors: Mapping[str, Tensor]) -> None:
        """Finish an import: place the heads and rebuild the queues in time order, so that draws go on bit for bit.

        Rows that no segment covered stay invalid.

        Raises:
            CheckpointError: the head is older than the segments, or is imported twice.
        """
        written = tensors["written"].numpy()
        if self._started or written.shape != self.written.shape or (written < self.written).any():
            raise CheckpointError(
                "the replay's head does not follow its segments; expected the head of the same checkpoint, so use an "
                "older checkpoint"
            )
        self._forget(self.written, written + 1)
        self.written, self._started = written.copy(), True
        self._in_step = bool((written == written[0]).all())
        index = self._upload(written % self.num_slots * self.num_envs + self._columns)
        for group, storage in self.observation.items():
            storage.flatten(0, 1).index_copy_(0, index, tensors[f"observation.{group}"].to(self.device))
        if self.device.type != "cpu":
            self.flags.copy_(self._upload(self._flags))
        self._rebuild_queues()
        self._publish()

    def _rebuild_queues(self) -> None:
        in_time = (self.written[:, None] + 1 + np.arange(self.num_slots)) % self.num_slots  # (N, T), oldest first
        valid = (self._flags[in_time, self._columns[:, None]] & VALID).astype(bool)
        self._pushed, self._popped = valid.sum(1), np.zeros(self.num_envs, np.int64)
        columns, _ = np.nonzero(valid)
        position = _ranges(np.zeros_like(self._pushed), self._pushed)
        queue = np.zeros((self.num_slots, self.num_envs), np.int32)
        queue[position, columns] = in_time[valid]
        self.queue.copy_(self._upload(queue))

    def _forget(self, start: Integers, stop: Integers) -> None:
        """Clear the host's flags in the slots of rows [start_n, stop_n), whatever older rows are there."""
        if (start < stop).any():
            slots, last = np.arange(self.num_slots)[:, None], stop - 1
            newest = last - (last - slots) % self.num_slots  # (T, N), each slot's newest row up to the last
            self._flags[newest >= start] = 0

    def _flat_rows(self, start: Integers, stop: Integers) -> Integers:
        """Indices into flat storages of rows [start_n, stop_n), column after column."""
        columns = np.repeat(self._columns, stop - start)
        return _ranges(start, stop) % self.num_slots * self.num_envs + columns

    def _storages(self) -> dict[str, Tensor]:
        groups = {f"observation.{group}": storage for group, storage in self.observation.items()}
        return {"action": self.action, "reward": self.reward, "flags": self.flags, **groups}


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``: free GPU memory, or the kernel's estimate for the host.

    A container's limit counts where it is lower. Where the kernel gives no estimate, the physical memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _container_memory())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_memory() -> int:
    """What a control group (v2) leaves to this process; practically unlimited without one."""
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**62


def _num_slots(capacity: int, num_envs: int) -> int:
    """T: enough for ``capacity`` transitions, and one slot for the head."""
    return -(-capacity // num_envs) + 1


def _dtype(name: str) -> torch.dtype:
    if name not in OBSERVATION_DTYPES:
        raise ConfigurationError(
            f"replay.observation_dtype is {name!r}; expected float32, float16 or bfloat16: "
            f"{nearest(name, OBSERVATION_DTYPES)}"
        )
    return OBSERVATION_DTYPES[name]


def _ranges(start: Integers, stop: Integers) -> Integers:
    """The numbers start_n .. stop_n - 1 for every n, one range after the other."""
    length: Integers = stop - start
    shift: Integers = np.repeat(start - (np.cumsum(length) - length), length)
    return np.arange(len(shift), dtype=np.int64) + shift


def _write(storage: Tensor, at: int | Tensor, source: Tensor) -> None:
    """Copy ``source`` (n, ...) to one slot of a (T, N, ...) storage, or to the flat rows ``at``."""
    if isinstance(at, int):
        storage[at].copy_(source, non_blocking=True)
    else:
        storage.flatten(0, 1).index_copy_(0, at, source.to(storage.dtype))

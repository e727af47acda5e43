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
entries never overflows: one of the T slots is the head. Transitions of held-out episodes have a queue of their own, of
which the same holds.

Why draws are uniform. Number all transitions 0 .. total - 1, column after column, each column in queue order; by the
above this numbering is a bijection. A rank drawn uniformly from [0, total) thus selects each transition with
probability 1 / total, in a fixed number of operations: no rejection, no dependence on how uneven the columns are, and
nothing for the host to wait for. The rank itself comes from 64 random bits (`rlplastic.seeding.uniform_integers`), so a
probability differs from 1 / total by a relative total / 2**64 at most, under 2e-10 for any ring.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlplastic.envs.base import AutoresetMode, Observation, Rows, Step, on_host
from rlplastic.errors import CheckpointError
from rlplastic.kernels.replay_insert import StagedInsertion, insert_numpy, insert_torch, upload
from rlplastic.kernels.replay_tensors import (
    HELD_OUT,
    TERMINATED,
    TRUNCATED,
    VALID,
    Insertion,
    ReplayTensors,
    implementation,
    row_numbers,
)
from rlplastic.replay.holdout import Holdout
from rlplastic.replay.layout import RowLayout
from rlplastic.replay.memory import check_memory, slots_for
from rlplastic.replay.priority import SumTree
from rlplastic.replay.quantiser import Quantiser

Integers = NDArray[np.int64]

_EXPORTED_AT_ONCE = 1 << 18
WRITERS: dict[str, Callable[[ReplayTensors], Callable[[Insertion], None]]] = {
    "numpy": lambda tensors: lambda step: insert_numpy(tensors, step),
    "torch": lambda tensors: lambda step: insert_torch(tensors, step),
    "triton": StagedInsertion,
}
"""How a vector step is written, by `ReplayRing`'s ``kernels``."""


class ReplayRing:
    """Storage of N columns of T = ceil(capacity / N) + 1 slots, on the learner's device or in the host's memory.

    Writing never waits for the device. All bookkeeping that decides anything lives on the host; the device holds what a
    draw reads.

    Attributes:
        tensors: the storage and the index, as kernels see them.
        layout: where in a row each observation group and the action lie.
        written: (N,) int64 on the host, rows ever completed in each column (the head is not complete).
        transitions: rows that training can sample now, a host integer.
        held_out: rows that only validation can sample now.
        priorities: of all rows, 0 where training cannot sample; None if not asked for.
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
        *,
        holdout: Holdout | None = None,
        prioritised: bool = False,
        kernels: str = "auto",
        pinned: bool = False,
    ) -> None:
        """Check the memory, then allocate all of it.

        Args:
            capacity: transitions kept, at least.
            num_envs: N.
            observation_dims: width of each observation group.
            action_dim: A.
            autoreset: how the environments restart.
            observation_dtype: storage of observations, a name in `layout.OBSERVATION_DTYPES`.
            device: where it lies.
            holdout: which episodes training never samples; None: it samples all.
            prioritised: keep priorities of what training can sample.
            kernels: a name in `WRITERS`; auto: numpy on a CPU, torch elsewhere.
            pinned: page-locked host memory, from which a GPU can copy without waiting.

        Raises:
            ConfigurationError: a size below 1, an unknown dtype, or more than fits (see `check_memory`).
        """
        self.layout = RowLayout(observation_dims, action_dim, observation_dtype)
        queues = 1 if holdout is None else 2
        check_memory(capacity, num_envs, self.layout, queues, prioritised, device)
        self.capacity, self.num_envs, self.num_slots = capacity, num_envs, slots_for(capacity, num_envs)
        self.observation_dims, self.action_dim = dict(observation_dims), action_dim
        self.autoreset, self.device, self.holdout = autoreset, torch.device(device), holdout
        rows = self.num_slots * num_envs
        storage = torch.zeros(rows, self.layout.row_bytes, dtype=torch.uint8, device=self.device, pin_memory=pinned)
        observation, action = self.layout.stored(storage)
        cells = (
            torch.zeros(2, self.layout.observation_size, device=self.device) if observation_dtype == "int8" else None
        )
        # The host's copy of the flags decides evictions; on a CPU it is the same memory as the tensor.
        self._flags = np.zeros(rows, np.uint8)
        self.tensors = ReplayTensors(
            storage=storage,
            observation=observation,
            action=action,
            reward=torch.zeros(rows, device=self.device),
            flags=upload(self._flags, self.device),
            queue=torch.zeros(queues, self.num_slots, num_envs, dtype=torch.int32, device=self.device),
            index=torch.zeros(queues, 2, num_envs, dtype=torch.int64, device=self.device),
            groups=self.layout.groups,
            action_dim=action_dim,
            num_slots=self.num_slots,
            num_envs=num_envs,
            cell=None if cells is None else cells[0],
            centre=None if cells is None else cells[1],
        )
        self._quantiser = None if cells is None else Quantiser(self.tensors)
        self._insert = WRITERS[implementation(kernels, self.device)](self.tensors)
        self.priorities = SumTree(rows, self.device) if prioritised else None
        self.written = np.zeros(num_envs, np.int64)
        self.transitions = self.held_out = 0
        self._pushed, self._popped = np.zeros((queues, num_envs), np.int64), np.zeros((queues, num_envs), np.int64)
        self._columns = np.arange(num_envs)
        self._started = False
        self._in_step = True  # whether all heads are in the same slot, so that a write is one contiguous block
        self._episodes = np.zeros(num_envs, np.int64)
        self._held = np.zeros(num_envs, np.int64)  # queue of the episode that each column is in

    # Writing

    def begin(self, observation: Observation[Any]) -> None:
        """Start every column at ``observation``, groups of (N, D): the first reset, or rebuilt environments.

        In the latter case the old head stays as a row that is no transition and holds the last observation, so the
        transition before it keeps its next observation.
        """
        if self._started:
            self._next_episode(self._columns)
        else:  # there is no head yet: what this completes is the slot before the first
            self.written -= 1
            self._started = True
        action, reward = np.zeros((self.num_envs, self.action_dim), np.float32), np.zeros(self.num_envs, np.float32)
        never = np.zeros(self.num_envs, np.bool_)
        self._write(action, reward, never.astype(np.uint8), never, self._columns[:0], None, observation)

    def add(self, action: Rows, step: Step[Rows], valid: NDArray[np.bool_]) -> None:
        """Complete the head row of every column with what the environments answered, and open the next one.

        Actions and observations may be tensors; those on the ring's device stay there.

        Args:
            action: (N, A), in [-1, 1].
            step: the environments' answer. Under SAME_STEP its ``info["final_observation"]`` is stored in a row of its
                own where an episode ended, before the reset observation.
            valid: (N,), False where the row is no transition (the reset row of NEXT_STEP).
        """
        flags = np.multiply(step.terminated, TERMINATED, dtype=np.uint8)
        flags |= np.multiply(step.truncated, TRUNCATED, dtype=np.uint8)
        ended = flags.nonzero()[0]
        flags |= VALID
        if self.holdout is not None:
            flags |= self._held.astype(np.uint8) * np.uint8(HELD_OUT)
        flags *= valid
        final = None
        if self.autoreset is AutoresetMode.SAME_STEP and len(ended):
            final = {group: _taken(step.info["final_observation"][group], ended) for group in self.observation_dims}
        self._write(action, step.reward, flags, valid, ended, final, step.observation)
        if len(ended):
            self._next_episode(ended)

    def _write(
        self,
        action: NDArray[np.float32] | Tensor,
        reward: NDArray[np.float32],
        flags: NDArray[np.uint8],
        valid: NDArray[np.bool_],
        ended: Integers,
        final: Observation[Any] | None,
        observation: Observation[Any],
    ) -> None:
        """Complete the heads, open a row for ``final`` observations where episodes ``ended`` so, open new heads."""
        row = self._heads()
        self._flags[row] = flags
        entry, slot = self._push(valid)
        finals = [] if final is None else [(self._open(ended), final)]
        heads = self._open(self._columns)
        index = self._publish()
        opened = tuple((rows, self._encoded(values)) for rows, values in (*finals, (heads, observation)))
        insertion = Insertion(row, action, reward, flags, entry, slot, opened, index)
        if isinstance(observation["policy"], Tensor):
            insert_torch(self.tensors, insertion)
        else:
            self._insert(insertion)
        if self.priorities is not None:
            entered = flags & (VALID | HELD_OUT) == VALID
            self.priorities.add_new(self._upload(row_numbers(row)[entered]))
            for rows, _ in opened:
                self.priorities.clear(self._upload(row_numbers(rows)))

    def _encoded(self, observation: Observation[Any]) -> Mapping[str, Any]:
        """What is stored of an observation: itself, or the numbers of its cells, which the host finds."""
        if self._quantiser is None:
            return observation
        return self._quantiser.encode(on_host(observation), self._slots_in_use())

    def _slots_in_use(self) -> int:
        return min(int(self.written.max()) + 1, self.num_slots)

    def _heads(self) -> slice | Integers:
        """The flat rows of all heads: neighbours while all columns are in the same slot."""
        if self._in_step:
            first = int(self.written[0]) % self.num_slots * self.num_envs
            return slice(first, first + self.num_envs)
        return self.written % self.num_slots * self.num_envs + self._columns

    def _open(self, columns: Integers) -> slice | Integers:
        """Move the heads of ``columns`` to their next slot and evict what is in it; returns the rows."""
        self.written[columns] += 1
        whole = len(columns) == self.num_envs
        if not (whole and self._in_step):
            self._in_step = bool((self.written == self.written[0]).all())
        rows = self._heads() if whole else self.written[columns] % self.num_slots * self.num_envs + columns
        evicted = self._flags[rows]
        if evicted.any():
            held = evicted & HELD_OUT != 0
            for queue, mine in enumerate((~held, held)[: len(self._popped)]):
                self._popped[queue, columns] += evicted & VALID & mine
            self._flags[rows] = 0
        return rows

    def _push(self, valid: NDArray[np.bool_]) -> tuple[Integers, NDArray[np.int32]]:
        """Enter the head rows into their queues where ``valid``; returns places in the flat queues, and slots.

        Every column writes behind its queue's end; only where the count grows does the entry become part of it.
        """
        slots = (self.written % self.num_slots).astype(np.int32)
        if self.holdout is None:
            entry = self._pushed[0] % self.num_slots * self.num_envs + self._columns
            self._pushed[0] += valid
        else:
            pushed = self._pushed[self._held, self._columns]
            entry = (self._held * self.num_slots + pushed % self.num_slots) * self.num_envs + self._columns
            self._pushed[self._held, self._columns] += valid
        return entry, slots

    def _publish(self) -> Integers:
        """The index (Q, 2, N) as it is now; also brings the counts of transitions up to date."""
        count = self._pushed - self._popped
        index = np.empty((len(count), 2, self.num_envs), np.int64)
        cumulative = np.add.accumulate(count, 1, out=index[:, 0])
        np.subtract(self._popped + count, cumulative, out=index[:, 1])
        self.transitions = int(cumulative[0, -1])
        self.held_out = int(cumulative[-1, -1]) if self.holdout is not None else 0
        return index

    def _next_episode(self, columns: Integers) -> None:
        """Count the episodes that begin in ``columns``, and decide whether they are held out."""
        if self.holdout is not None:
            self._episodes[columns] += 1
            for column in columns.tolist():
                self._held[column] = self.holdout.takes(column, int(self._episodes[column]))

    # Persistence

    def clear(self) -> None:
        """Forget all rows, so that segments can be imported."""
        self._flags[:] = 0
        for counter in (self.written, self._pushed, self._popped, self._episodes, self._held):
            counter[:] = 0
        self.transitions, self.held_out, self._started, self._in_step = 0, 0, False, True
        if self._quantiser is not None:
            self._quantiser.reset()

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
            name: torch.cat([storage.index_select(0, piece).cpu() for piece in pieces])
            for name, storage in self._storages().items()
        }
        return {"start": torch.from_numpy(start), "stop": torch.from_numpy(stop), **rows, **self._cells()}

    def import_rows(self, tensors: Mapping[str, Tensor]) -> None:
        """Put an exported segment back; segments come oldest first into a ring that has not begun, then the head.

        Raises:
            CheckpointError: the segment does not fit this ring or comes out of order.
        """
        start, stop = tensors["start"].numpy(), tensors["stop"].numpy()
        storages = self._storages()
        total = int((stop - start).sum())
        if start.shape != self.written.shape or any(
            tensors[name].shape != (total, *storage.shape[1:]) or tensors[name].dtype != storage.dtype
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
        tensors = self._aligned(tensors)
        self._forget(self.written, start)
        rows = self._flat_rows(start, stop)
        index = self._upload(rows)
        for name, storage in storages.items():
            storage.index_copy_(0, index, tensors[name].to(self.device))
        self._flags[rows] = tensors["flags"].numpy()
        self.written = stop.copy()

    def export_head(self) -> dict[str, Tensor]:
        """CPU tensors: each column's ``written`` rows and ``episodes`` (N,) int64, ``observation.<group>`` (N, D)."""
        index = self._upload(self.written % self.num_slots * self.num_envs + self._columns)
        heads = {
            name: storage.index_select(0, index).cpu()
            for name, storage in self._storages().items()
            if name.startswith("observation.")
        }
        counters = {"written": self.written, "episodes": self._episodes}
        heads |= {name: torch.from_numpy(counter.copy()) for name, counter in counters.items()}
        if self.priorities is not None:
            heads |= {f"tree.{name}": tensor.cpu() for name, tensor in self.priorities.state_dict().items()}
        return heads | self._cells()

    def _cells(self) -> dict[str, Tensor]:
        """What 8-bit observations need to be read back; nothing for other storage."""
        if self._quantiser is None:
            return {}
        return {f"cells.{name}": tensor for name, tensor in self._quantiser.state_dict().items()}

    def _aligned(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Saved tensors with their 8-bit numbers in the same cells as the rows that are here; others as they are."""
        if self._quantiser is None:
            return tensors
        saved = {name: tensors[f"cells.{name}"] for name in ("centre", "exponent", "started")}
        shift = torch.from_numpy(self._quantiser.align(saved, self.num_slots))
        groups = ((f"observation.{group}", part) for group, part in self.layout.groups.items())
        return {**tensors, **{name: tensors[name] >> shift[part] for name, part in groups}}

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
        self._episodes = tensors["episodes"].numpy().copy()
        if self.holdout is not None:
            for column, episode in enumerate(self._episodes.tolist()):
                self._held[column] = self.holdout.takes(column, episode)
        index = self._upload(written % self.num_slots * self.num_envs + self._columns)
        tensors = self._aligned(tensors)
        for name, storage in self._storages().items():
            if name.startswith("observation."):
                storage.index_copy_(0, index, tensors[name].to(self.device))
        if self.device.type != "cpu":
            self.tensors.flags.copy_(self._upload(self._flags))
        self._rebuild_queues()
        self._restore_priorities(tensors)

    def _rebuild_queues(self) -> None:
        in_time = (self.written[:, None] + 1 + np.arange(self.num_slots)) % self.num_slots  # (N, T), oldest first
        flags = self._flags[in_time * self.num_envs + self._columns[:, None]]
        held = flags & HELD_OUT != 0
        if self.holdout is None and held.any():
            raise CheckpointError(
                "the replay has held-out episodes but this run holds out none; expected the replay.holdout that wrote "
                "it, so restore that or leave replay out of init_what"
            )
        self._popped[:] = 0
        for queue, mine in enumerate((~held, held)[: len(self._popped)]):
            valid = (flags & VALID != 0) & mine
            self._pushed[queue] = valid.sum(1)
            columns, _ = np.nonzero(valid)
            slots = np.zeros((self.num_slots, self.num_envs), np.int32)
            slots[_ranges(np.zeros_like(self._pushed[queue]), self._pushed[queue]), columns] = in_time[valid]
            self.tensors.queue[queue].copy_(self._upload(slots))
        self.tensors.index.copy_(self._upload(self._publish()))

    def _restore_priorities(self, tensors: Mapping[str, Tensor]) -> None:
        """Priorities as saved; rows of a replay that was saved without them all get the same."""
        if self.priorities is None:
            return
        if "tree.priorities" in tensors:
            state = {name: tensors[f"tree.{name}"] for name in ("priorities", "largest")}
        else:
            mine = self._flags & (VALID | HELD_OUT) == VALID
            state = {"priorities": torch.from_numpy(mine.astype(np.float32)), "largest": torch.ones(())}
        self.priorities.load_state_dict(state)

    def _forget(self, start: Integers, stop: Integers) -> None:
        """Clear the host's flags in the slots of rows [start_n, stop_n), whatever older rows are there."""
        if (start < stop).any():
            slots, last = np.arange(self.num_slots)[:, None], stop - 1
            newest = last - (last - slots) % self.num_slots  # (T, N), each slot's newest row up to the last
            self._flags.reshape(self.num_slots, self.num_envs)[newest >= start] = 0

    def _flat_rows(self, start: Integers, stop: Integers) -> Integers:
        """Flat rows of rows [start_n, stop_n) of every column n, column after column."""
        columns = np.repeat(self._columns, stop - start)
        return _ranges(start, stop) % self.num_slots * self.num_envs + columns

    def _upload(self, array: NDArray[np.generic]) -> Tensor:
        return upload(array, self.device)

    def _storages(self) -> dict[str, Tensor]:
        """What a row holds, by the name it has in a segment: views (R, ...)."""
        tensors = self.tensors
        groups = {f"observation.{group}": tensors.observation[:, part] for group, part in tensors.groups.items()}
        return {
            "action": tensors.action[:, : self.action_dim],
            "reward": tensors.reward,
            "flags": tensors.flags,
        } | groups


def _taken(rows: Any, index: Integers) -> Any:  # noqa: ANN401 - an array, or a tensor
    """``rows[index]``, where they lie."""
    return rows.index_select(0, upload(index, rows.device)) if isinstance(rows, Tensor) else rows[index]


def _ranges(start: Integers, stop: Integers) -> Integers:
    """The numbers start_n .. stop_n - 1 for every n, one range after the other."""
    length: Integers = stop - start
    shift: Integers = np.repeat(start - (np.cumsum(length) - length), length)
    return np.arange(len(shift), dtype=np.int64) + shift

"""Checkpoints of several ranks: every rank writes its own columns, and the first rank's manifest makes them one.

    runs/<name>/checkpoints/step_…           first rank: networks, counters, its columns, and who belongs to it
    runs/<name>/rank_1/checkpoints/step_…    second rank: its columns (environments, replay, noise), and so on

Saving has two phases. First all other ranks save their shards, which nothing refers to yet; then the first rank saves,
with the SHA-256 of their manifests: that one rename commits the whole. Killed at any instant, a run has the previous
checkpoint or the new one, and a shard of an attempt that was never committed is taken for no other. Old shards go only
after that. A column is an environment with everything that is kept for it, so another number of ranks deals the same
columns out anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlplastic.checkpoint import Checkpoint, CheckpointStore, Loaded, SegmentReference
from rlplastic.checkpoint_format import DamagedCheckpointError, fingerprint
from rlplastic.distributed import ALONE, Group
from rlplastic.errors import CheckpointError

COLUMNS = {
    "replay_head": ("written", "episodes", "observation."),
    "loop": ("episodes.returns", "episodes.lengths", "episodes.after_done", "observation."),
}
"""Beginnings of the names of tensors that have a row per column, by group; those of the agent it says itself."""


class ShardedStore:
    """The checkpoints of a run on one rank or several; what `CheckpointStore` is for one process.

    Args:
        directory: of the run.
        keep: checkpoints left after a save, at least 1.
        columns: entries of the agent's state that have a row per column.
        group: the ranks that save and load together, all at the same moments.
        warn: called with each sentence about something skipped or left behind.

    Raises:
        ConfigurationError: ``keep`` is below 1.
    """

    def __init__(
        self,
        directory: Path,
        keep: int,
        columns: Sequence[str],
        group: Group = ALONE,
        warn: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._directory, self._group = Path(directory), group
        self._columns = {**COLUMNS, "agent": tuple(columns)}
        self._lead = CheckpointStore(self._directory / "checkpoints", keep, warn)
        self._mine = CheckpointStore(self._shards(group.rank), keep, warn) if group.rank else self._lead

    def _shards(self, rank: int) -> Path:
        return self._directory / f"rank_{rank}" / "checkpoints"

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Any],
        new_segments: Sequence[Mapping[str, Tensor]] = (),
        kept_segments: Sequence[SegmentReference] = (),
        check_finite: Collection[str] = (),
    ) -> Checkpoint:
        """Save this rank's part; see `CheckpointStore.save` for arguments and errors, which are raised on all ranks.

        Only the first rank's ``documents`` are read, and of the agent other ranks need to give its columns only.
        """
        group, first = self._group, self._group.rank == 0
        write = partial(
            self._mine.save,
            step,
            tensors,
            new_segments=new_segments,
            kept_segments=kept_segments,
            check_finite=check_finite,
        )
        shard = group.attempt(lambda: write(documents={}, rotate=False), not first)
        fingerprints = group.exchange(fingerprint(shard.path) if shard else None)
        shards = {"shards": fingerprints[1:]} if group.size > 1 else {}
        whole = group.attempt(lambda: write(documents={**documents, **shards}), first)
        if shard is not None:
            self._mine.rotate(shard)
        saved = whole or shard
        assert saved is not None
        return saved

    def newest(self, segments: bool = True) -> Loaded | None:
        """This rank's part of the newest checkpoint that is good on all ranks; None without any.

        Args:
            segments: verify and offer them, too; without them there are networks and documents alone.

        Raises:
            CheckpointError: checkpoints exist but none is whole, or one has another format version.
        """
        usable: dict[int, Loaded] = {}
        for lead in self._lead.good(segments and self._group.rank == 0):
            try:
                usable.setdefault(lead.step, self._part_of(lead) if segments else lead)
            except DamagedCheckpointError as error:
                self._lead.skip(lead.path, error)
            if usable and self._group.size == 1:
                break
        first, *others = (set(steps) for steps in self._group.exchange(sorted(usable)))
        common = first.intersection(*others)
        if common:
            return usable[max(common)]
        self._group.attempt(self._lead.require_one)
        return None

    def _part_of(self, lead: Loaded) -> Loaded:
        """What this rank needs of a checkpoint: as it was saved, or put together from the shards of more or fewer."""
        rank, size, before = self._group.rank, self._group.size, 1 + len(lead.documents.get("shards", ()))
        if before == size:
            return lead if rank == 0 else _Shard.of(self._shard(lead, rank), lead)
        each = len(lead.tensors("loop")["episodes.returns"])
        if each * before % size:
            raise CheckpointError(
                f"checkpoint {lead.path} has {each * before} environments, which {size} ranks cannot share; expected "
                f"a number of ranks that divides it, such as the {before} that wrote it"
            )
        begin, end = (each * before * index // size for index in (rank, rank + 1))
        parts = [
            _Part(self._shard(lead, old), slice(max(begin - old * each, 0), min(end - old * each, each)))
            for old in range(before)
            if begin < (old + 1) * each and old * each < end
        ]
        return _Redealt.of(lead, parts, self._columns)

    def _shard(self, lead: Loaded, rank: int) -> Loaded:
        """The shard of ``rank`` that a checkpoint was committed with, verified."""
        if rank == 0:
            return CheckpointStore.load(lead.path)
        path = self._shards(rank) / f"step_{lead.step:012d}"
        if fingerprint(path) != lead.documents["shards"][rank - 1]:
            raise DamagedCheckpointError(f"{path} belongs to another attempt than {lead.path}")
        return CheckpointStore.load(path)


@dataclass(frozen=True, kw_only=True)
class _Shard(Loaded):
    """What the first rank saved, with the columns and segments of another in place of its own."""

    shard: Loaded

    @classmethod
    def of(cls, shard: Loaded, lead: Loaded) -> _Shard:
        return cls(**{**vars(lead), "segment_references": shard.segment_references}, shard=shard)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """As `Loaded.tensors`; what is the same everywhere only the first rank saved."""
        return {**super().tensors(group), **(self.shard.tensors(group) if group in self.shard.groups else {})}

    def segments(self) -> Iterator[dict[str, Tensor]]:
        """As `Loaded.segments`."""
        return self.shard.segments()


@dataclass(frozen=True)
class _Part:
    """Some columns of a shard."""

    shard: Loaded
    columns: slice


@dataclass(frozen=True, kw_only=True)
class _Redealt(Loaded):
    """A checkpoint of another number of ranks, as one of these ranks would have saved it; episodes cannot go on."""

    parts: tuple[_Part, ...]
    columns: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, lead: Loaded, parts: Sequence[_Part], columns: Mapping[str, Sequence[str]]) -> _Redealt:
        references = tuple(reference for part in parts for reference in part.shard.segment_references)
        values = {**vars(lead), "segment_references": references, "redealt": True}
        return cls(**values, parts=tuple(parts), columns=columns)

    def tensors(self, group: str) -> dict[str, Tensor]:
        """As `Loaded.tensors`: rows of these columns, and the first rank's of everything else but priorities."""
        whole = super().tensors(group)
        if len(self.parts) > 1 and any(name.startswith("cells.") for name in whole):
            raise CheckpointError(
                f"checkpoint {self.path} holds 8-bit observations, whose cells are each rank's own; expected as many "
                "ranks as wrote it, so start as many"
            )
        if group not in self.columns:
            return whole
        saved = [(part.shard.tensors(group), part.columns) for part in self.parts]
        dealt = {
            name: torch.cat([tensors[name][columns] for tensors, columns in saved])
            for name in whole
            if name.startswith(tuple(self.columns[group]))
        }
        return {name: value for name, value in whole.items() if not name.startswith("tree.")} | dealt

    def segments(self) -> Iterator[dict[str, Tensor]]:
        """As `Loaded.segments`: a shard's columns after another's; the other columns are empty in each."""
        width = sum(part.columns.stop - part.columns.start for part in self.parts)
        written = torch.zeros(width, dtype=torch.int64)
        place = 0
        for part in self.parts:
            here = slice(place, place + part.columns.stop - part.columns.start)
            place = here.stop
            for segment in part.shard.segments():
                yield _cut(segment, part.columns, here, written)


def _cut(segment: Mapping[str, Tensor], columns: slice, here: slice, written: Tensor) -> dict[str, Tensor]:
    """The rows of some columns of a segment, as columns ``here`` of a wider one; ``written`` goes along."""
    start, stop = segment["replay.start"], segment["replay.stop"]
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), (stop - start).cumsum(0)))
    rows = slice(int(ends[columns.start]), int(ends[columns.stop]))
    bounds = {"replay.start": written.clone(), "replay.stop": written.clone()}
    bounds["replay.start"][here], bounds["replay.stop"][here] = start[columns], stop[columns]
    written[here] = stop[columns]
    cut = {
        name: value[rows]
        for name, value in segment.items()
        if name.startswith("replay.") and not name.startswith("replay.cells.")
    }
    return {**segment, **cut, **bounds, "actions": segment["actions"][:0]}

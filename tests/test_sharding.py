"""Checkpoints of several ranks: whole or not there, and the same columns for any number of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import Threads, on_ranks, succeed

from rlplastic.checkpoint import Checkpoint, CheckpointStore
from rlplastic.distributed import ALONE, Group
from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.errors import CheckpointError, CheckpointWriteError
from rlplastic.replay import ReplayRing, Sampler
from rlplastic.session import part
from rlplastic.sharding import ShardedStore

ENVS, SLOTS = 4, 7


def ring_of(columns: slice, steps: int = 0, dtype: str = "float32") -> ReplayRing:
    """The replay of some of four environments, after some steps, each row recognisable."""
    count = columns.stop - columns.start
    ring = ReplayRing((SLOTS - 1) * count, count, {"policy": 2}, 1, AutoresetMode.NEXT_STEP, dtype)
    numbers = np.arange(ENVS, dtype=np.float32)[columns]

    def observation(t: int) -> dict[str, np.ndarray]:
        return {"policy": np.stack((numbers, np.full(count, t, np.float32)), 1)}

    if steps:
        ring.begin(observation(0))
    for t in range(1, steps + 1):
        done = (t + numbers) % 5 == 0
        valid = (t + numbers) % 5 != 1
        step = Step(observation(t), numbers * 100 + t, done, np.zeros(count, bool), {})
        ring.add(numbers[:, None] / 10, step, valid)
    return ring


def columns_of(group: Group) -> slice:
    return slice(ENVS * group.rank // group.size, ENVS * (group.rank + 1) // group.size)


def store_of(folder: Path, group: Group = ALONE, keep: int = 2) -> ShardedStore:
    return ShardedStore(folder, keep, ("noise",), group)


def save(folder: Path, group: Group, steps: int, keep: int = 2, store: ShardedStore | None = None) -> Checkpoint:
    columns = columns_of(group)
    ring = ring_of(columns, steps)
    environments = torch.arange(ENVS)[columns]
    segment = {f"replay.{k}": v for k, v in ring.export_rows(np.zeros_like(ring.written), ring.written).items()}
    agent = {"noise": environments + 0.5} | ({} if group.rank else {"weight": torch.full((3,), float(steps))})
    loop = {
        "episodes.returns": environments + 0.25,
        "observation.policy": environments[:, None],
        "metrics.x": torch.ones(1),
    }
    return (store or store_of(folder, group, keep)).save(
        steps,
        {"agent": agent, "replay_head": ring.export_head(), "loop": loop},
        {"progress": {"transitions": steps}},
        [{**segment, "actions": torch.zeros(2, len(environments), 1), "builds": torch.tensor(0)}],
    )


def restored(folder: Path, group: Group) -> tuple[dict[str, Any], ReplayRing]:
    """What a rank finds, and its ring."""
    loaded = store_of(folder, group).newest()
    assert loaded is not None and loaded.documents["progress"]["transitions"] == loaded.step
    ring = ring_of(columns_of(group))
    for segment in loaded.segments():
        ring.import_rows(part(segment, "replay."))
    ring.import_head(loaded.tensors("replay_head"))
    return loaded.tensors("agent") | loaded.tensors("loop") | {"redealt": loaded.redealt}, ring


@pytest.mark.parametrize("then", [1, 2, 4])
@pytest.mark.parametrize("before", [1, 2, 4])
def test_any_number_of_ranks_finds_the_columns_that_any_number_saved(tmp_path: Path, before: int, then: int) -> None:
    succeed(before, lambda group: save(tmp_path, group, 11))
    for rank, (found, ring) in enumerate(succeed(then, lambda group: restored(tmp_path, group))):
        columns = columns_of(Threads(rank, then))
        environments, oracle = torch.arange(ENVS)[columns], ring_of(columns, 11)
        assert found["redealt"] == (before != then)
        assert torch.equal(found["noise"], environments + 0.5)
        assert torch.equal(found["episodes.returns"], environments + 0.25)
        assert found["weight"].tolist() == [11, 11, 11] and found["metrics.x"].tolist() == [1]
        assert ring.transitions == oracle.transitions
        everything = np.zeros_like(ring.written), ring.written
        mine, theirs = ring.export_rows(*everything), oracle.export_rows(*everything)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
        drawn = [Sampler(replay, 4, 1, 0.99, seed=0).sample(0).rows for replay in (ring, oracle)]
        assert torch.equal(*drawn)


def test_a_checkpoint_whose_last_phase_failed_is_none_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed(2, lambda group: save(tmp_path, group, 3, keep=1))
    real = CheckpointStore.save

    def failing(store: CheckpointStore, *arguments: Any, **options: Any) -> Checkpoint:
        if store.directory == tmp_path / "checkpoints":
            raise CheckpointWriteError("the disk is full")
        return real(store, *arguments, **options)

    monkeypatch.setattr(CheckpointStore, "save", failing)
    for steps in (4, 5):
        outcomes = on_ranks(2, lambda group, steps=steps: save(tmp_path, group, steps, keep=1))
        assert [type(outcome) for outcome in outcomes] == [CheckpointWriteError] * 2
        assert str(outcomes[1]) == "rank 0: the disk is full"
    assert all(found["weight"][0] == 3 for found, _ in succeed(2, lambda group: restored(tmp_path, group)))
    monkeypatch.undo()
    succeed(2, lambda group: save(tmp_path, group, 6, keep=1))
    names = {path.name for path in (tmp_path / "rank_1" / "checkpoints").glob("step_*")}
    assert names == {"step_000000000006"}


def test_a_shard_that_cannot_be_written_is_told_on_all_ranks_and_nothing_is_committed(
    tmp_path: Path,
) -> None:
    succeed(2, lambda group: save(tmp_path, group, 3))
    (tmp_path / "rank_1" / "checkpoints" / ".staging_step_000000000004").mkdir()
    (tmp_path / "rank_1" / "checkpoints" / "segments").rename(tmp_path / "aside")
    (tmp_path / "rank_1" / "checkpoints" / "segments").write_text("in the way")
    outcomes = on_ranks(2, lambda group: save(tmp_path, group, 4))
    assert [type(outcome) for outcome in outcomes] == [CheckpointWriteError] * 2
    assert str(outcomes[0]).startswith("rank 1: ")
    assert not (tmp_path / "checkpoints" / "step_000000000004").exists()


def test_a_damaged_shard_sends_all_ranks_to_the_checkpoint_before(tmp_path: Path) -> None:
    for steps in (3, 5):
        succeed(2, lambda group, steps=steps: save(tmp_path, group, steps))
    file = tmp_path / "rank_1" / "checkpoints" / "step_000000000005" / "loop.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert [found["weight"][0] for found, _ in succeed(2, lambda group: restored(tmp_path, group))] == [3, 3]
    assert restored(tmp_path, ALONE)[0]["weight"][0] == 3
    (tmp_path / "rank_1" / "checkpoints" / "step_000000000003" / "manifest.json").unlink()
    assert all(isinstance(outcome, CheckpointError) for outcome in on_ranks(2, lambda group: restored(tmp_path, group)))


def test_a_shard_of_an_attempt_that_was_never_committed_is_not_taken(tmp_path: Path) -> None:
    succeed(2, lambda group: save(tmp_path, group, 3))
    succeed(2, lambda group: save(tmp_path, group, 5))
    other, theirs = tmp_path / "other", tmp_path / "rank_1" / "checkpoints" / "step_000000000005"
    succeed(2, lambda group: save(other, group, 4))
    shutil.copytree(other / "rank_1" / "checkpoints" / "segments", theirs.parent / "segments", dirs_exist_ok=True)
    shutil.rmtree(theirs)
    (other / "rank_1" / "checkpoints" / "step_000000000004").rename(theirs)
    assert [found["weight"][0] for found, _ in succeed(2, lambda group: restored(tmp_path, group))] == [3, 3]


def test_environments_that_cannot_be_dealt_out_are_refused(tmp_path: Path) -> None:
    succeed(4, lambda group: save(tmp_path, group, 3))
    outcomes = on_ranks(3, lambda group: store_of(tmp_path, group).newest())
    assert all("4 environments, which 3 ranks cannot share" in str(outcome) for outcome in outcomes)


def test_without_a_checkpoint_there_is_none_on_any_rank(tmp_path: Path) -> None:
    assert succeed(2, lambda group: store_of(tmp_path, group).newest()) == [None, None]


def test_eight_bit_observations_of_two_ranks_cannot_be_put_into_one(tmp_path: Path) -> None:
    def with_cells(group: Threads) -> None:
        ring = ring_of(columns_of(group), 5, "int8")
        head = ring.export_head()
        loop = {"episodes.returns": torch.zeros(2)}
        store_of(tmp_path, group).save(5, {"agent": {"noise": torch.zeros(2)}, "replay_head": head, "loop": loop}, {})

    succeed(2, with_cells)
    loaded = store_of(tmp_path).newest()
    assert loaded is not None
    with pytest.raises(CheckpointError, match="8-bit observations"):
        loaded.tensors("replay_head")

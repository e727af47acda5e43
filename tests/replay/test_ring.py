"""Storage: memory estimates, storage dtypes, and exports that continue bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_oracle import Simulation

from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.errors import CheckpointError, ConfigurationError
from rlplastic.kernels._triton import interpreted
from rlplastic.replay import Batch, ReplayRing, Sampler, memory
from rlplastic.replay.holdout import Holdout
from rlplastic.replay.layout import RowLayout

NEXT_STEP, SAME_STEP = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP
KERNELS = ["numpy", "torch", *(["triton"] if interpreted() else [])]


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    groups = [*batch.observation.values(), *batch.next_observation.values()]
    return [tensor.clone() for tensor in [batch.action, batch.reward, batch.discount, batch.rows, *groups]]


def assert_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def everything(ring: ReplayRing) -> list[torch.Tensor]:
    rows = ring.export_rows(np.zeros_like(ring.written), ring.written)
    return [*rows.values(), *ring.export_head().values()]


@settings(max_examples=100, deadline=None)
@given(
    num_envs=st.integers(1, 4),
    capacity=st.integers(1, 30),
    n_step=st.integers(1, 3),
    autoreset=st.sampled_from([NEXT_STEP, SAME_STEP]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
    segments=st.lists(st.integers(0, 25), min_size=1, max_size=5),
    rebuild=st.booleans(),
    at_once=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_imported_replay_continues_bit_for_bit(
    num_envs: int, capacity: int, n_step: int, autoreset: AutoresetMode, dtype: str,
    segments: list[int], rebuild: bool, at_once: bool, seed: int,
) -> None:  # fmt: skip
    envs = Simulation(num_envs, autoreset, np.random.default_rng(seed))
    original, restored = (envs.ring(capacity, num_envs, autoreset, dtype) for _ in range(2))
    envs.begin(original)
    exports, exported = [], original.written.copy()
    for length in segments:
        for index in range(length):
            if rebuild and index == 3:
                envs.begin(original)
            envs.step(original)
        exports.append(original.export_rows(exported, original.written))
        exported = original.written.copy()
    if at_once:  # none of the rows that were overwritten since
        exports = [original.export_rows(np.zeros_like(exported), exported)]
    for export in exports:
        restored.import_rows(export)
    restored.import_head(original.export_head())
    samplers = [Sampler(ring, min(capacity, 6), n_step, 0.99, seed) for ring in (original, restored)]
    for draw in range(original.num_slots + 3):
        assert restored.transitions == original.transitions
        assert_equal(everything(original), everything(restored))
        if original.transitions:
            assert_equal(*(tensors_of(sampler.sample(draw)) for sampler in samplers))
        if draw in (0, 3) and rebuild:
            envs.begin(original, restored)
        envs.step(original, restored)


def filled(steps: int, capacity: int = 12, num_envs: int = 2) -> ReplayRing:
    envs = Simulation(num_envs, NEXT_STEP, np.random.default_rng(0))
    ring: ReplayRing = envs.ring(capacity, num_envs, NEXT_STEP)
    envs.begin(ring)
    for _ in range(steps):
        envs.step(ring)
    return ring


def test_export_is_cut_to_what_is_still_in_the_ring() -> None:
    ring = filled(steps=20)
    rows = ring.export_rows(np.array([0, 17]), np.array([18, 99]))
    assert rows["start"].tolist() == [14, 17] and rows["stop"].tolist() == [18, 20]
    assert rows["observation.policy"].shape == (4 + 3, 3) and rows["reward"].shape == (7,)
    assert rows["observation.policy"][:4, 0].eq(1).all() and rows["observation.policy"][4:, 0].eq(2).all()
    gone = ring.export_rows(np.array([0, 0]), np.array([3, 3]))
    assert gone["start"].tolist() == gone["stop"].tolist() == [14, 14] and gone["action"].shape == (0, 2)


def test_rows_that_no_segment_covers_stay_invalid() -> None:
    source = filled(steps=6)
    ring = ReplayRing(12, 2, source.observation_dims, source.action_dim, NEXT_STEP)
    ring.import_rows(source.export_rows(np.array([4, 5]), source.written))
    ring.import_head(source.export_head())
    valid = (source.tensors.flags.numpy() & 1).astype(bool).reshape(-1, 2)
    valid[:4, 0] = valid[:5, 1] = False
    assert np.array_equal((ring.tensors.flags.numpy() & 1).astype(bool).reshape(-1, 2), valid)
    assert ring.transitions == valid.sum()


def test_a_missing_segment_leaves_its_rows_invalid_although_older_rows_were_in_their_slots() -> None:
    envs = Simulation(1, NEXT_STEP, np.random.default_rng(0), end_probability=0.0)
    source, ring = (envs.ring(6, 1, NEXT_STEP) for _ in range(2))  # 7 slots
    envs.begin(source)
    for index in range(1, 13):
        envs.step(source)
        if index in (6, 12):
            first = 0 if index == 6 else 9  # rows 6, 7 and 8 are missing: slots 6, 0 and 1, where rows 0 and 1 were
            ring.import_rows(source.export_rows(np.array([first]), source.written))
    ring.import_head(source.export_head())
    assert ring.transitions == 3 and np.flatnonzero(ring.tensors.flags.numpy()).tolist() == [2, 3, 4]


def test_segments_of_another_replay_or_order_are_refused() -> None:
    source = filled(steps=6)
    segment, head = source.export_rows(np.zeros(2, np.int64), source.written), source.export_head()
    dims = source.observation_dims
    with pytest.raises(CheckpointError, match="differs from this replay"):
        ReplayRing(12, 2, dims, 5, NEXT_STEP).import_rows(segment)
    with pytest.raises(CheckpointError, match="differs from this replay"):
        ReplayRing(12, 2, dims, 2, NEXT_STEP, "float16").import_rows(segment)
    with pytest.raises(CheckpointError, match="exceeds the capacity"):
        ReplayRing(4, 2, dims, 2, NEXT_STEP).import_rows(segment)
    with pytest.raises(CheckpointError, match="out of order"):
        source.import_rows(segment)
    ring = ReplayRing(12, 2, dims, 2, NEXT_STEP)
    ring.import_rows(segment)
    with pytest.raises(CheckpointError, match="out of order"):
        ring.import_rows(segment)
    with pytest.raises(CheckpointError, match="does not follow"):
        ring.import_head({**head, "written": head["written"] - 1})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize(("capacity", "num_envs"), [(1, 1), (100, 7), (1000, 16)])
@pytest.mark.parametrize("extras", [False, True])
def test_memory_estimate_equals_the_allocation(capacity: int, num_envs: int, dtype: str, extras: bool) -> None:
    dims = {"policy": 5, "critic": 3}
    holdout = Holdout(0.5, seed=0) if extras else None
    ring = ReplayRing(capacity, num_envs, dims, 4, NEXT_STEP, dtype, holdout=holdout, prioritised=extras)
    tensors = [value for value in vars(ring.tensors).values() if isinstance(value, torch.Tensor)]
    if ring.priorities is not None:
        tensors += [value for value in vars(ring.priorities).values() if isinstance(value, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    estimate = memory.memory_bytes(capacity, num_envs, ring.layout, queues=1 + extras, prioritised=extras)
    assert estimate == sum(storages.values())
    assert ring._flags.ctypes.data in storages  # on a CPU the host's copy of the flags costs nothing


@pytest.mark.parametrize("prioritised", [False, True])
def test_what_does_not_fit_is_refused_with_the_largest_capacity_that_does(
    monkeypatch: pytest.MonkeyPatch, prioritised: bool
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 10_000_000)
    layout = RowLayout({"policy": 20}, 5, "float32")
    with pytest.raises(ConfigurationError, match=r"at most \d+") as refused:
        memory.check_memory(1_000_000, 3, layout, prioritised=prioritised)
    largest = int(str(refused.value).split("at most ")[1].split()[0])
    assert largest > 10_000
    needed = memory.check_memory(largest, 3, layout, prioritised=prioritised)
    assert needed == memory.memory_bytes(largest, 3, layout, prioritised=prioritised) <= 9_000_000
    if not prioritised:  # a tree grows in powers of two: the advice is safe, not the very last transition
        with pytest.raises(ConfigurationError):
            memory.check_memory(largest + 1, 3, layout)


def test_available_memory_is_what_the_kernel_says() -> None:
    assert 2**20 < memory.available_memory(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, {"policy": 1}, 1, NEXT_STEP), "capacity is 0"),
        ((1, 0, {"policy": 1}, 1, NEXT_STEP), "num_envs is 0"),
        ((1, 1, {"policy": 1}, 1, NEXT_STEP, "float61"), "did you mean 'float16'"),
        ((2**31, 1, {"policy": 1}, 1, NEXT_STEP), "below 2"),
    ],
)
def test_impossible_sizes_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ReplayRing(*arguments)


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 65504.0), ("bfloat16", 3.3895313892515355e38)])
@pytest.mark.parametrize("kernels", KERNELS)
def test_values_beyond_the_storage_range_become_the_largest_finite_number(
    dtype: str, limit: float, kernels: str
) -> None:
    ring = ReplayRing(4, 1, {"policy": 3}, 1, NEXT_STEP, dtype, kernels=kernels)
    ring.begin({"policy": np.array([[3.4e38, -3.4e38, 1.5]], np.float32)})
    assert ring.tensors.observation[0, :3].tolist() == [limit, -limit, 1.5]


def test_the_ring_keeps_copies_and_takes_read_only_arrays() -> None:
    ring = ReplayRing(4, 2, {"policy": 1}, 1, SAME_STEP)
    observation, ones = np.ones((2, 1), np.float32), np.ones(2, np.float32)
    final = np.full((2, 1), 9.0, np.float32)
    ended = np.array([True, False])
    for array in (observation, ones, final):
        array.setflags(write=False)
    ring.begin({"policy": observation})
    info = {"final_observation": {"policy": final}}
    ring.add(observation, Step({"policy": observation}, ones, ended, ended, info), np.array([True, True]))
    observation.setflags(write=True)
    observation[:] = 5.0
    assert observation.max() == 5.0 and ring.tensors.observation[::2, 0].tolist()[:3] == [1.0, 9.0, 1.0]


def test_transitions_that_lockstep_and_scattered_writes_store_are_the_same() -> None:
    """The fast path of equal cursors against the general one, forced."""
    envs = Simulation(3, NEXT_STEP, np.random.default_rng(5))
    fast, general = (envs.ring(15, 3, NEXT_STEP) for _ in range(2))
    general._heads = lambda: general.written % general.num_slots * general.num_envs + general._columns
    envs.begin(fast, general)
    for _ in range(20):
        envs.step(fast, general)
    assert_equal(everything(fast), everything(general))

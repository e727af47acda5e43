"""The kernels of the replay, numpy's and Triton's, against the reference and against a list of transitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from replay_oracle import Simulation, against_the_list, copies, uneven_ring

from rlplastic import seeding
from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.kernels._triton import AVAILABLE, interpreted
from rlplastic.replay import Holdout, ReplayRing, Sampler

NEXT_STEP, SAME_STEP = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP
KERNELS = ["numpy", "torch", "triton"]
DEVICES = {"numpy": "cpu", "torch": "cpu", "triton": "cpu" if interpreted() else "cuda"}
"""Compiled kernels take the tensors of a GPU; the others stay, to be compared with them."""
pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs triton")
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)


@settings(max_examples=12, deadline=None, phases=NO_SHRINKING)  # the interpreter is slow
@given(
    num_envs=st.integers(1, 4),
    capacity=st.integers(1, 20),
    n_step=st.integers(1, 5),
    autoreset=st.sampled_from([NEXT_STEP, SAME_STEP]),
    end_probability=st.sampled_from([0.0, 0.4, 1.0]),
    actions=st.lists(st.sampled_from(["step"] * 12 + ["begin"]), min_size=1, max_size=25),
    holdout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**16),
)
def test_the_kernels_sample_exactly_the_transitions_too(
    num_envs: int, capacity: int, n_step: int, autoreset: AutoresetMode, end_probability: float,
    actions: list[str], holdout: float, seed: int,
) -> None:  # fmt: skip
    against_the_list(num_envs, capacity, n_step, autoreset, end_probability, 0.5, actions, "triton", holdout, seed,
                     DEVICES["triton"])  # fmt: skip


@settings(max_examples=12, deadline=None, phases=NO_SHRINKING)  # the interpreter is slow
@given(
    num_envs=st.integers(1, 4),
    capacity=st.integers(1, 30),
    n_step=st.integers(1, 5),
    autoreset=st.sampled_from([NEXT_STEP, SAME_STEP]),
    dtype=st.sampled_from(["float32", "float16", "bfloat16", "int8"]),
    half_life=st.sampled_from([None, 5.0, 1000.0]),
    rebuild_at=st.integers(0, 20),
    seed=st.integers(0, 2**16),
)
def test_all_kernels_write_and_draw_the_same_bits(
    num_envs: int, capacity: int, n_step: int, autoreset: AutoresetMode, dtype: str,
    half_life: float | None, rebuild_at: int, seed: int,
) -> None:  # fmt: skip
    envs = Simulation(num_envs, autoreset, np.random.default_rng(seed))
    held = Holdout(0.3, seed)
    rings = [
        envs.ring(capacity, num_envs, autoreset, dtype, kernels=name, holdout=held, device=DEVICES[name])
        for name in KERNELS
    ]
    size = min(capacity, 6)
    samplers = [
        Sampler(ring, size, n_step, 0.97, seed, half_life=half_life, kernels=name)
        for ring in rings
        for name in KERNELS
        if name == "torch" or DEVICES[name] == ring.device.type
    ]
    envs.begin(*rings)
    for draw in range(16):
        envs.begin(*rings) if draw == rebuild_at else envs.step(*rings)
        assert len({(ring.transitions, ring.held_out) for ring in rings}) == 1
        if draw % 5 == 4 and rings[0].transitions:
            scales = [torch.tensor(0.3, device=sampler.device) for sampler in samplers]
            first, *others = [copies(s.sample(draw, scale)) for s, scale in zip(samplers, scales, strict=True)]
            for other in others:
                assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for name, tensor in vars(rings[0].tensors).items():
        if isinstance(tensor, torch.Tensor) and name != "queue":  # of which only what the index names counts
            assert all(torch.equal(tensor, getattr(ring.tensors, name).cpu()) for ring in rings[1:]), name


ADVERSARIAL = {
    "capacity of one step": {"capacity": 1},
    "done on every step": {"end_probability": 1.0, "capacity": 9},
    "one environment": {"num_envs": 1},
    "a thousand environments": {"num_envs": 1000, "capacity": 2000, "steps": 3, "dims": {"policy": 1}},
    "observations of one number": {"dims": {"policy": 1}},
    "observations of 7 numbers": {"dims": {"policy": 7}},
    "Humanoid": {"dims": {"policy": 348}},
    "more than a block of lanes": {"dims": {"policy": 2500}, "capacity": 8},
    "two groups": {"dims": {"policy": 103, "critic": 216}},
}


@pytest.mark.parametrize("case", ADVERSARIAL)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_kernels_agree_in_adversarial_cases(case: str, dtype: str) -> None:
    options = {"num_envs": 2, "capacity": 8, "dims": {"policy": 5}, "end_probability": 0.3, "steps": 11}
    options |= ADVERSARIAL[case]
    count, dims, rng = options["num_envs"], options["dims"], np.random.default_rng(0)
    rings = [
        ReplayRing(options["capacity"], count, dims, 3, SAME_STEP, dtype, DEVICES[name], kernels=name)
        for name in KERNELS
    ]
    size = min(16, options["capacity"])
    samplers = [Sampler(ring, size, 3, 0.99, 1, kernels=name) for ring, name in zip(rings, KERNELS, strict=True)]

    def observation() -> dict[str, np.ndarray]:
        return {group: rng.standard_normal((count, dim), np.float32) for group, dim in dims.items()}

    start = observation()
    for ring in rings:
        ring.begin(start)
    for draw in range(options["steps"]):
        ended = rng.random(count) < options["end_probability"]
        step = Step(observation(), rng.standard_normal(count, np.float32), ended, ~ended & (rng.random(count) < 0.1),
                    {"final_observation": observation()})  # fmt: skip
        action, valid = rng.uniform(-1, 1, (count, 3)).astype(np.float32), rng.random(count) < 0.9
        for ring in rings:
            ring.add(action, step, valid)
        if rings[0].transitions and draw % 2 == 0:
            first, *others = [copies(sampler.sample(draw)) for sampler in samplers]
            for other in others:
                assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
            assert first[2].isfinite().all() and (first[3] <= 1).all()


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_row_invalid_but_one(kernels: str) -> None:
    ring = ReplayRing(40, 4, {"policy": 1}, 1, NEXT_STEP, device=DEVICES[kernels], kernels=kernels)
    zeros, never = np.zeros((4, 1), np.float32), np.zeros(4, bool)
    ring.begin({"policy": zeros})
    for index in range(9):
        valid = np.array([False, False, index == 5, False])
        reward = np.full(4, float(index), np.float32)
        ring.add(zeros, Step({"policy": zeros + index}, reward, never, never, {}), valid)
    batch = Sampler(ring, 20, 3, 0.99, seed=0, kernels=kernels).sample(2)
    assert batch.rows.unique().tolist() == [5 * 4 + 2] and batch.reward.unique().tolist() == [5.0]


@pytest.mark.parametrize("kernels", KERNELS)
def test_draws_are_the_reference_sequence(kernels: str) -> None:
    """The rows of ten thousand draws, worked out in Python's integers from the Philox words."""
    ring = uneven_ring([30, 1, 0, 10], 160, DEVICES[kernels])
    sampler = Sampler(ring, 100, 1, 0.99, seed=3, rank=1, kernels=kernels)
    key, index = seeding.key("replay", 3, 1), ring.tensors.index[0]
    cumulative, offset = index[0].tolist(), index[1].tolist()
    for draw in [0, 1, 2**33 + 5] if kernels == "triton" else range(100):
        words = [word.tolist() for word in seeding.philox(torch.arange(50), draw, key)]
        pairs = [pair for w in zip(*words, strict=True) for pair in (w[:2], w[2:])]
        expected = []
        for upper, lower in pairs:
            rank = ((upper << 32 | lower) * cumulative[-1]) >> 64
            column = next(n for n, upto in enumerate(cumulative) if upto > rank)
            slot = int(ring.tensors.queue[0, (offset[column] + rank) % ring.num_slots, column])
            expected.append(slot * 4 + column)
        assert sampler.sample(draw).rows.tolist() == expected

"""Batches that are fetched ahead are the batches that a plain sampler draws, in the same order."""

from __future__ import annotations

import threading
from functools import partial

import numpy as np
import pytest
import torch
from replay_oracle import Simulation, copies

from rlplastic.envs.base import AutoresetMode
from rlplastic.errors import ConfigurationError
from rlplastic.replay import ReplayRing, Sampler
from rlplastic.replay.prefetch import PrefetchingSampler


def stepped(pinned: bool = False) -> tuple[Simulation, ReplayRing]:
    envs = Simulation(2, AutoresetMode.NEXT_STEP, np.random.default_rng(0))
    ring = envs.ring(30, 2, AutoresetMode.NEXT_STEP, pinned=pinned)
    envs.begin(ring)
    for _ in range(12):
        envs.step(ring)
    return envs, ring


def against_a_plain_sampler(device: str) -> None:
    pinned = device == "cuda"
    envs, ring = stepped(pinned)
    make = partial(Sampler, ring, 16, 3, 0.99, 0, pinned=pinned)
    ahead, plain, scale = PrefetchingSampler(make, device), Sampler(ring, 16, 3, 0.99, 0), torch.tensor(0.5)
    first = 0
    for count in [1, 0, 2, 5, 1, 3]:
        envs.step(ring)
        seen = [[t.cpu() for t in copies(batch)] for batch in ahead.batches(first, count, scale.to(device))]
        expected = [copies(batch) for batch in plain.batches(first, count, scale)]
        assert len(seen) == count
        for one, other in zip(seen, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        first += count


def test_batches_fetched_ahead_equal_those_drawn_in_time() -> None:
    against_a_plain_sampler("cpu")


@pytest.mark.gpu
def test_batches_copied_to_a_gpu_equal_those_drawn_in_time() -> None:
    against_a_plain_sampler("cuda")


def test_the_next_batch_is_gathered_while_this_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ring = stepped()
    drawn, real = threading.Event(), Sampler.sample

    def sample(self: Sampler, draw: int, reward_scale: torch.Tensor | None = None) -> object:
        batch = real(self, draw, reward_scale)
        if draw == 8:
            drawn.set()
        return batch

    monkeypatch.setattr(Sampler, "sample", sample)
    batches = PrefetchingSampler(partial(Sampler, ring, 4, 1, 0.9, 0), "cpu").batches(7, 2)
    next(batches)
    assert drawn.wait(10)


def test_a_problem_of_the_worker_is_the_learners_too() -> None:
    envs = Simulation(2, AutoresetMode.NEXT_STEP, np.random.default_rng(0))
    ring = envs.ring(30, 2, AutoresetMode.NEXT_STEP)
    envs.begin(ring)
    ahead = PrefetchingSampler(partial(Sampler, ring, 4, 1, 0.9, 0), "cpu")
    with pytest.raises(ConfigurationError, match="no transition"):
        next(ahead.batches(0, 1))

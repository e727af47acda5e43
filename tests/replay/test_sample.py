"""Batches against a brute-force list of transitions, uniformity, and the promise never to wait for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.errors import ConfigurationError
from rlplastic.replay import ReplayRing, Sampler, sample

NEXT_STEP, SAME_STEP = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP


def every_transition(ring: ReplayRing, n_step: int, gamma: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Batches that between them hold ranks 0 .. total - 1, each rank once (the last one repeated as filling)."""
    size = min(ring.capacity, 7)
    sampler = Sampler(ring, size, n_step, gamma, seed=0)
    with monkeypatch.context() as patch:
        for begin in range(0, ring.transitions, size):
            ranks = torch.arange(begin, begin + size).clamp(max=ring.transitions - 1)
            patch.setattr(sample.seeding, "uniform_integers", lambda *_, ranks=ranks: ranks)
            yield sampler.sample(0)


@settings(max_examples=150, deadline=None)
@given(
    num_envs=st.integers(1, 5),
    capacity=st.integers(1, 40),
    n_step=st.integers(1, 5),
    autoreset=st.sampled_from([NEXT_STEP, SAME_STEP]),
    end_probability=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    gamma=st.sampled_from([0.5, 0.97]),
    actions=st.lists(st.sampled_from(["step"] * 12 + ["begin", "check"]), min_size=1, max_size=60),
    seed=st.integers(0, 2**16),
)
def test_every_sampled_row_is_exactly_a_transition_and_every_transition_can_be_sampled(
    simulation: Any, num_envs: int, capacity: int, n_step: int, autoreset: AutoresetMode, end_probability: float,
    gamma: float, actions: list[str], seed: int,
) -> None:  # fmt: skip
    envs = simulation(num_envs, autoreset, np.random.default_rng(seed), end_probability)
    ring = envs.ring(capacity, num_envs, autoreset)
    envs.begin(ring)
    monkeypatch = pytest.MonkeyPatch()
    for action in [*actions, "check"]:
        if action == "step":
            envs.step(ring)
        elif action == "begin":
            envs.begin(ring)
        else:
            expected = envs.sampleable(ring.num_slots)
            seen: list[tuple[int, int]] = []
            for batch in every_transition(ring, n_step, gamma, monkeypatch):
                envs.check(batch, ring.num_slots, n_step, gamma, exact=gamma == 0.5)
                seen += [(slot, column) for slot, column in batch.rows.tolist()]
            assert len(expected) == ring.transitions and len(set(seen)) == ring.transitions
            assert set(seen) == set(expected)
            if ring.transitions:
                drawn = Sampler(ring, min(capacity, 16), n_step, gamma, seed)
                envs.check(drawn.sample(seed), ring.num_slots, n_step, gamma, exact=gamma == 0.5)
    assert ring.written.tolist() == envs.rows


@pytest.mark.parametrize("autoreset", [NEXT_STEP, SAME_STEP])
def test_row_after_done_is_never_sampled(simulation: Any, autoreset: AutoresetMode) -> None:
    envs = simulation(3, autoreset, np.random.default_rng(1), end_probability=0.5)
    ring = envs.ring(60, 3, autoreset)
    envs.begin(ring)
    for _ in range(50):
        envs.step(ring)
    after_done = {
        ((transition.row + 1) % ring.num_slots, n)
        for n, column in enumerate(envs.columns)
        for transition in column
        if transition.row >= envs.rows[n] - ring.num_slots + 2 and (transition.terminated or transition.truncated)
    }
    assert len(after_done) > 10
    sampler = Sampler(ring, 60, 1, 0.99, seed=0)
    seen = {tuple(row) for draw in range(200) for row in sampler.sample(draw).rows.tolist()}
    assert not seen & after_done


def uneven_ring(wanted: list[int], capacity: int) -> ReplayRing:
    """Column n holds ``wanted[n]`` transitions, spread among rows that are none."""
    count, rows = len(wanted), max(wanted)
    ring = ReplayRing(capacity, count, {"policy": 1}, 1, NEXT_STEP)
    zeros = np.zeros(count, np.float32)
    ring.begin({"policy": zeros[:, None]})
    never = np.zeros(count, bool)
    for index in range(rows):
        valid = np.array([n > 0 and index % (rows // n) == 0 for n in wanted])
        ring.add(zeros[:, None], Step({"policy": zeros[:, None]}, zeros, never, never, {}), valid)
    return ring


@pytest.mark.parametrize(
    "counts", [[50, 50, 50, 50], [200, 1, 0, 10, 0], [0, 0, 100]], ids=["even", "uneven", "only the last column"]
)
def test_a_million_draws_are_uniform_over_transitions(counts: list[int]) -> None:
    ring = uneven_ring(counts, 200 * len(counts))
    assert ring.transitions == sum(counts)
    sampler = Sampler(ring, min(ring.capacity, 500), 1, 0.99, seed=3, rank=1)
    tally = np.zeros(ring.num_slots * ring.num_envs)
    draws = 1_000_000 // sampler.batch_size
    for draw in range(draws):
        np.add.at(tally, sampler.sample(draw).rows.numpy() @ [ring.num_envs, 1], 1)
    valid = (ring.flags.numpy() & 1).reshape(-1).astype(bool)
    assert tally[~valid].sum() == 0
    expected, freedom = tally.sum() / ring.transitions, ring.transitions - 1
    statistic = ((tally[valid] - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5  # mean and deviation of the chi-square law


def short_run(terminated_at: int | None = None, truncated_at: int | None = None) -> ReplayRing:
    """One environment, five steps with rewards 1, 2, 4, 8, 16 and observations 0 .. 5."""
    ring = ReplayRing(8, 1, {"policy": 1}, 1, NEXT_STEP)
    ring.begin({"policy": np.zeros((1, 1), np.float32)})
    for index in range(5):
        ends = np.array([index == terminated_at]), np.array([index == truncated_at])
        step = Step({"policy": np.full((1, 1), index + 1.0, np.float32)}, np.array([2.0**index], np.float32), *ends, {})
        ring.add(np.zeros((1, 1), np.float32), step, np.array([True]))
    return ring


@pytest.mark.parametrize(
    ("end", "reward", "discount", "bootstrap"),
    [
        ({}, 1 + 0.9 * 2 + 0.81 * 4, 0.729, 3),
        ({"terminated_at": 1}, 1 + 0.9 * 2, 0.0, 2),
        ({"truncated_at": 1}, 1 + 0.9 * 2, 0.81, 2),
        ({"terminated_at": 1, "truncated_at": 1}, 1 + 0.9 * 2, 0.0, 2),
        ({"terminated_at": 3}, 1 + 0.9 * 2 + 0.81 * 4, 0.729, 3),
    ],
)
def test_three_step_return_of_the_first_row_has_its_closed_form(
    end: dict[str, int], reward: float, discount: float, bootstrap: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = short_run(**end)
    monkeypatch.setattr(sample.seeding, "uniform_integers", lambda *_: torch.zeros(1, dtype=torch.int64))
    batch = Sampler(ring, 1, 3, 0.9, seed=0).sample(0)
    assert batch.reward.item() == pytest.approx(reward, rel=1e-6)
    assert batch.discount.item() == pytest.approx(discount, rel=1e-6)
    assert batch.next_observation["policy"].item() == bootstrap


def test_return_at_the_head_sums_what_there_is() -> None:
    ring = short_run()
    batch = Sampler(ring, 8, 3, 0.5, seed=0).sample(1)
    last = batch.rows[:, 0] == 4
    assert last.any()
    assert batch.reward[last].unique().tolist() == [16.0] and batch.discount[last].unique().tolist() == [0.5]


def test_reward_behind_the_stop_does_not_matter_even_if_it_is_not_a_number() -> None:
    ring = short_run()
    ring.reward[5:] = torch.nan
    assert torch.isfinite(Sampler(ring, 8, 5, 0.99, seed=0).sample(0).reward).all()


@pytest.mark.parametrize("n_step", [1, 3])
def test_reward_scale_multiplies_the_summed_reward_only(n_step: int) -> None:
    ring = short_run(terminated_at=2)
    plain, scaled = (Sampler(ring, 8, n_step, 0.9, seed=0) for _ in range(2))
    first, second = plain.sample(5), scaled.sample(5, reward_scale=torch.tensor(0.25))
    assert torch.equal(second.reward, first.reward * 0.25) and torch.equal(second.discount, first.discount)


def test_draws_depend_on_seed_rank_and_draw_and_on_nothing_else() -> None:
    ring = short_run()

    def rows(seed: int, rank: int, draw: int) -> tuple[int, ...]:
        sampler = Sampler(ring, 8, 1, 0.9, seed, rank)
        sampler.sample(draw + 1)  # what was drawn before leaves no trace
        return tuple(sampler.sample(draw).rows[:, 0].tolist())

    assert rows(0, 0, 4) == rows(0, 0, 4)
    assert len({rows(0, 0, 4), rows(1, 0, 4), rows(0, 1, 4), rows(0, 0, 5)}) == 4


def test_the_next_call_reuses_the_buffers() -> None:
    sampler = Sampler(short_run(), 8, 1, 0.9, seed=0)
    first = sampler.sample(0)
    address, copy = first.next_observation["policy"].data_ptr(), first.rows.clone()
    second = sampler.sample(1)
    assert second.next_observation["policy"].data_ptr() == address and not torch.equal(first.rows, copy)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batches_are_float32_whatever_the_storage(simulation: Any, dtype: str) -> None:
    envs = simulation(2, NEXT_STEP, np.random.default_rng(0))
    ring = envs.ring(20, 2, NEXT_STEP, dtype)
    envs.begin(ring)
    for _ in range(15):
        envs.step(ring)
    batch = Sampler(ring, 20, 2, 0.5, seed=0).sample(0)
    observations = [*batch.observation.values(), *batch.next_observation.values()]
    assert all(tensor.dtype == torch.float32 for tensor in observations)
    assert envs.check(batch, ring.num_slots, 2, 0.5)  # the simulated numbers are exact in both


class NoSynchronisation(TorchDispatchMode):
    """Refuses the operators that make the host wait for a device, whatever Python method reaches them."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_to_cpu", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.waiting, f"aten::{name} waits for the device"
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        assert not any(index is not None and index.dtype == torch.bool for index in indices), "a mask as an index waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("autoreset", [NEXT_STEP, SAME_STEP])
def test_sampling_and_adding_never_wait_for_the_device(
    simulation: Any, n_step: int, autoreset: AutoresetMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = simulation(3, autoreset, np.random.default_rng(0))
    ring = envs.ring(30, 3, autoreset)
    sampler = Sampler(ring, 8, n_step, 0.99, seed=0)
    scale = torch.tensor(0.5)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this call makes the host wait for the device")

    names = ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with NoSynchronisation():
        envs.begin(ring)
        for draw in range(30):
            envs.step(ring)
            sampler.sample(draw, scale)


def test_a_batch_larger_than_the_replay_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="batch_size is 9 but the replay holds 8"):
        Sampler(short_run(), 9, 1, 0.99, seed=0)


def test_zero_steps_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="n_step is 0"):
        Sampler(short_run(), 4, 0, 0.99, seed=0)


def test_sampling_an_empty_replay_is_refused() -> None:
    ring = ReplayRing(8, 2, {"policy": 1}, 1, NEXT_STEP)
    ring.begin({"policy": np.zeros((2, 1), np.float32)})
    with pytest.raises(ConfigurationError, match="no transition"):
        Sampler(ring, 4, 1, 0.99, seed=0).sample(0)

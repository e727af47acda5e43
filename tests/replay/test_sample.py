"""Batches against a brute-force list of transitions, uniformity, and the promise never to wait for the device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_oracle import Simulation, against_the_list, every_transition, uneven_ring
from synchronisation import no_synchronisation

from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.errors import ConfigurationError
from rlplastic.kernels._triton import interpreted
from rlplastic.replay import Holdout, Prioritisation, ReplayRing, Sampler

NEXT_STEP, SAME_STEP = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP


KERNELS = ["numpy", "torch", *(["triton"] if interpreted() else [])]


@settings(max_examples=150, deadline=None)
@given(
    num_envs=st.integers(1, 5),
    capacity=st.integers(1, 40),
    n_step=st.integers(1, 5),
    autoreset=st.sampled_from([NEXT_STEP, SAME_STEP]),
    end_probability=st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    gamma=st.sampled_from([0.5, 0.97]),
    actions=st.lists(st.sampled_from(["step"] * 12 + ["begin", "check"]), min_size=1, max_size=60),
    kernels=st.sampled_from(["numpy", "torch"]),
    holdout=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**16),
)
def test_every_sampled_row_is_exactly_a_transition_and_every_transition_can_be_sampled(
    num_envs: int, capacity: int, n_step: int, autoreset: AutoresetMode, end_probability: float,
    gamma: float, actions: list[str], kernels: str, holdout: float, seed: int,
) -> None:  # fmt: skip
    against_the_list(num_envs, capacity, n_step, autoreset, end_probability, gamma, actions, kernels, holdout, seed)


def test_weights_of_ages_follow_the_half_life() -> None:
    ring = uneven_ring([200, 50], 400)
    half_life = 40.0  # transitions, so 20 in each of the two columns
    sampler = Sampler(ring, 400, 1, 0.99, seed=0, half_life=half_life)
    tally = np.zeros(ring.num_slots * 2)
    for draw in range(1000):
        np.add.at(tally, sampler.sample(draw).rows.numpy(), 1)
    tally = tally.reshape(-1, 2)
    total = tally.sum()
    for column, count in enumerate([200, 50]):
        slots = np.flatnonzero(ring.tensors.flags.numpy().reshape(-1, 2)[:, column] & 1)  # oldest first: no wrap here
        weight = 0.5 ** (np.arange(count)[::-1] / 20)
        expected = total * count / 250 * weight / weight.sum()
        seen = tally[slots, column]
        assert seen.sum() == tally[:, column].sum()
        large = expected > 5
        statistic = ((seen - expected) ** 2 / expected)[large].sum()
        assert abs(statistic - large.sum()) < 4 * (2 * large.sum()) ** 0.5
        assert abs(seen[~large].sum() - expected[~large].sum()) < 5 * (expected[~large].sum() + 1) ** 0.5


def test_prioritised_draws_follow_the_td_errors_and_never_leave_the_transitions() -> None:
    envs = Simulation(2, NEXT_STEP, np.random.default_rng(0))
    ring = envs.ring(20, 2, NEXT_STEP, prioritised=True, holdout=Holdout(0.3, 1))
    sampler = Sampler(ring, 20, 2, 0.5, seed=0, prioritisation=Prioritisation(1.0, 0.5))
    envs.begin(ring)
    for draw in range(60):
        envs.step(ring)
        if not ring.transitions:
            continue
        batch = sampler.sample(draw)
        envs.check(batch, ring.num_slots, 2, 0.5)
        flags = ring.tensors.flags[batch.rows]
        assert ((flags & 1) != 0).all() and ((flags & 8) == 0).all()
        assert batch.weight is not None and batch.weight.max() == 1.0 and (batch.weight > 0).all()
        sampler.reprioritise(batch.rows, batch.rows.float() + 1.0)
        tree = ring.priorities.priorities
        mine = (ring.tensors.flags & 9) == 1
        assert (tree[~mine] == 0).all() and (tree[mine] > 0).all()
    for _ in range(30):  # every transition was drawn by now, so the priority of a row is its number + 1
        sampler.reprioritise(torch.arange(len(mine))[mine], torch.arange(len(mine))[mine].float() + 1.0)
    tally = torch.zeros(len(mine))
    for draw in range(2000):
        tally.index_add_(0, sampler.sample(draw).rows, torch.ones(20))
    expected = 40_000 * (tree / tree.sum()).double()
    statistic = ((tally - expected)[mine] ** 2 / expected[mine]).sum().item()
    freedom = int(mine.sum()) - 1
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("kernels", KERNELS)
def test_held_out_episodes_are_a_share_of_whole_episodes(kernels: str) -> None:
    held = Holdout(0.25, seed=7)
    choices = [held.takes(column, episode) for column in range(40) for episode in range(1, 101)]
    assert abs(np.mean(choices) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert not any(held.takes(column, 0) for column in range(40))
    assert choices != [
        Holdout(0.25, seed=8).takes(column, episode) for column in range(40) for episode in range(1, 101)
    ]
    envs = Simulation(3, NEXT_STEP, np.random.default_rng(0), end_probability=0.3)
    ring = envs.ring(36, 3, NEXT_STEP, holdout=held, kernels=kernels)
    envs.begin(ring)
    for _ in range(30):
        envs.step(ring)
    flags = ring.tensors.flags.numpy()
    assert ring.held_out == (flags & 9 == 9).sum() > 0 and ring.transitions == (flags & 9 == 1).sum() > 0
    train, valid = (Sampler(ring, 30, 3, 0.99, 0, held_out=h, kernels=kernels) for h in (False, True))
    for draw in range(2 if kernels == "triton" else 20):
        assert (flags[train.sample(draw).rows.numpy()] & 8 == 0).all()
        assert (flags[valid.sample(draw).rows.numpy()] & 8 == 8).all()


@pytest.mark.parametrize("autoreset", [NEXT_STEP, SAME_STEP])
def test_row_after_done_is_never_sampled(autoreset: AutoresetMode) -> None:
    envs = Simulation(3, autoreset, np.random.default_rng(1), end_probability=0.5)
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
    seen = {divmod(row, 3) for draw in range(200) for row in sampler.sample(draw).rows.tolist()}
    assert not seen & after_done


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
        np.add.at(tally, sampler.sample(draw).rows.numpy(), 1)
    valid = (ring.tensors.flags.numpy() & 1).astype(bool)
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
    end: dict[str, int], reward: float, discount: float, bootstrap: int
) -> None:
    batch = next(every_transition(short_run(**end), 3, 0.9, "numpy"))
    assert batch.reward[0].item() == pytest.approx(reward, rel=1e-6)
    assert batch.discount[0].item() == pytest.approx(discount, rel=1e-6)
    assert batch.next_observation["policy"][0].item() == bootstrap


def test_return_at_the_head_sums_what_there_is() -> None:
    ring = short_run()
    batch = Sampler(ring, 8, 3, 0.5, seed=0).sample(1)
    last = batch.rows == 4
    assert last.any()
    assert batch.reward[last].unique().tolist() == [16.0] and batch.discount[last].unique().tolist() == [0.5]


def test_reward_behind_the_stop_does_not_matter_even_if_it_is_not_a_number() -> None:
    ring = short_run()
    ring.tensors.reward[5:] = torch.nan
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
        return tuple(sampler.sample(draw).rows.tolist())

    assert rows(0, 0, 4) == rows(0, 0, 4)
    assert len({rows(0, 0, 4), rows(1, 0, 4), rows(0, 1, 4), rows(0, 0, 5)}) == 4


def test_the_next_call_reuses_the_buffers() -> None:
    sampler = Sampler(short_run(), 8, 1, 0.9, seed=0)
    first = sampler.sample(0)
    address, copy = first.next_observation["policy"].data_ptr(), first.rows.clone()
    second = sampler.sample(1)
    assert second.next_observation["policy"].data_ptr() == address and not torch.equal(first.rows, copy)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_batches_are_float32_whatever_the_storage(dtype: str) -> None:
    envs = Simulation(2, NEXT_STEP, np.random.default_rng(0))
    ring = envs.ring(20, 2, NEXT_STEP, dtype)
    envs.begin(ring)
    for _ in range(15):
        envs.step(ring)
    batch = Sampler(ring, 20, 2, 0.5, seed=0).sample(0)
    observations = [*batch.observation.values(), *batch.next_observation.values()]
    assert all(tensor.dtype == torch.float32 for tensor in observations)
    assert envs.check(batch, ring.num_slots, 2, 0.5)  # the simulated numbers are exact in both


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("autoreset", [NEXT_STEP, SAME_STEP])
def test_sampling_and_adding_never_wait_for_the_device(
    n_step: int, autoreset: AutoresetMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    envs = Simulation(3, autoreset, np.random.default_rng(0))
    ring = envs.ring(30, 3, autoreset, kernels="torch", holdout=Holdout(0.3, 0), prioritised=True)
    samplers = [
        Sampler(ring, 8, n_step, 0.99, seed=0, kernels="torch", **options)
        for options in ({}, {"half_life": 9.0}, {"prioritisation": Prioritisation(0.6, 0.4)})
    ]
    scale = torch.tensor(0.5)

    with no_synchronisation(monkeypatch):
        envs.begin(ring)
        for draw in range(30):
            envs.step(ring)
            for sampler in samplers:
                batch = sampler.sample(draw, scale)
                sampler.reprioritise(batch.rows, batch.reward)


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

"""Held noise: how long it is held, who counts, and that it can be continued."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from rlplastic.agents.exploration import uniform_actions
from rlplastic.agents.flashsac.exploration import HeldNoise, hold_probabilities

LONGEST = 16


def played(noise: HeldNoise, active: np.ndarray, start: int = 0) -> np.ndarray:
    """Noise (T, N, A) of steps start, start+1, ... with ``active`` (T, N)."""
    return np.stack([noise.at(start + index, row) for index, row in enumerate(active)])


def hold_lengths(values: np.ndarray) -> list[int]:
    """Lengths of the runs of equal values (T,), without the last run and those that began too late to end in time."""
    starts = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return [end - start for start, end in itertools.pairwise(starts) if start < len(values) - LONGEST]


def chi_square_p(lengths: list[int]) -> float:
    """p-value of hold lengths against P(k) ~ k^-2 on 1..16, written out."""
    weights = np.array([1 / k**2 for k in range(1, LONGEST + 1)])
    expected = len(lengths) * weights / weights.sum()
    counts = np.bincount(lengths, minlength=LONGEST + 1)[1:]
    assert len(counts) == LONGEST, "a hold exceeded the longest one"
    return float(stats.chisquare(counts, expected).pvalue)


def test_hold_probabilities_fall_with_the_square() -> None:
    probabilities = hold_probabilities(LONGEST)
    assert probabilities.sum() == pytest.approx(1)
    for k in range(1, LONGEST + 1):
        assert probabilities[k - 1] / probabilities[0] == pytest.approx(1 / k**2)


def test_holds_occur_as_often_as_their_probabilities_say() -> None:
    noise = HeldNoise(100, 1, LONGEST, per_env=True, seed=3)
    values = played(noise, np.ones((400, 100), bool))[:, :, 0]
    lengths = [length for env in values.T for length in hold_lengths(env)]
    assert len(lengths) > 15_000 and chi_square_p(lengths) > 0.01


def test_every_environment_holds_on_its_own_and_shared_mode_holds_together() -> None:
    for per_env in (True, False):
        values = played(HeldNoise(8, 2, LONGEST, per_env, seed=1), np.ones((200, 8), bool))
        changed = (values[1:] != values[:-1]).all(-1)
        assert (changed == changed[:, :1]).all() == (not per_env)
        assert len(np.unique(values[0, :, 0])) == 8, "environments must not share their noise"
        assert (changed == (values[1:] != values[:-1]).any(-1)).all(), "a hold covers all action dimensions"


def test_shared_counter_has_the_same_hold_distribution() -> None:
    values = played(HeldNoise(2, 1, LONGEST, per_env=False, seed=0), np.ones((6000, 2), bool))
    assert chi_square_p(hold_lengths(values[:, 0, 0])) > 0.01


def test_inactive_rows_do_not_advance() -> None:
    active = np.random.default_rng(0).random((500, 60)) < 0.7
    noise = HeldNoise(60, 1, LONGEST, per_env=True, seed=5)
    values = []
    for index, row in enumerate(active):
        before = noise.state_dict()
        values.append(noise.at(index, row)[:, 0])
        after = noise.state_dict()
        assert torch.equal(after["noise"][~row], before["noise"][~row])
        assert torch.equal(after["remaining"][~row], before["remaining"][~row])
    lengths = [n for env in range(60) for n in hold_lengths(np.stack(values)[active[:, env], env])]
    assert chi_square_p(lengths) > 0.01, "holds count active steps only"


def test_shared_counter_advances_whenever_any_environment_is_active() -> None:
    noise = HeldNoise(3, 1, LONGEST, per_env=False, seed=2)
    noise.at(0, np.ones(3, bool))
    frozen = noise.state_dict()
    noise.at(1, np.zeros(3, bool))
    assert torch.equal(noise.state_dict()["remaining"], frozen["remaining"])
    lengths = hold_lengths(played(noise, np.tile([True, False, False], (2000, 1)), start=2)[:, 0, 0])
    assert max(lengths) > 1 and chi_square_p(lengths) > 0.01


def test_state_round_trip_continues_bit_for_bit() -> None:
    active = np.random.default_rng(1).random((80, 5)) < 0.8
    whole = played(HeldNoise(5, 3, LONGEST, True, seed=9), active)
    first, second = (HeldNoise(5, 3, LONGEST, True, seed=9) for _ in range(2))
    played(first, active[:37])
    second.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(played(second, active[37:], start=37), whole[37:])


def test_noise_is_standard_normal_and_fresh_every_step_without_holds() -> None:
    values = played(HeldNoise(50, 4, 1, True, seed=0), np.ones((200, 50), bool))
    assert not (values[1:] == values[:-1]).any()
    assert stats.kstest(values.ravel(), "norm").pvalue > 0.01


def test_noise_depends_on_seed_and_rank_and_neither_reads_nor_moves_the_global_generators() -> None:
    active = np.ones((5, 2), bool)
    reference = played(HeldNoise(2, 2, LONGEST, True, seed=0), active)
    torch.manual_seed(123)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    np.testing.assert_array_equal(played(HeldNoise(2, 2, LONGEST, True, seed=0), active), reference)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    for other in (HeldNoise(2, 2, LONGEST, True, seed=1), HeldNoise(2, 2, LONGEST, True, seed=0, rank=1)):
        assert not (played(other, active) == reference).any()


def test_a_caller_who_writes_into_the_noise_changes_nothing() -> None:
    written, untouched = (HeldNoise(2, 2, LONGEST, True, seed=4) for _ in range(2))
    for index in range(30):
        handed_out = written.at(index, np.ones(2, bool))
        np.testing.assert_array_equal(handed_out, untouched.at(index, np.ones(2, bool)))
        handed_out[:] = 7


def test_uniform_actions_fill_the_box_and_follow_seed_rank_and_step() -> None:
    actions = np.concatenate([uniform_actions(64, 3, seed=0, step=step) for step in range(50)])
    assert actions.dtype == np.float32 and np.abs(actions).max() <= 1
    assert stats.kstest(actions.ravel(), "uniform", args=(-1, 2)).pvalue > 0.01
    again = uniform_actions(64, 3, seed=0, step=7)
    np.testing.assert_array_equal(again, uniform_actions(64, 3, seed=0, step=7))
    for other in (dict(seed=1, step=7), dict(seed=0, step=8), dict(seed=0, step=7, rank=1)):
        assert not (uniform_actions(64, 3, **other) == again).any()

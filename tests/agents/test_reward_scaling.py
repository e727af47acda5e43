"""Reward scaling against numpy over a recorded sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplastic.agents.reward_scaling import RewardScaler

SUPPORT = 5.0


def recorded(seed: int, steps: int = 60, envs: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    reward = (rng.normal(size=(steps, envs)) * 3 + 1).astype(np.float32)
    return reward, rng.random((steps, envs)) < 0.1, rng.random((steps, envs)) < 0.85


def brute_force(reward: np.ndarray, done: np.ndarray, valid: np.ndarray, gamma: float, support: float) -> float:
    """The scale, from every value that any environment's discounted return ever took."""
    seen = []
    current = [0.0] * reward.shape[1]
    for t in range(len(reward)):
        for env in range(reward.shape[1]):
            if valid[t, env]:
                current[env] = gamma * (0.0 if done[t, env] else 1.0) * current[env] + float(reward[t, env])
                seen.append(current[env])
    return 1 / max(np.sqrt(np.var(seen) + 1e-8), np.max(np.abs(seen)) / support)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_scale_is_that_of_all_returns_seen_after_every_step(seed: int, gamma: float) -> None:
    sequence = recorded(seed)
    scaler = RewardScaler(4, gamma, SUPPORT)
    for t in range(len(sequence[0])):
        scaler.observe(*(part[t] for part in sequence))
        expected = brute_force(*(part[: t + 1] for part in sequence), gamma, SUPPORT)
        assert scaler.scale == pytest.approx(expected, rel=1e-9)


def test_rows_that_are_no_transition_touch_nothing() -> None:
    reward, done, valid = recorded(0)
    garbage = np.where(valid, reward, np.float32(np.nan))
    clean, dirty = RewardScaler(4, 0.99, SUPPORT), RewardScaler(4, 0.99, SUPPORT)
    with np.errstate(invalid="ignore"):
        for t in range(len(reward)):
            clean.observe(reward[t], done[t], valid[t])
            dirty.observe(garbage[t], done[t] | ~valid[t], valid[t])
    assert dirty.scale == clean.scale and np.isfinite(clean.scale)


def test_one_extreme_return_sets_the_scale() -> None:
    scaler = RewardScaler(100, 0.99, SUPPORT)
    reward = np.full(100, 0.1, np.float32)
    reward[3] = -80.0
    scaler.observe(reward, np.zeros(100, bool), np.ones(100, bool))
    assert scaler.scale == pytest.approx(SUPPORT / 80.0)


def test_equal_rewards_without_spread_still_give_a_finite_scale() -> None:
    scaler = RewardScaler(3, 0.99, SUPPORT)
    scaler.observe(np.zeros(3, np.float32), np.zeros(3, bool), np.ones(3, bool))
    assert scaler.scale == pytest.approx(1e4)  # 1 / sqrt(1e-8)


def test_scale_is_one_before_anything_was_seen_and_when_switched_off() -> None:
    fresh, off = RewardScaler(2, 0.99, SUPPORT), RewardScaler(2, 0.99, SUPPORT, enabled=False)
    for scaler in (fresh, off):
        scaler.observe(np.full(2, 50.0, np.float32), np.zeros(2, bool), np.zeros(2, bool))
    assert fresh.scale == 1.0
    off.observe(np.full(2, 50.0, np.float32), np.zeros(2, bool), np.ones(2, bool))
    assert off.scale == 1.0


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), magnitude=st.floats(1e-3, 1e4), gamma=st.floats(0, 1))
def test_no_scaled_return_ever_leaves_the_support(seed: int, magnitude: float, gamma: float) -> None:
    reward, done, valid = recorded(seed, steps=20)
    scaler, current = RewardScaler(4, gamma, SUPPORT), np.zeros(4)
    for t in range(20):
        scaled = (reward[t] * magnitude).astype(np.float32)
        scaler.observe(scaled, done[t], valid[t])
        current = np.where(valid[t], gamma * (1 - done[t]) * current + scaled, current)
        assert np.abs(current).max() * scaler.scale <= SUPPORT * (1 + 1e-9)


def test_state_round_trip_continues_bit_for_bit() -> None:
    reward, done, valid = recorded(3)
    whole, first, second = (RewardScaler(4, 0.97, SUPPORT) for _ in range(3))
    for t in range(30):
        whole.observe(reward[t], done[t], valid[t])
        first.observe(reward[t], done[t], valid[t])
    second.load_state_dict(first.state_dict())
    assert second.scale == first.scale
    for t in range(30, 60):
        whole.observe(reward[t], done[t], valid[t])
        second.observe(reward[t], done[t], valid[t])
        assert second.scale == whole.scale


def test_state_is_a_copy() -> None:
    scaler = RewardScaler(2, 0.99, SUPPORT)
    state = scaler.state_dict()
    scaler.observe(np.ones(2, np.float32), np.zeros(2, bool), np.ones(2, bool))
    assert float(state["returns"].abs().sum()) == 0

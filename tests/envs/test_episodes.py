"""Episode statistics against episodes written down before they are laid out as rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.envs.episodes import EpisodeStatistics, FinishedEpisodes
from rlplastic.envs.gymnasium_adapter import GymnasiumEnv

Row = tuple[float, bool, bool, bool]
Episode = tuple[list[float], bool]


def _script(rng: np.random.Generator, mode: AutoresetMode, steps: int) -> tuple[list[Row], list[tuple[int, Episode]]]:
    """One environment's rows (reward, terminated, truncated, valid) and its episodes with the time of their end."""
    rows: list[Row] = []
    episodes: list[tuple[int, Episode]] = []
    while len(rows) < steps:
        rewards = rng.normal(size=rng.integers(1, 6)).astype(np.float32).tolist()
        terminated = bool(rng.integers(2))
        for position, reward in enumerate(rewards):
            last = position == len(rewards) - 1
            rows.append((reward, last and terminated, last and not terminated, True))
        episodes.append((len(rows) - 1, (rewards, terminated)))
        if mode is AutoresetMode.NEXT_STEP:
            rows.append((float(rng.normal()), False, False, False))  # a sloppy reward that must not be counted
    return rows[:steps], [(end, episode) for end, episode in episodes if end < steps]


def _steps(scripts: list[list[Row]]) -> list[tuple[Step, np.ndarray]]:
    table = []
    for rows in zip(*scripts, strict=True):
        reward, terminated, truncated, valid = (np.array(column) for column in zip(*rows, strict=True))
        table.append((Step({}, reward.astype(np.float32), terminated, truncated, {}), valid))
    return table


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("seed", range(5))
def test_valid_rows_returns_and_lengths_equal_the_written_episodes(mode: AutoresetMode, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scripts = [_script(rng, mode, 40) for _ in range(7)]
    statistics = EpisodeStatistics(7, mode)
    for step, valid in _steps([rows for rows, _ in scripts]):
        np.testing.assert_array_equal(statistics.observe(step), valid)
    expected = sorted((end, env, episode) for env, (_, episodes) in enumerate(scripts) for end, episode in episodes)
    finished = statistics.pop_finished()
    assert finished.environments.tolist() == [env for _, env, _ in expected]
    assert finished.lengths.tolist() == [len(rewards) for _, _, (rewards, _) in expected]
    assert finished.terminated.tolist() == [terminated for _, _, (_, terminated) in expected]
    np.testing.assert_allclose(
        finished.returns, [sum(rewards) for _, _, (rewards, _) in expected], rtol=1e-12, atol=1e-12
    )
    assert len(statistics.pop_finished().returns) == 0


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("cut", range(0, 30, 4))
def test_loaded_statistics_go_on_as_if_never_saved(mode: AutoresetMode, cut: int) -> None:
    rng = np.random.default_rng(cut)
    steps = _steps([_script(rng, mode, 30)[0] for _ in range(3)])
    whole, first, second = (EpisodeStatistics(3, mode) for _ in range(3))
    for step, _ in steps:
        whole.observe(step)
    for step, _ in steps[:cut]:
        first.observe(step)
    state = first.state_dict()
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in state.values())
    second.load_state_dict(state)
    for step, _ in steps[cut:]:
        first.observe(step)
        second.observe(step)
    expected = whole.pop_finished()
    for other in (first.pop_finished(), second.pop_finished()):
        for name in FinishedEpisodes._fields:
            np.testing.assert_array_equal(getattr(other, name), getattr(expected, name))
            assert getattr(other, name).dtype == getattr(expected, name).dtype


def test_a_restart_drops_episodes_in_progress_and_leaves_no_invalid_row() -> None:
    statistics = EpisodeStatistics(2, AutoresetMode.NEXT_STEP)
    false = np.zeros(2, np.bool_)
    ended = Step({}, np.array([1, 5], np.float32), np.array([True, False]), false, {})
    quiet = Step({}, np.array([2, 3], np.float32), false, false, {})
    last = Step({}, np.array([10, 20], np.float32), false, np.array([True, True]), {})
    statistics.observe(ended)
    statistics.restart()
    assert statistics.observe(quiet).all()
    assert statistics.observe(last).all()
    finished = statistics.pop_finished()
    assert finished.returns.tolist() == [1, 12, 23]
    assert finished.lengths.tolist() == [1, 2, 2]
    assert finished.terminated.tolist() == [True, False, False]


def test_float64_accumulation_keeps_small_rewards_of_long_episodes() -> None:
    statistics = EpisodeStatistics(1, AutoresetMode.SAME_STEP)
    false, true = np.zeros(1, np.bool_), np.ones(1, np.bool_)
    statistics.observe(Step({}, np.array([2**24], np.float32), false, false, {}))
    for _ in range(10):
        statistics.observe(Step({}, np.array([1], np.float32), false, false, {}))
    statistics.observe(Step({}, np.array([0], np.float32), true, false, {}))
    assert statistics.pop_finished().returns.tolist() == [2**24 + 10]


@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
def test_statistics_of_a_real_vector_environment_equal_its_known_episodes(
    autoreset: str, counting_env: Callable[..., Callable[[], Any]], lengths: tuple[int, ...]
) -> None:
    seeds = [0, 1, 2, 3, 4]
    envs = GymnasiumEnv.from_factory(counting_env(), len(seeds), seeds, autoreset=autoreset)
    statistics = EpisodeStatistics(envs.num_envs, envs.autoreset)
    envs.reset()
    transitions = 0
    for _ in range(60):
        envs.send(np.zeros((5, 2), np.float32))
        transitions += int(statistics.observe(envs.receive()).sum())
    envs.close()
    finished = statistics.pop_finished()
    for env, seed in enumerate(seeds):
        mine = finished.environments == env
        count = int(mine.sum())
        assert count > 15
        expected = [lengths[(seed + episode) % 4] for episode in range(count)]
        assert finished.lengths[mine].tolist() == expected
        sums = [sum(100 * episode + step for step in range(1, n + 1)) for episode, n in enumerate(expected)]
        assert finished.returns[mine].tolist() == sums
        assert finished.terminated[mine].tolist() == [episode % 2 == 0 for episode in range(count)]
    if autoreset != "next_step":
        assert transitions == 300

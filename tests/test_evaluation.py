"""Evaluation: whole first episodes, one per environment, independent of everything else; and the verb around it."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy import stats

from rlplastic import evaluate as verb
from rlplastic import evaluation
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.checkpoint import CheckpointStore
from rlplastic.command_line import run_verb
from rlplastic.config import CategoricalCriticConfig, Config, EnvConfig, FlashSACConfig
from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.errors import ConfigurationError, NonFiniteError
from rlplastic.evaluation import Evaluation, evaluate, first_episodes
from rlplastic.seeding import environment_seeds


class Scripted:
    """Environment i plays episodes of the given lengths, over and over; the reward is 10^i + step of the episode.

    The first episode of an even environment terminates, that of an odd one is truncated; later ones swap.
    """

    def __init__(self, lengths: list[list[int]], mode: AutoresetMode, limit: int | None = None) -> None:
        self.num_envs, self.autoreset, self.max_episode_steps = len(lengths), mode, limit
        self.observation_dims, self.action_dim = {"policy": 1}, 1
        self._lengths = [itertools.cycle(each) for each in lengths]
        self.closed, self.steps, self.nan_at = 0, 0, (-1, -1)

    def reset(self) -> dict[str, np.ndarray]:
        self._left = [next(each) for each in self._lengths]
        self._elapsed, self._resetting = [0] * self.num_envs, [False] * self.num_envs
        self._later = np.zeros(self.num_envs, bool)
        return {"policy": np.zeros((self.num_envs, 1), np.float32)}

    def send(self, actions: np.ndarray) -> None:
        assert actions.shape == (self.num_envs, 1)

    def receive(self) -> Step:
        reward, done = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, bool)
        for i in range(self.num_envs):
            if self._resetting[i]:  # the row after a done under NEXT_STEP
                self._resetting[i], self._left[i], self._elapsed[i] = False, next(self._lengths[i]), 0
                continue
            self._elapsed[i] += 1
            reward[i] = 10**i + self._elapsed[i]
            done[i] = self._elapsed[i] == self._left[i]
            if done[i] and self.autoreset is AutoresetMode.NEXT_STEP:
                self._resetting[i] = True
            elif done[i]:
                self._left[i], self._elapsed[i] = next(self._lengths[i]), 0
            if (i, self.steps) == self.nan_at:
                reward[i] = np.nan
        self.steps += 1
        observation = {"policy": np.full((self.num_envs, 1), self.steps, np.float32)}
        truncates = (np.arange(self.num_envs) % 2 == 1) ^ self._later
        self._later |= done
        return Step(observation, reward, done & ~truncates, done & truncates, {})

    def close(self) -> None:
        self.closed += 1


def still(observation: dict[str, np.ndarray]) -> np.ndarray:
    return np.zeros((len(observation["policy"]), 1), np.float32)


def swing(observation: dict[str, np.ndarray]) -> np.ndarray:
    """A deterministic policy for one action dimension."""
    return np.tanh(3 * observation["policy"][:, 1:2] - observation["policy"][:, :1]).astype(np.float32)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(
        lengths: list[list[int]], mode: AutoresetMode = AutoresetMode.NEXT_STEP, limit: int | None = 100
    ) -> Scripted:
        envs = Scripted(lengths, mode, limit)
        monkeypatch.setattr(evaluation, "make_envs", lambda *args, **kwargs: envs)
        return envs

    return install


@pytest.mark.parametrize("mode", AutoresetMode)
def test_only_the_first_episode_of_every_environment_counts(mode: AutoresetMode) -> None:
    lengths = [[1, 50], [3, 1], [7, 2], [2, 9]]
    result = first_episodes(still, Scripted(lengths, mode))
    expected = [sum(10**i + step for step in range(1, first + 1)) for i, (first, _) in enumerate(lengths)]
    np.testing.assert_array_equal(result.returns, expected)
    np.testing.assert_array_equal(result.lengths, [1, 3, 7, 2])
    np.testing.assert_array_equal(result.terminated, [True, False, True, False])
    assert result.returns.dtype == np.float64


def test_short_episodes_weigh_no_more_than_long_ones() -> None:
    # counting the first ten episodes that end would see nine of length 1 before the first of length 20
    envs = Scripted([[1], [20]] * 5, AutoresetMode.SAME_STEP)
    assert first_episodes(still, envs).lengths.mean() == 10.5


def test_stepping_stops_as_soon_as_every_first_episode_has_ended() -> None:
    envs = Scripted([[3, 100], [5, 100]], AutoresetMode.NEXT_STEP, limit=100)
    first_episodes(still, envs)
    assert envs.steps == 5


def test_policy_sees_the_observation_of_the_step_before() -> None:
    seen = []

    def act(observation: dict[str, np.ndarray]) -> np.ndarray:
        seen.append(float(observation["policy"][0, 0]))
        return still(observation)

    first_episodes(act, Scripted([[4]], AutoresetMode.NEXT_STEP))
    assert seen == [0, 1, 2, 3]


def test_episode_that_uses_the_whole_time_limit_is_complete() -> None:
    assert first_episodes(still, Scripted([[6]], AutoresetMode.NEXT_STEP, limit=6)).lengths[0] == 6


def test_endless_episode_is_an_error_at_the_limit(scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = scripted([[3], [1000]], limit=30)
    with pytest.raises(ConfigurationError, match="1 of 2 evaluation episodes did not end within 30 steps"):
        evaluate(still, EnvConfig(), seed=0, episodes=2)
    assert (envs.steps, envs.closed) == (30, 1)
    monkeypatch.setattr(evaluation, "LONGEST_EPISODE", 12)
    envs = scripted([[1000]], limit=None)
    with pytest.raises(ConfigurationError, match="within 12 steps"):
        evaluate(still, EnvConfig(), seed=0, episodes=1)


def test_non_finite_return_names_the_episode(scripted: Any) -> None:
    envs = scripted([[5], [5], [5]])
    envs.nan_at = (1, 2)
    with pytest.raises(NonFiniteError, match=r"episodes \[1\]"):
        evaluate(still, EnvConfig(), seed=0, episodes=3)
    assert envs.closed == 1


def test_non_finite_reward_after_an_episodes_end_is_nobodys_business(scripted: Any) -> None:
    envs = scripted([[2], [9]])
    envs.nan_at = (0, 6)
    assert np.isfinite(evaluate(still, EnvConfig(), seed=0, episodes=2).returns).all()


def test_environments_are_closed_when_the_policy_fails(scripted: Any) -> None:
    envs = scripted([[5]])

    def fails(observation: dict[str, np.ndarray]) -> np.ndarray:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        evaluate(fails, EnvConfig(), seed=0, episodes=1)
    assert envs.closed == 1


def test_no_episodes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="episodes=0"):
        evaluate(still, EnvConfig(), seed=0, episodes=0)


@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
def test_returns_are_those_of_gymnasium_stepped_by_hand(autoreset: str) -> None:
    env = EnvConfig(backend="gymnasium", family="mujoco", task="InvertedPendulum-v5", autoreset=autoreset)
    result = evaluate(swing, env, seed=3, episodes=4, index=2)
    for index, seed in enumerate(environment_seeds(3, "eval", 0, 4, 2)):
        single = gymnasium.make("InvertedPendulum-v5")
        observation, _ = single.reset(seed=seed)
        total, length, terminated, truncated = 0.0, 0, False, False
        while not (terminated or truncated):
            action = swing({"policy": observation[None].astype(np.float32)})[0] * single.action_space.high
            observation, reward, terminated, truncated, _ = single.step(action.astype(np.float32))
            total, length = total + reward, length + 1
        single.close()
        assert (result.returns[index], result.lengths[index]) == (pytest.approx(total), length)
        assert result.terminated[index] == terminated
    assert len(set(result.lengths.tolist())) > 1, "the starting states should differ"


def test_same_arguments_give_the_same_bits_and_another_index_or_seed_other_episodes() -> None:
    env = EnvConfig(family="classic", task="Pendulum-v1")
    first = evaluate(swing, env, seed=0, episodes=3)
    np.testing.assert_array_equal(evaluate(swing, env, seed=0, episodes=3).returns, first.returns)
    assert (first.lengths == 200).all() and not first.terminated.any()
    for other in (dict(seed=0, index=1), dict(seed=1)):
        assert not (evaluate(swing, env, episodes=3, **other).returns == first.returns).any()


def test_evaluation_leaves_every_global_generator_alone() -> None:
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for env in (
        EnvConfig(family="classic", task="Pendulum-v1"),
        EnvConfig(backend="gymnasium", family="mujoco", task="InvertedPendulum-v5"),
    ):
        evaluate(swing, env, seed=0, episodes=2)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all() and torch.equal(torch.get_rng_state(), before[2])


def evaluation_of(returns: list[float]) -> Evaluation:
    return Evaluation(np.array(returns, np.float64), np.ones(len(returns), np.int64), np.zeros(len(returns), bool))


@pytest.mark.parametrize("count", [2, 3, 10, 50])
def test_interval_is_students(count: int) -> None:
    returns = np.random.default_rng(count).normal(100, 20, count).tolist()
    result = evaluation_of(returns)
    expected = stats.t.interval(0.95, count - 1, loc=np.mean(returns), scale=stats.sem(returns))
    assert result.ci95 == pytest.approx(expected)
    assert (result.mean, result.std) == pytest.approx((np.mean(returns), np.std(returns, ddof=1)))


def test_interval_covers_the_true_mean_95_times_in_100() -> None:
    draws = np.random.default_rng(0).normal(7, 3, (4000, 5))
    covered = [low <= 7 <= high for low, high in (evaluation_of(row.tolist()).ci95 for row in draws)]
    assert 0.94 < np.mean(covered) < 0.96


def test_one_episode_has_no_spread_and_no_nan() -> None:
    result = evaluation_of([3.5])
    assert (result.mean, result.std, result.ci95) == (3.5, 0.0, (3.5, 3.5))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory of an untrained agent on Pendulum."""
    path = tmp_path / "runs" / "pendulum"
    path.mkdir(parents=True)
    config = Config(env=EnvConfig(family="classic", task="Pendulum-v1", num_envs=2), seed=5)
    config.agent = FlashSACConfig(critic_width=8, actor_width=8, gamma=0.99)
    (path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    agent = FlashSAC({"policy": 3}, 1, 2, config.agent, CategoricalCriticConfig(), seed=5)
    CheckpointStore(path / "checkpoints", keep=2).save(1234, {"agent": agent.state_dict()}, {})
    return path


def test_verb_prints_the_result_and_writes_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(verb.main, [f"run={run}", "episodes=4"]) == 0
    report = json.loads((run / "evaluation.json").read_text())
    result = evaluation_of(report["returns"])
    assert (report["task"], report["step"], report["seed"], report["episodes"]) == ("Pendulum-v1", 1234, 5, 4)
    assert len(report["returns"]) == len(report["lengths"]) == len(report["terminated"]) == 4
    assert (report["mean"], report["std"], tuple(report["ci95"])) == (result.mean, result.std, result.ci95)
    assert (report["min"], report["max"]) == (min(report["returns"]), max(report["returns"]))
    output = capsys.readouterr().out
    for shown in (f"{result.mean:.5g}", f"{result.ci95[0]:.5g}", f"{result.std:.5g}", "200 steps", "after 1,234 steps"):
        assert shown in output
    assert not list(run.glob(".*tmp")), "written atomically, nothing left behind"


def test_verb_takes_a_seed_and_repeats_itself(run: Path) -> None:
    reports = []
    for arguments in (["seed=1"], ["seed=1"], ["seed=2"]):
        assert run_verb(verb.main, [f"run={run}", "episodes=2", *arguments]) == 0
        reports.append(json.loads((run / "evaluation.json").read_text()))
    assert reports[0] == reports[1] and reports[0]["returns"] != reports[2]["returns"]


def test_one_episode_is_reported_without_an_interval(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(verb.main, [f"run={run}", "episodes=1"]) == 0
    assert "no interval" in capsys.readouterr().out


def test_verb_records_a_video_or_says_why_not(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("imageio_ffmpeg")
    assert run_verb(verb.main, [f"run={run}", "episodes=1", "video=true"]) == 0
    assert (run / "videos" / "step_000000001234.mp4").stat().st_size > 1000
    monkeypatch.setattr("rlplastic.video.record", lambda *args, **kwargs: "the projector is broken")
    assert run_verb(verb.main, [f"run={run}", "episodes=1", "video=true"]) == 0
    assert "no video: the projector is broken" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run=nowhere"], "does not exist"),
        (["episodes=3"], "missing run"),
        (["episode=3"], "did you mean 'episodes'"),
        (["run={run}", "episodes=0"], "episodes=0"),
        (["run={run}", "episodes=many"], "episodes=many was refused"),
        (["run={run}", "seed=-1"], "seed=-1 is out of range"),
        (["run={run}", "device=tpu9"], "device=tpu9"),
    ],
)
def test_wrong_requests_are_one_sentence_and_exit_code_2(
    run: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(verb.main, [argument.format(run=run) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_damaged_checkpoint_is_exit_code_4(run: Path) -> None:
    (tensors,) = run.glob("checkpoints/step_*/agent.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-1])
    assert run_verb(verb.main, [f"run={run}", "episodes=1"]) == 4


def test_a_full_disk_is_told_as_such(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert run_verb(verb.main, [f"run={run}", "episodes=1"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device); free space on the disk" in error and "permission" not in error


def test_warnings_go_to_standard_error(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkpoint,) = run.glob("checkpoints/step_*")
    shutil.copytree(checkpoint, checkpoint.with_name("step_000000002000"))
    (checkpoint.with_name("step_000000002000") / "agent.safetensors").write_bytes(b"")
    assert run_verb(verb.main, [f"run={run}", "episodes=1"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: skipped a damaged checkpoint") and "skipped" not in captured.out

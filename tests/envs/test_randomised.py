"""Randomised and switching tasks: what is drawn, when it changes, and that a replay of the actions repeats it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import SMALL, command, final_state, run

from rlplastic.config import EnvConfig, RandomiseConfig
from rlplastic.envs import VectorEnv, make_envs, step
from rlplastic.envs.changes import Clock, changes, drawn, drawn_friction, drawn_order
from rlplastic.envs.gymnasium_adapter import make_env
from rlplastic.envs.perturbation import NAMES
from rlplastic.envs.randomised import Randomised
from rlplastic.errors import ConfigurationError
from rlplastic.training import train_agent

RANGES: dict[str, Any] = {
    "observation_noise": [0.0, 0.1],
    "observation_delay": [0, 2],
    "action_delay": [0, 3],
    "friction": [0.5, 1.5],
    "mass": [0.8, 1.2],
    "gain": [0.9, 1.1],
    "push": [0.0, 0.5],
}


def hopper(limit: int = 10, **settings: Any) -> EnvConfig:
    settings = {"num_envs": 3, **settings}
    return EnvConfig(
        backend="gymnasium", family="mujoco", task="Hopper-v5", kwargs={"max_episode_steps": limit}, **settings
    )


def everything() -> EnvConfig:
    return hopper(randomise=RandomiseConfig(**RANGES), switch_every=60)


def single(envs: VectorEnv, index: int) -> Randomised:
    return envs._env.envs[index]  # type: ignore[attr-defined,no-any-return]


def actions(steps: int, num_envs: int = 3, dim: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.uniform(-1, 1, (num_envs, dim)).astype(np.float32) for _ in range(steps)]


def rollout(config: EnvConfig, steps: int, **options: Any) -> list[np.ndarray]:
    """Every number that a rollout returns."""
    envs = make_envs(config, **{"seed": 0, "role": "train", **options})
    seen = [envs.reset()["policy"]]
    for action in actions(steps, envs.num_envs, envs.action_dim):
        answer = step(envs, action)
        seen += [answer.observation["policy"], answer.reward, answer.terminated, answer.truncated]
    envs.close()
    return seen


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_ranges_have_the_names_of_the_perturbations() -> None:
    assert tuple(field.name for field in dataclasses.fields(RandomiseConfig)) == NAMES


def test_an_environment_without_ranges_and_switches_is_not_wrapped() -> None:
    envs = make_envs(hopper(), seed=0, role="train")
    assert not isinstance(single(envs, 0), Randomised)
    assert changes(hopper()) == []


def test_rebuilt_environments_repeat_everything_under_the_same_actions() -> None:
    first = rollout(everything(), 80, transitions=1234)
    assert same(first, rollout(everything(), 80, transitions=1234))
    assert not same(first, rollout(everything(), 80, transitions=1234, seed=1))
    assert not same(first, rollout(everything(), 80, transitions=1234, rebuild=1))


def test_ranges_of_width_zero_at_the_neutral_values_change_no_bit() -> None:
    neutral = {
        "friction": [1.0, 1.0],
        "mass": [1.0, 1.0],
        "gain": [1.0, 1.0],
        "push": [0.0, 0.0],
        "action_delay": [0, 0],
    }
    assert same(rollout(hopper(), 40), rollout(hopper(randomise=RandomiseConfig(**neutral)), 40))


def test_every_episode_of_every_environment_draws_its_own_values_within_the_ranges() -> None:
    ranges = RandomiseConfig(**RANGES)
    episodes = [drawn(ranges, seed, episode) for seed in range(40) for episode in range(50)]
    for name, (low, high) in RANGES.items():
        values = [getattr(episode, name) for episode in episodes]
        assert low <= min(values) and max(values) <= high
        if name.endswith("delay"):
            counts = np.bincount(values)
            assert len(counts) == high + 1 and counts.min() > 0.8 * len(values) / len(counts), "inclusive and uniform"
        else:
            assert len(set(values)) == len(values)
            assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    correlations = np.corrcoef([[getattr(episode, name) for episode in episodes] for name in RANGES])
    assert np.abs(correlations - np.eye(len(RANGES))).max() < 0.1, "each name has draws of its own"


def test_models_of_the_environments_have_the_drawn_values() -> None:
    envs = make_envs(hopper(randomise=RandomiseConfig(friction=[0.5, 1.5], mass=[0.8, 1.2])), seed=0, role="train")
    plain = make_env("Hopper-v5", {}).unwrapped
    envs.reset()
    seen = set()
    for index in range(3):
        model, expected = single(envs, index).unwrapped.model, drawn(RandomiseConfig(**RANGES), _seed(index), 0)
        np.testing.assert_array_equal(model.geom_friction, plain.model.geom_friction * expected.friction)
        np.testing.assert_array_equal(model.body_mass, plain.model.body_mass * expected.mass)
        seen.add(expected.friction)
    assert len(seen) == 3


def _seed(index: int) -> int:
    from rlplastic.seeding import environment_seeds

    return environment_seeds(0, "train", 0, 3, 0)[index]


def test_action_delay_is_the_plain_task_under_shifted_actions() -> None:
    late = Randomised(make_env("Hopper-v5", {}), hopper(randomise=RandomiseConfig(action_delay=[2, 2])), Clock())
    plain = make_env("Hopper-v5", {})
    sent = [action[0] for action in actions(12)]
    np.testing.assert_array_equal(late.reset(seed=5)[0], plain.reset(seed=5)[0])
    for action, earlier in zip(sent, [np.zeros(3, np.float32)] * 2 + sent, strict=False):
        for mine, theirs in zip(late.step(action)[:4], plain.step(earlier)[:4], strict=True):
            np.testing.assert_array_equal(mine, theirs)


def switching(switch: str, clock: Clock, seed: int) -> Randomised:
    return Randomised(make_env("Hopper-v5", {}), hopper(switch=switch, switch_every=100, switch_seed=seed), clock)


def test_switch_of_observations_permutes_them_and_nothing_else() -> None:
    env, plain = switching("observations", Clock(transitions=250), seed=3), make_env("Hopper-v5", {})
    order = drawn_order("observations", 3, 2, 11)
    assert sorted(order) == list(range(11)) and list(order) != list(range(11))
    np.testing.assert_array_equal(env.reset(seed=5)[0], plain.reset(seed=5)[0][order])
    for action in actions(8):
        mine, theirs = env.step(action[0]), plain.step(action[0])
        np.testing.assert_array_equal(mine[0], theirs[0][order])
        assert mine[1:4] == theirs[1:4]


def test_switch_of_actions_permutes_them_and_nothing_else() -> None:
    seed = next(s for s in itertools.count() if list(drawn_order("actions", s, 0, 3)) == [1, 2, 0])
    env, plain = switching("actions", Clock(), seed), make_env("Hopper-v5", {})
    np.testing.assert_array_equal(env.reset(seed=5)[0], plain.reset(seed=5)[0])
    for action in actions(8):
        np.testing.assert_array_equal(env.step(action[0])[0], plain.step(action[0][[1, 2, 0]])[0])


def test_switch_of_friction_is_log_uniform_and_the_same_for_all_environments_and_seeds() -> None:
    factors = np.array([drawn_friction([0.02, 2.0], 0, task) for task in range(3000)])
    logs = (np.log(factors) - math.log(0.02)) / math.log(100.0)
    assert logs.min() >= 0 and logs.max() <= 1
    assert np.abs(np.sort(logs) - np.linspace(0, 1, 3000)).max() < 0.04, "Kolmogorov-Smirnov distance to uniform"
    envs = make_envs(hopper(switch_every=100), seed=5, role="train")
    envs.reset()
    frictions = {float(single(envs, index).unwrapped.model.geom_friction[0, 0]) for index in range(3)}
    nominal = float(make_env("Hopper-v5", {}).unwrapped.model.geom_friction[0, 0])
    assert frictions == {nominal * drawn_friction([0.02, 2.0], 0, 0)}


def test_task_switches_at_the_first_episode_after_every_so_many_transitions_of_the_run() -> None:
    envs = make_envs(hopper(limit=7, num_envs=3, switch_every=30), seed=0, role="train", transitions=100)
    envs.reset()
    nominal = float(make_env("Hopper-v5", {}).unwrapped.model.geom_friction[0, 0])
    steps, task, starts = 0, (100) // 30, 0
    for action in actions(80):
        answer = step(envs, action)
        starting = answer.info.get("elapsed_step", None) is None and not answer.reward.any()
        if starting:  # all three end at the time limit together: the row after it is the reset
            task, starts = (100 + 3 * steps) // 30, starts + 1
        else:
            steps += 1
        expected = nominal * drawn_friction([0.02, 2.0], 0, task)
        assert {float(single(envs, i).unwrapped.model.geom_friction[0, 0]) for i in range(3)} == {expected}
    assert starts >= 9 and task >= 8


def test_evaluation_stays_in_the_task_that_the_run_is_in() -> None:
    envs = make_envs(hopper(switch_every=30, num_envs=8), seed=0, role="eval", num_envs=2, transitions=100)
    envs.reset()
    for action in actions(60, num_envs=2):
        step(envs, action)
    assert {single(envs, index).task for index in range(2)} == {3}
    assert {single(envs, index).unwrapped.model.geom_friction[0, 0] for index in range(2)} == {
        make_env("Hopper-v5", {}).unwrapped.model.geom_friction[0, 0] * drawn_friction([0.02, 2.0], 0, 3)
    }


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (EnvConfig(task="Hopper-v5", num_envs=1, switch_every=9), "envpool lets nobody change its tasks"),
        (
            EnvConfig(task="Hopper-v5", num_envs=1, randomise=RandomiseConfig(mass=[1.0, 2.0])),
            r"mass in \[1, 2\]\); expected env.backend=gymnasium",
        ),
        (hopper(randomise=RandomiseConfig(mass=[2.0, 1.0])), r"env.randomise.mass=\[2.0, 1.0\] is no range"),
        (hopper(randomise=RandomiseConfig(mass=[1.0])), "expected .lowest, highest"),
        (hopper(randomise=RandomiseConfig(mass=[0.0, 1.0])), "mass=0.0 is out of range"),
        (hopper(switch_every=9, switch_friction=[0.0, 1.0]), "env.switch_friction"),
        (
            dataclasses.replace(hopper(switch_every=9), task="Pendulum-v1", family="classic", kwargs={}),
            "Pendulum-v1 has no MuJoCo model whose friction could be changed",
        ),
    ],
)
def test_what_cannot_be_changed_is_refused_in_one_sentence(config: EnvConfig, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        make_envs(config, seed=0, role="train")


def test_noise_and_delays_work_on_any_task_of_gymnasium() -> None:
    pendulum = EnvConfig(backend="gymnasium", family="classic", task="Pendulum-v1", num_envs=1)
    noisy = dataclasses.replace(pendulum, randomise=RandomiseConfig(observation_noise=[0.1, 0.1]))
    assert not same(rollout(noisy, 5), rollout(pendulum, 5))


def test_a_wrong_range_on_the_command_line_is_refused_and_leaves_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"env.randomise.mass=\[2.0, 1.0\] is no range"):
        train_agent([*SMALL, "env=hopper", "env.randomise.mass=[2,1]", f"runs={tmp_path}"], quiet=True)
    assert not list(tmp_path.iterdir())


def _transitions(checkpoint: Path) -> int:
    name = checkpoint.name.removeprefix("step_")
    return int(name) if name.isdecimal() else 0


@pytest.mark.slow
def test_a_randomised_run_that_was_killed_and_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    arguments = [
        *SMALL,
        "env=hopper",
        "env.backend=gymnasium",
        "env.kwargs.max_episode_steps=20",
        "env.switch_every=90",
    ]
    arguments += [f"env.randomise.{name}=[{low},{high}]" for name, (low, high) in RANGES.items()]
    assert run(*arguments, f"runs={tmp_path}", "name=whole").returncode == 0
    cut = [*arguments, f"runs={tmp_path}", "name=cut"]
    process = subprocess.Popen(command(*cut), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # past the first rebuild, at vector step 60, so that the tasks' clock does not begin at 0
    while process.poll() is None and not any(_transitions(path) >= 300 for path in tmp_path.glob("cut/checkpoints/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run(*cut)
    assert resumed.returncode == 0, resumed.stderr
    assert "exact: " in resumed.stdout
    assert final_state(tmp_path / "cut") == final_state(tmp_path / "whole")

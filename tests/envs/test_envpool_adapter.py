"""The envpool adapter: what envpool 1.2.5 does, and what the adapter makes of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import envpool
import numpy as np
import pytest

from rlplastic.envs.base import AutoresetMode, VectorEnv, step
from rlplastic.envs.checker import check
from rlplastic.envs.envpool_adapter import EnvpoolEnv
from rlplastic.envs.gymnasium_adapter import GymnasiumEnv
from rlplastic.errors import ConfigurationError, EnvironmentContractError, NonFiniteError

GO1 = "MuJoCoPlayground/Go1JoystickFlatTerrain-v1"
REACH = "MetaWorld/Reach-v3"
MYO = "MyoSuite/myoElbowPose1D6MRandom-v0"
TASKS = {
    "Humanoid-v5": {"policy": 348},
    "Hopper-v5": {"policy": 11},
    "HumanoidRun-v1": {"policy": 67},
    GO1: {"policy": 48, "critic": 123},
    "Pendulum-v1": {"policy": 3},
    REACH: {"policy": 39},
    MYO: {"policy": 9},
}


def _random(envs: VectorEnv, time: int) -> np.ndarray:
    return np.random.default_rng([7, time]).uniform(-1, 1, (envs.num_envs, envs.action_dim)).astype(np.float32)


@pytest.mark.parametrize("task", TASKS)
def test_every_family_keeps_the_contract(task: str) -> None:
    def make(seeds: list[int]) -> EnvpoolEnv:
        return EnvpoolEnv(task, len(seeds), seeds, threads=1, kwargs={"max_episode_steps": 12})

    envs = make([0])
    assert isinstance(envs, VectorEnv)
    assert envs.observation_dims == TASKS[task] and next(iter(envs.observation_dims)) == "policy"
    assert envs.autoreset is AutoresetMode.NEXT_STEP and envs.max_episode_steps == 12 and envs.deterministic
    envs.close()
    report = check(make, num_envs=3, steps=30)
    outcome = {finding.name: finding.status for finding in report.findings}
    # envpool 1.2.5 starts every MyoSuite episode alike
    assert outcome == dict.fromkeys(outcome, "pass") | ({"seeds": "skip"} if task == MYO else {}), report.findings


@pytest.mark.parametrize("task", ["Hopper-v5", "HumanoidRun-v1"])
def test_row_i_is_environment_i_whatever_its_neighbours_do(task: str) -> None:
    seeds = [11, 12, 13, 14, 15, 16]
    pool = EnvpoolEnv(task, 6, seeds, threads=3)
    singles = [EnvpoolEnv(task, 1, [seed], threads=1) for seed in seeds]
    first = pool.reset()["policy"]
    for row, single in enumerate(singles):
        np.testing.assert_array_equal(first[row], single.reset()["policy"][0])
    for time in range(40):
        actions = _random(pool, time)
        result = step(pool, actions)
        np.testing.assert_array_equal(result.info["env_id"], np.arange(6))
        for row, single in enumerate(singles):
            alone = step(single, actions[row : row + 1])
            np.testing.assert_array_equal(result.observation["policy"][row], alone.observation["policy"][0])
            assert result.reward[row] == alone.reward[0]
    for envs in (pool, *singles):
        envs.close()


@pytest.mark.parametrize("task", ["CheetahRun-v1", REACH, "Hopper-v5"])
def test_the_row_after_an_end_is_the_reset_with_reward_zero(task: str) -> None:
    envs = EnvpoolEnv(task, 3, [1, 2, 3], threads=1, kwargs={"max_episode_steps": 10})
    raw = envpool.make_gymnasium(task, num_envs=3, seed=[1, 2, 3], num_threads=1, max_episode_steps=10)
    envs.reset()
    raw.reset()
    stale, resets, after_done = 0, 0, np.zeros(3, np.bool_)
    for time in range(34):
        actions = _random(envs, time)
        mine, theirs = step(envs, actions), raw.step(envs._map(actions))
        np.testing.assert_array_equal(mine.info["elapsed_step"] == 0, after_done)
        assert (mine.reward[after_done] == 0).all()
        np.testing.assert_array_equal(mine.reward[~after_done], theirs[1][~after_done])
        stale += int((theirs[1][after_done] != 0).sum())
        resets += int(after_done.sum())
        after_done = mine.terminated | mine.truncated
    assert resets >= 9
    # the reason for the adapter's zero: dm_control and MetaWorld leave another number there
    assert (stale > 0) == (task != "Hopper-v5")
    envs.close()


def test_dm_control_tasks_end_at_the_time_limit_as_truncated() -> None:
    envs = EnvpoolEnv("CheetahRun-v1", 2, [1, 2], threads=1)
    assert envs.max_episode_steps == 1000
    envs.reset()
    for _ in range(1000):
        result = step(envs, np.zeros((2, 6), np.float32))
    assert result.truncated.all() and not result.terminated.any()
    envs.close()


def test_a_robot_that_falls_exactly_at_the_time_limit_is_terminated() -> None:
    seeds = [5, 6, 7, 8]

    def first_end(limit: int) -> tuple[int, Any]:
        envs = EnvpoolEnv(GO1, 4, seeds, threads=1, kwargs={"max_episode_steps": limit})
        envs.reset()
        for time in range(200):
            result = step(envs, np.sign(_random(envs, time)).astype(np.float32))
            if (result.terminated | result.truncated).any():
                envs.close()
                return time + 1, result
        raise AssertionError("nobody fell")

    steps, fall = first_end(1000)
    assert fall.terminated.any() and not fall.terminated.all() and not fall.truncated.any()
    again, both = first_end(steps)
    assert again == steps and both.truncated.all()
    np.testing.assert_array_equal(both.terminated, fall.terminated)


def test_terms_that_a_dm_control_task_never_fills_are_left_out() -> None:
    envs = EnvpoolEnv("HumanoidRun-v1", 2, [3, 4], threads=1)
    raw = envpool.make_gymnasium("HumanoidRun-v1", num_envs=2, seed=[3, 4], num_threads=1)
    flat, (terms, _) = envs.reset()["policy"], raw.reset()
    names = [name for name, _ in envs.terms["policy"]]
    assert names == ["joint_angles", "head_height", "extremities", "torso_vertical", "com_velocity", "velocity"]
    assert "position" in terms and not np.any(terms["position"])
    for name, columns in envs.terms["policy"]:
        np.testing.assert_array_equal(flat[:, columns], terms[name].reshape(2, -1).astype(np.float32))
    envs.close()


@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Hopper-v5", "Ant-v5", "Walker2d-v5"])
def test_envpool_and_gymnasium_simulate_the_same_v5_task(task: str) -> None:
    quiet = {"reset_noise_scale": 0.0}  # the two draw their initial noise from different generators
    one = EnvpoolEnv(task, 1, [0], 1, quiet)
    two = GymnasiumEnv(task, 1, [0], kwargs=quiet)
    np.testing.assert_array_equal(one.action_low, two.action_low)
    np.testing.assert_array_equal(one.action_high, two.action_high)
    assert one.max_episode_steps == two.max_episode_steps and one.observation_dims == two.observation_dims
    np.testing.assert_array_equal(one.reset()["policy"], two.reset()["policy"])
    for time in range(15):
        actions = _random(one, time)
        mine, theirs = step(one, actions), step(two, actions)
        np.testing.assert_allclose(mine.observation["policy"], theirs.observation["policy"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mine.reward, theirs.reward, rtol=1e-5, atol=1e-6)
        assert mine.terminated == theirs.terminated
        if mine.terminated:
            break
    one.close()
    two.close()


@pytest.mark.parametrize(
    ("task", "bound", "kind"), [("Humanoid-v5", 0.4, np.float64), ("Pendulum-v1", 2.0, np.float32)]
)
def test_actions_arrive_scaled_to_the_simulators_own_bounds(task: str, bound: float, kind: type) -> None:
    envs = EnvpoolEnv(task, 2, [3, 4], threads=1)
    raw = envpool.make_gymnasium(task, num_envs=2, seed=[3, 4], num_threads=1)
    np.testing.assert_allclose(envs.action_high, bound)
    envs.reset()
    raw.reset()
    for value in (1, -1, 0.5, -0.25):
        result = step(envs, np.full((2, envs.action_dim), value, np.float32))
        expected = raw.step(np.full((2, envs.action_dim), value * bound, kind))
        np.testing.assert_allclose(result.observation["policy"], expected[0], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(result.reward, expected[1], rtol=1e-4, atol=1e-4)
    envs.close()


def test_bad_actions_and_calls_out_of_order_are_refused_and_the_pool_goes_on() -> None:
    envs = EnvpoolEnv("Pendulum-v1", 2, [1, 2], threads=1)
    good = np.zeros((2, 1), np.float32)
    envs.reset()
    with pytest.raises(EnvironmentContractError, match="send"):
        envs.receive()
    with pytest.raises(NonFiniteError):
        envs.send(np.full((2, 1), np.nan, np.float32))
    with pytest.raises(EnvironmentContractError):
        envs.send(good[:1])
    envs.send(good)
    with pytest.raises(EnvironmentContractError, match="receive"):
        envs.send(good)
    assert envs.receive().info["elapsed_step"].tolist() == [1, 1]
    envs.send(good)
    envs.reset()
    envs.send(good)
    assert envs.receive().info["elapsed_step"].tolist() == [1, 1]
    envs.send(good)
    envs.close()
    envs.close()
    with pytest.raises(EnvironmentContractError, match="closed"):
        envs.send(good)


def test_tasks_without_a_continuous_box_are_refused_by_their_space() -> None:
    with pytest.raises(EnvironmentContractError, match="Discrete"):
        EnvpoolEnv("CartPole-v1", 1, [0])


@pytest.mark.parametrize(
    ("task", "kwargs", "hint"),
    [
        ("Hoper-v5", {}, "'Hopper-v5'"),
        ("Hopper-v5", {"frame_skp": 2}, "'frame_skip'"),
        ("Hopper-v5", {"frame_skip": "two"}, "'frame_skip': 4"),
        ("Hopper-v5", {"num_envs": 7}, "no option env.kwargs.num_envs"),
    ],
)
def test_wrong_names_and_options_say_what_was_meant(task: str, kwargs: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigurationError, match=hint):
        EnvpoolEnv(task, 1, [0], kwargs=kwargs)


def test_a_seed_is_needed_for_every_environment() -> None:
    with pytest.raises(ConfigurationError, match="seeds"):
        EnvpoolEnv("Hopper-v5", 2, [0])


def test_importing_the_package_and_its_adapters_imports_no_simulator() -> None:
    code = (
        "import sys, rlplastic.envs, rlplastic.envs.envpool_adapter, rlplastic.envs.gymnasium_adapter, "
        "rlplastic.envs.catalogue, rlplastic.envs.checker\n"
        "print([m for m in ('envpool', 'gymnasium', 'mujoco', 'torch', 'omegaconf', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_machine_without_threads_left_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import envpool

    def exhausted(*arguments: object, **options: object) -> None:
        raise RuntimeError("Resource temporarily unavailable")

    monkeypatch.setattr(envpool, "make_gymnasium", exhausted)
    with pytest.raises(ConfigurationError, match=r"could not start 2 environments .*lower env\.num_envs"):
        EnvpoolEnv("Pendulum-v1", 2, [1, 2])

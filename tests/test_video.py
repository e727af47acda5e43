"""Films: real frames, real time, the whole episode; a reason instead of an exception where there is no renderer."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec

from rlplastic import video
from rlplastic.config import EnvConfig
from rlplastic.envs import catalogue
from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.envs.gymnasium_adapter import make_env
from rlplastic.video import record

imageio = pytest.importorskip("imageio.v2")
pytest.importorskip("imageio_ffmpeg")

PENDULUM = EnvConfig(family="classic", task="Pendulum-v1")


@functools.cache
def opengl() -> str:
    """Why MuJoCo cannot draw here; empty if it can."""
    code = "import mujoco; c = mujoco.GLContext(64, 64); c.make_current(); c.free()"
    environment = {**os.environ, "MUJOCO_GL": "egl"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr[-200:]


@pytest.fixture
def needs_opengl(monkeypatch: pytest.MonkeyPatch) -> None:
    if opengl():
        pytest.skip(f"no OpenGL: {opengl()}")
    monkeypatch.setenv("MUJOCO_GL", "egl")


def still(action_dim: int) -> Any:
    return lambda observation: np.zeros((len(observation["policy"]), action_dim), np.float32)


def wiggling(action_dim: int) -> Any:
    steps = itertools.count()
    return lambda observation: np.full((1, action_dim), np.sin(next(steps)), np.float32)


def film(path: Path) -> tuple[list[np.ndarray], float]:
    with imageio.get_reader(path) as reader:
        return [np.asarray(frame) for frame in reader], reader.get_meta_data()["fps"]


def differences(frames: list[np.ndarray]) -> list[float]:
    return [float(np.abs(a.astype(int) - b.astype(int)).mean()) for a, b in itertools.pairwise(frames)]


def test_film_shows_the_whole_episode_in_real_time(tmp_path: Path) -> None:
    path = tmp_path / "videos" / "film.mp4"
    assert record(still(1), PENDULUM, path, seed=0, size=(160, 128)) is None
    frames, fps = film(path)
    assert fps == pytest.approx(20)  # Pendulum-v1 steps 0.05 s
    assert len(frames) == 201 and frames[0].shape == (128, 160, 3)
    assert len(frames) / fps == pytest.approx(200 * 0.05, rel=0.01)
    assert max(differences(frames)) > 0.5, "the pendulum swings"
    assert [entry.name for entry in path.parent.iterdir()] == ["film.mp4"]


def test_film_ends_after_the_steps_asked_for_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_text("older")
    assert record(still(1), PENDULUM, path, seed=0, max_steps=30, size=(160, 128)) is None
    assert len(film(path)[0]) == 31


class Counted:
    """Ends after ``length`` steps and starts anew in the following one; a frame's brightness is the step it shows."""

    num_envs, observation_dims, action_dim, autoreset = 1, {"policy": 1}, 1, AutoresetMode.NEXT_STEP

    def __init__(self, length: int) -> None:
        self.length, self.elapsed = length, 0

    def reset(self) -> dict[str, np.ndarray]:
        self.elapsed = 0
        return {"policy": np.zeros((1, 1), np.float32)}

    def send(self, actions: np.ndarray) -> None:
        assert self.elapsed < self.length, "stepped beyond the end of the episode"

    def receive(self) -> Step:
        self.elapsed += 1
        done = np.array([self.elapsed == self.length])
        return Step({"policy": np.zeros((1, 1), np.float32)}, np.zeros(1, np.float32), done, ~done & done, {})

    def draw(self) -> np.ndarray:
        frame = np.full((64, 64, 3), 2 * self.elapsed, np.uint8)
        frame[:8, :8] = 255
        return frame


@pytest.mark.parametrize(("seconds", "stride"), [(0.05, 1), (0.04, 1), (0.02, 2), (0.01, 4), (0.002, 20), (0.2, 1)])
def test_frames_are_drawn_every_few_steps_and_always_at_the_end(tmp_path: Path, seconds: float, stride: int) -> None:
    envs = Counted(length=89)
    video._film(still(1), envs, envs.draw, seconds, tmp_path / "film.mp4", max_steps=1000)
    frames, fps = film(tmp_path / "film.mp4")
    assert fps == pytest.approx(1 / (seconds * stride), rel=0.01)
    shown = [round(float(frame[32:, 32:].mean()) / 2) for frame in frames]
    expected = sorted({*range(0, 90, stride), 89})
    assert len(shown) == len(expected)
    np.testing.assert_allclose(shown, expected, atol=3)


def test_odd_frames_lose_a_row_and_a_column(tmp_path: Path) -> None:
    envs = Counted(length=5)
    video._film(still(1), envs, lambda: envs.draw()[:63, :61], 0.04, tmp_path / "film.mp4", max_steps=10)
    assert film(tmp_path / "film.mp4")[0][0].shape == (62, 60, 3)


def test_renderer_that_draws_nothing_is_noticed(tmp_path: Path) -> None:
    envs = Counted(length=5)
    with pytest.raises(RuntimeError, match="draws nothing"):
        video._film(still(1), envs, lambda: np.zeros((64, 64, 3), np.uint8), 0.04, tmp_path / "film.mp4", max_steps=10)


@pytest.mark.parametrize(
    "env",
    [
        EnvConfig(family="mujoco", task="Hopper-v5"),
        EnvConfig(family="dmc", task="cheetah-run"),
        EnvConfig(backend="gymnasium", family="mujoco", task="Hopper-v5", autoreset="disabled"),
        pytest.param(EnvConfig(family="playground", task="Go1JoystickFlatTerrain"), marks=pytest.mark.slow),
        pytest.param(EnvConfig(family="metaworld", task="reach-v3"), marks=pytest.mark.slow),
    ],
    ids=lambda env: f"{env.backend}-{env.task}",
)
def test_mujoco_is_filmed_through_every_backend(needs_opengl: None, tmp_path: Path, env: EnvConfig) -> None:
    dims = {"Hopper-v5": 3, "cheetah-run": 6, "Go1JoystickFlatTerrain": 12, "reach-v3": 4}
    path = tmp_path / "film.mp4"
    assert record(wiggling(dims[env.task]), env, path, seed=0, max_steps=12, size=(160, 128)) is None
    frames, fps = film(path)
    assert 15 <= fps <= 35 and len(frames) >= 3
    assert frames[0].shape == (128, 160, 3) and len(np.unique(frames[0])) > 30, "a scene, not a flat colour"
    assert max(differences(frames)) > 0.05, "something moves"


def test_camera_follows_a_dm_control_robot(needs_opengl: None) -> None:
    env = EnvConfig(family="dmc", task="cheetah-run")
    with video._camera(env, 0, (160, 128)) as (envs, draw, _):
        envs.reset()
        tracking = draw()
        fixed = envs._env._render(np.zeros(1, np.int32), 160, 128, -1)[0]  # type: ignore[attr-defined]
    assert np.abs(tracking.astype(int) - fixed.astype(int)).mean() > 1


def robot(frame: np.ndarray) -> int:
    """Pixels of the robot, which is brown where floor and sky are grey, green and blue."""
    return int((frame[..., 0].astype(int) - frame[..., 2] > 40).sum())


@pytest.mark.parametrize("family", ["mujoco", "gymnasium"])
@pytest.mark.parametrize("task", ["HalfCheetah-v5", "Ant-v5"])
def test_camera_follows_a_gymnasium_robot(needs_opengl: None, task: str, family: str) -> None:
    import mujoco

    env = EnvConfig(backend="gymnasium", family=family, task=task)
    with video._camera(env, 0, (160, 128)) as (envs, draw, _):
        envs.reset()
        near = draw()
        simulation = envs._env.envs[0].unwrapped  # type: ignore[attr-defined]
        simulation.data.qpos[0] += 30  # as far as a policy that runs
        mujoco.mj_forward(simulation.model, simulation.data)
        far = draw()
    assert near.shape == (128, 160, 3)
    assert robot(near) > 300 and robot(far) > 0.8 * robot(near)


def test_camera_and_size_that_the_options_name_are_kept(needs_opengl: None) -> None:
    asked = {"camera_id": -1, "width": 96, "height": 64}
    env = EnvConfig(backend="gymnasium", family="gymnasium", task="Ant-v5", kwargs=asked)
    with video._camera(env, 0, (160, 128)) as (envs, draw, _):
        envs.reset()
        assert draw().shape == (64, 96, 3)
        assert envs._env.envs[0].unwrapped.mujoco_renderer.camera_id == -1  # type: ignore[attr-defined]


class Blind(gymnasium.Env[np.ndarray, np.ndarray]):
    """Cannot be drawn."""

    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        return np.zeros(1, np.float32), {}


class Promising(Blind):
    """Says that it can be drawn."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (Blind, r"Blind-v0 has no render_mode rgb_array \(.* is \[\]\); expected"),
        (Promising, "NotImplementedError$"),
    ],
)
def test_task_without_frames_is_one_line_without_warning_or_folder(
    tmp_path: Path, kind: type[Blind], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{kind.__name__}-v0"
    monkeypatch.setitem(gymnasium.registry, name, EnvSpec(name, kind))
    env = EnvConfig(backend="gymnasium", family="gymnasium", task=name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reason = record(still(1), env, tmp_path / "videos" / "film.mp4", seed=0)
    assert reason is not None and re.match(told, reason)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("task", catalogue.tasks("mujoco"))
def test_seconds_per_step_of_gym_tasks_are_gymnasiums(task: str) -> None:
    if task.rpartition("-v")[2] not in ("4", "5") or task == "Pusher-v4":
        pytest.skip("gymnasium 1.x has no such version any more")
    envpool = pytest.importorskip("envpool")
    with make_env(task, {}) as env:
        expected = env.unwrapped.dt  # type: ignore[attr-defined]
    found = video._envpool_seconds(EnvConfig(family="mujoco", task=task), envpool.make_spec(task).config)
    assert found == pytest.approx(expected)


QUICK = {"cheetah-run", "ball_in_cup-catch", "humanoid-run"}


@pytest.mark.parametrize(
    "task", [task if task in QUICK else pytest.param(task, marks=pytest.mark.slow) for task in catalogue.tasks("dmc")]
)
def test_seconds_per_step_of_dm_control_tasks_are_dm_controls(task: str) -> None:
    suite = pytest.importorskip("dm_control.suite")
    envpool = pytest.importorskip("envpool")
    domain, _, name = task.partition("-")
    if domain == "lqr":
        pytest.skip("its model is generated")
    expected = suite.load(domain, name).control_timestep()
    config = envpool.make_spec(catalogue.resolve("dmc", task)).config
    assert video._envpool_seconds(EnvConfig(family="dmc", task=task), config) == pytest.approx(expected)


def test_frame_skip_stretches_the_step() -> None:
    envpool = pytest.importorskip("envpool")
    config = envpool.make_spec("Ant-v5", frame_skip=10).config
    assert video._envpool_seconds(EnvConfig(task="Ant-v5"), config) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        (EnvConfig(family="mujoco", task="Humanoidd-v5"), "Humanoid-v5"),
        (EnvConfig(family="classic", task="Pendulum-v1", kwargs={"nonsense": 1}), "nonsense"),
    ],
)
def test_what_cannot_be_built_is_a_reason_not_an_exception(tmp_path: Path, env: EnvConfig, told: str) -> None:
    reason = record(still(1), env, tmp_path / "film.mp4", seed=0)
    assert reason is not None and told in reason and "\n" not in reason
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["none_such", "disable"])
def test_missing_opengl_is_a_reason_not_the_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("MUJOCO_GL", kind)
    reason = record(still(3), EnvConfig(task="Hopper-v5"), tmp_path / "film.mp4", seed=0)
    assert reason == f"MUJOCO_GL={kind} draws nothing; expected egl, osmesa or glfw"


@pytest.mark.parametrize("module", ["imageio.v2", "imageio_ffmpeg"])
def test_missing_encoder_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    reason = record(still(1), PENDULUM, tmp_path / "film.mp4", seed=0)
    assert reason is not None and "rlplastic[video]" in reason and not list(tmp_path.iterdir())


def test_failing_policy_leaves_no_half_film(tmp_path: Path) -> None:
    calls = iter(range(100))

    def fails(observation: dict[str, np.ndarray]) -> np.ndarray:
        if next(calls) == 5:
            raise ZeroDivisionError("halfway")
        return np.zeros((1, 1), np.float32)

    assert record(fails, PENDULUM, tmp_path / "film.mp4", seed=0, size=(160, 128)) == "ZeroDivisionError: halfway"
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_no_half_film(tmp_path: Path) -> None:
    def interrupted(observation: dict[str, np.ndarray]) -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(interrupted, PENDULUM, tmp_path / "videos" / "film.mp4", seed=0, size=(160, 128))
    assert not list(tmp_path.iterdir())


def test_a_simulator_that_cannot_be_made_leaves_no_context_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[bool] = []
    monkeypatch.setattr(video, "_context", lambda size: SimpleNamespace(free=lambda: freed.append(True)))
    reason = record(still(3), EnvConfig(task="Hopper-v0"), tmp_path / "film.mp4", seed=0)
    assert reason is not None and "Hopper-v5" in reason and freed == [True]


def test_unwritable_folder_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "videos").write_text("a file where the folder should be")
    reason = record(still(1), PENDULUM, tmp_path / "videos" / "film.mp4", seed=0)
    assert reason is not None and "videos" in reason

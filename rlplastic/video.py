"""One episode as an MP4 file, drawn by the simulator's own renderer, played back in real time.

envpool draws its MuJoCo tasks natively, but ends the process where no OpenGL context is current: one is made first, so
that a machine without OpenGL gives a sentence instead. gymnasium's renderer makes its own. Both read ``MUJOCO_GL``;
where it is not set, EGL is chosen, which needs no display. Needs the optional packages imageio and imageio-ffmpeg.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlplastic.config import EnvConfig
from rlplastic.envs import Observation, VectorEnv, make_envs, step
from rlplastic.errors import ConfigurationError, RlplasticError

if TYPE_CHECKING:
    import gymnasium

FRAMES_PER_SECOND = 25
"""Aimed at; frames are drawn every few steps so that the film runs at the speed of the robot."""
SMALLEST_TIMESTEP = 0.002
"""MuJoCo's timestep where a model sets none, in seconds."""
_TRACKING_CAMERA = {"dmc": 0, "playground": 0, "myosuite": 0}
"""The camera that follows the robot; for other families it is the renderer's own choice, -1."""
_SECONDS_PER_STEP = {"metaworld": 0.0125, "myosuite": 0.02, "classic": 0.02}
_SECONDS_OF_CLASSIC = {"Pendulum-v1": 0.05, "MountainCarContinuous-v0": 1 / 30}

Frame: TypeAlias = NDArray[np.uint8]
Act: TypeAlias = Callable[[Observation], NDArray[np.float32]]
Scene: TypeAlias = tuple[VectorEnv, Callable[[], Frame], float]
"""One environment that restarts in the step after its end, a function that draws it, and the seconds of a step."""
_Context: TypeAlias = Any  # mujoco has no types for it
_Simulation: TypeAlias = Any  # what a gymnasium task is underneath its wrappers
_Options: TypeAlias = Any  # envpool generates the named tuple at run time


def record(
    act: Act,
    env: EnvConfig,
    path: Path,
    *,
    seed: int,
    max_steps: int = 1000,
    size: tuple[int, int] = (480, 368),
    transitions: int = 0,
) -> str | None:
    """Play one episode of a task and write it to ``path``: `record_with` on the task's own renderer.

    Args:
        act: observation groups (1, dim) to actions (1, A) in [-1, 1].
        env: the task.
        path: of the MP4 file; its folder is made for a film, an existing file is replaced once the new one is whole.
        seed: of the environment; the first environment of an evaluation with this seed.
        max_steps: the film ends here if the episode does not.
        size: width and height in pixels, multiples of 16.
        transitions: of the run so far; says which task is filmed where it switches.

    Returns:
        None, or one line that says why there is no film.
    """
    return record_with(act, _camera(env, seed, size, transitions), path, max_steps)


def record_with(act: Act, camera: AbstractContextManager[Scene], path: Path, max_steps: int = 1000) -> str | None:
    """Play one episode and write it to ``path``; never raises, since a missing film must not end a run.

    Args:
        act: observation groups (1, dim) to actions (1, A) in [-1, 1].
        camera: entered, gives the one environment to play, a function that draws it, and the seconds of a step.
        path: as in `record`.
        max_steps: as in `record`.

    Returns:
        None, or one line that says why there is no film.
    """
    unfinished = path.with_name(f".unfinished_{path.name}")
    is_new = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with camera as (envs, draw, seconds):
            _film(act, envs, draw, seconds, unfinished, max_steps)
        unfinished.replace(path)
    except Exception as error:  # simulators, drivers and encoders fail in their own ways
        kind = [] if isinstance(error, RlplasticError) else [type(error).__name__]
        return " ".join(": ".join(filter(None, [*kind, str(error)])).split())[:300]
    finally:  # an interrupt passes here, too
        with suppress(OSError):
            unfinished.unlink()
        if is_new:
            with suppress(OSError):  # not empty: it holds the film
                path.parent.rmdir()
    return None


def _film(
    act: Act,
    envs: VectorEnv,
    draw: Callable[[], Frame],
    seconds: float,
    path: Path,
    max_steps: int,
) -> None:
    """Encode an episode whose steps last ``seconds`` each."""
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401 - what encodes
    except ImportError as error:
        raise ConfigurationError(
            "recording needs imageio and imageio-ffmpeg; expected both to be installed: pip install 'rlplastic[video]'"
        ) from error
    stride = max(1, round(1 / (seconds * FRAMES_PER_SECOND)))
    observation = envs.reset()
    frame = draw()
    if frame.min() == frame.max():
        raise RuntimeError("the renderer draws nothing: every pixel of the first frame is the same")
    encoder: Any = imageio.get_writer(path, format="FFMPEG", fps=1 / (seconds * stride), macro_block_size=2)
    with encoder as writer:
        writer.append_data(_even(frame))
        for index in range(1, max_steps + 1):
            result = step(envs, act(observation))
            observation = result.observation
            done = bool(result.terminated[0] | result.truncated[0])
            if done or index % stride == 0:
                writer.append_data(_even(draw()))
            if done:
                break


def _even(frame: Frame) -> Frame:
    """Without its last row or column where their number is odd: the encoder halves the resolution of colours."""
    return frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2]


@contextmanager
def _camera(env: EnvConfig, seed: int, size: tuple[int, int], transitions: int = 0) -> Iterator[Scene]:
    """One environment that restarts in the step after its end, a function that draws it, and the seconds of a step."""
    if env.backend == "torch":
        raise ConfigurationError("simulators in torch are not drawn; expected a task of another backend for a film")
    os.environ.setdefault("MUJOCO_GL", "egl")
    width, height = size
    env = replace(env, vectorization="sync", autoreset="next_step")
    if env.backend == "gymnasium":
        _require_frames(env)
        env = replace(env, kwargs={**env.kwargs, "render_mode": "rgb_array"})
    # what is made first is freed last: the simulator gives its textures back to the context
    with ExitStack() as stack:
        if env.backend == "envpool" and env.family != "classic":
            stack.callback(_context(size).free)
        # the adapters keep the simulator's own object, which alone can draw, in `_env` until they are closed
        envs: Any = make_envs(env, seed=seed, role="eval", num_envs=1, transitions=transitions)
        stack.callback(envs.close)
        if env.backend == "gymnasium":
            _aim(envs._env.envs[0].unwrapped, env.kwargs, size)
            yield envs, lambda: envs._env.render()[0], seconds_per_step(env, envs)
        else:
            first, camera = np.zeros(1, np.int32), _TRACKING_CAMERA.get(env.family, -1)
            seconds = seconds_per_step(env, envs)
            yield envs, lambda: envs._env._render(first, width, height, camera)[0], seconds


def _require_frames(env: EnvConfig) -> None:
    """Refuse a gymnasium task that does not offer frames, before it is asked for them.

    Raises:
        ConfigurationError: ``rgb_array`` is not among its render modes.
    """
    from rlplastic.envs.gymnasium_adapter import make_env

    one = make_env(env.task, {str(name): value for name, value in env.kwargs.items() if name != "render_mode"})
    modes = list(one.metadata.get("render_modes") or ())
    one.close()
    if "rgb_array" not in modes:
        raise ConfigurationError(
            f"{env.task} has no render_mode rgb_array (its metadata['render_modes'] is {modes}); expected it there "
            "and frames (height, width, 3) of uint8 from render()"
        )


def _aim(simulation: _Simulation, asked: Mapping[str, Any], size: tuple[int, int]) -> None:
    """Have gymnasium's MuJoCo renderer follow the robot, where the model has a camera that does; its own stays behind.

    What the task's options ask for (``width``, ``height``, ``camera_id``, ``camera_name``) is left as it is.
    """
    renderer = getattr(simulation, "mujoco_renderer", None)
    if renderer is None:
        return
    import mujoco

    view, modes = simulation.model.vis.global_, mujoco.mjtCamLight
    renderer.width, renderer.height = asked.get("width", size[0]), asked.get("height", size[1])
    view.offwidth, view.offheight = max(view.offwidth, renderer.width), max(view.offheight, renderer.height)
    following = np.isin(simulation.model.cam_mode, [int(modes.mjCAMLIGHT_TRACK), int(modes.mjCAMLIGHT_TRACKCOM)])
    chosen = any(getattr(simulation, name, None) is not None for name in ("camera_id", "camera_name"))
    if following.any() and not chosen:
        renderer.camera_id = int(np.argmax(following))


def _context(size: tuple[int, int]) -> _Context:
    """A current OpenGL context of the kind named by MUJOCO_GL, however early MuJoCo was imported."""
    kind = os.environ["MUJOCO_GL"].lower()
    if kind not in ("egl", "osmesa", "glfw"):
        raise ConfigurationError(f"MUJOCO_GL={kind} draws nothing; expected egl, osmesa or glfw")
    context = importlib.import_module(f"mujoco.{kind}").GLContext(*size)
    context.make_current()
    return context


def seconds_per_step(env: EnvConfig, envs: Any) -> float:  # noqa: ANN401 - of either adapter, which say it nowhere
    """Simulated seconds that one step of a task's environments lasts."""
    if env.backend == "torch":
        return float(getattr(envs.simulator, "step_dt", 1 / FRAMES_PER_SECOND))
    if env.backend == "gymnasium":
        return _gymnasium_seconds(envs._env.envs[0])
    return _envpool_seconds(env, envs._env.spec.config)


def _gymnasium_seconds(env: gymnasium.Env[Any, Any]) -> float:
    return float(getattr(env.unwrapped, "dt", None) or 1 / env.metadata.get("render_fps", FRAMES_PER_SECOND))


def _envpool_seconds(env: EnvConfig, options: _Options) -> float:
    """Simulated seconds per step of an envpool task; its interface does not tell, its configuration and model do."""
    if env.family == "playground":
        return float(options.ctrl_dt)
    if env.family not in ("mujoco", "dmc"):
        return _SECONDS_OF_CLASSIC.get(env.task, _SECONDS_PER_STEP[env.family])
    assets = Path(options.base_path) / "mujoco"
    if env.family == "dmc":
        model = assets / "assets_dmc" / f"{env.task.partition('-')[0]}.xml"
    else:
        model = assets / "assets_gym" / options.xml_file
        # some tasks name a model that is only there in envpool's edition of it
        model = model if model.is_file() else model.with_stem(f"{model.stem}_envpool")
    timestep = re.search(r'<option[^>]*\btimestep="([^"]+)"', model.read_text())
    return float(options.frame_skip) * (float(timestep[1]) if timestep else SMALLEST_TIMESTEP)

"""A policy's robot in plain MuJoCo, from an MJCF file and the policy's document: the other simulator of sim-to-sim.

Observations are assembled from the document's terms (`rlplastic.playing.terms`), actions go through its maps to the
actuators by name. An episode ends when the robot has fallen (its root body tilts by more than 60 degrees from where it
began, or sinks below half its height) or at the time limit. The reward of a step is its duration in seconds; where the
policy follows a command, times exp(-|v - command|^2 / 0.25) of the horizontal velocity, as MuJoCo Playground has it.

Quantities that MuJoCo derives are those of the last simulation step's beginning, as they are in gymnasium's tasks and
in MuJoCo Playground: no extra forward pass comes between stepping and observing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import mujoco
import numpy as np
from numpy.typing import NDArray

from rlplastic.deploy.control import LAST_ACTION, ObservationAssembler, decode
from rlplastic.deploy.document import Document
from rlplastic.envs.base import AutoresetMode, Observation, Step, check_actions
from rlplastic.envs.perturbation import Dynamics, Perturbation
from rlplastic.errors import ConfigurationError, nearest
from rlplastic.exporting import model_facts
from rlplastic.playing.terms import COMMAND, FROM_RUNNER, linear_velocity, readers, root_body
from rlplastic.seeding import key
from rlplastic.video import Frame, Scene

_Mujoco: TypeAlias = Any  # mujoco has no types
START_NOISE = 0.01
"""Half-width of the uniform noise on hinge and slide positions and on velocities where an episode begins (SI units)."""
FALLEN_COSINE = 0.5
"""Of the angle between the root body's vertical axis and where it pointed at the start: 60 degrees."""
FALLEN_HEIGHT = 0.5
"""Of the root body's height at the start."""
TRACKING = 0.25
"""(m/s)^2: the squared error of the velocity at which a step counts for 1/e of its duration."""


def load_model(path: str | Path) -> _Mujoco:
    """Compile an MJCF file.

    Raises:
        ConfigurationError: no such file, or MuJoCo refuses it.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigurationError(f"mjcf={file} does not exist; expected a MuJoCo XML file of the robot and its floor")
    try:
        return mujoco.MjModel.from_xml_path(str(file))
    except ValueError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigurationError(f"mjcf={file} was refused by MuJoCo ({reason}); mend the file") from error


class MjcfEnv:
    """A `VectorEnv` of one robot.

    Args:
        model: of the robot and its surroundings; edited by the perturbation.
        document: of the policy.
        seconds: the time limit of an episode.
        seed: of the episodes' starts and pushes.
        command: what the term ``command`` tells the policy.
        perturbation: of the dynamics.

    Raises:
        ConfigurationError: the document names no control period, a term that cannot be read, or an actuator that the
            model lacks; or the model's time step does not divide the control period.
    """

    num_envs = 1
    autoreset = AutoresetMode.NEXT_STEP
    deterministic = True

    def __init__(
        self,
        model: _Mujoco,
        document: Document,
        *,
        seconds: float,
        seed: int,
        command: tuple[float, ...] = (0.0, 0.0, 0.0),
        perturbation: Perturbation | None = None,
    ) -> None:
        self.model, self.data = model, mujoco.MjData(model)
        self._document, self._seed, self._episode = document, seed, -1
        self._perturbation = perturbation or Perturbation()
        self.period, self._substeps = _timing(document, model)
        self._actuators = _actuators(document, model)
        self._command = np.array(command, np.float64)
        gain = self._perturbation.gain != 1
        self._dynamics = Dynamics(model, self.data, self.period, gain)
        self._readers = readers(model, self.data, document.observation.terms)
        self._known = [term.name for term in document.observation.terms if term.name in FROM_RUNNER]
        self._assembler = ObservationAssembler(document.observation)
        self._velocity = linear_velocity(model, self.data) if COMMAND in self._known else None
        self.score = "seconds upright" if self._velocity is None else "seconds on command"
        self.observation_dims = {"policy": document.observation.width}
        self.action_dim = document.action.width
        self.action_low, self.action_high = np.array(document.action.box.low), np.array(document.action.box.high)
        self.max_episode_steps: int | None = max(1, round(seconds / self.period))
        self.description = f"mujoco {mujoco.__version__}, {self._substeps} steps of {model.opt.timestep} s per action"
        self._root, self._done, self._pending = root_body(model), False, np.zeros((1, self.action_dim), np.float32)

    def reset(self) -> Observation:
        """Start the next episode: keyframe ``home``, else the reference pose, with a little noise."""
        self._episode += 1
        self._done = False
        key_frame = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_KEY, "home")
        self._dynamics.perturb(self._perturbation, key("push", self._seed, self._episode))
        if key_frame < 0:
            mujoco.mj_resetData(self.model, self.data)
        else:
            mujoco.mj_resetDataKeyframe(self.model, self.data, key_frame)
        noise = np.random.Generator(np.random.Philox(key("start", self._seed, self._episode)))
        simple = np.isin(self.model.jnt_type, [int(mujoco.mjtJoint.mjJNT_HINGE), int(mujoco.mjtJoint.mjJNT_SLIDE)])
        columns = self.model.jnt_qposadr[simple]
        self.data.qpos[columns] += noise.uniform(-START_NOISE, START_NOISE, len(columns))
        self.data.qvel[:] += noise.uniform(-START_NOISE, START_NOISE, self.model.nv)
        mujoco.mj_forward(self.model, self.data)
        self._step, self._actions = 0, np.zeros(self.action_dim)
        self._up, self._height = self.data.xmat[self._root, 6:].copy(), float(self.data.xpos[self._root, 2])
        self._assembler.reset()
        return self._observe()

    def send(self, actions: NDArray[np.float32]) -> None:
        """Check ``actions`` ((1, A), in [-1, 1]); see `VectorEnv.send`."""
        check_actions(actions, 1, self.action_dim)
        self._pending = actions

    def receive(self) -> Step:
        """Simulate one control period; the step after an episode's end starts the next one."""
        none = np.zeros(1, np.bool_)
        if self._done:
            return Step(self.reset(), np.zeros(1, np.float32), none, none, {})
        box = self._document.action.box
        self._actions = np.clip(np.asarray(box.scale) * self._pending[0] + np.asarray(box.offset), box.low, box.high)
        self.data.ctrl[self._actuators] = decode(self._document, self._actions)
        self._dynamics.push(self._step)
        mujoco.mj_step(self.model, self.data, nstep=self._substeps)
        mujoco.mj_rnePostConstraint(self.model, self.data)  # what cfrc_ext needs
        self._step += 1
        fallen = self._has_fallen()
        late = self._step == self.max_episode_steps
        self._done = fallen or late
        return Step(
            self._observe(),
            np.array([self._reward()], np.float32),
            np.array([fallen]),
            np.array([late and not fallen]),
            {},
        )

    def close(self) -> None:
        """Nothing to release: MuJoCo frees its own memory."""

    @contextmanager
    def camera(self, size: tuple[int, int] = (480, 368)) -> Iterator[Scene]:
        """What `rlplastic.video.record_with` films: this robot, followed by the first camera that tracks, if any."""
        view, modes = self.model.vis.global_, mujoco.mjtCamLight
        view.offwidth, view.offheight = max(view.offwidth, size[0]), max(view.offheight, size[1])
        tracking = np.isin(self.model.cam_mode, [int(modes.mjCAMLIGHT_TRACK), int(modes.mjCAMLIGHT_TRACKCOM)])
        camera: Any = int(np.argmax(tracking)) if tracking.any() else self._follower()
        renderer = mujoco.Renderer(self.model, size[1], size[0])

        def draw() -> Frame:
            renderer.update_scene(self.data, camera)
            frame: Frame = renderer.render()
            return frame

        try:
            yield self, draw, self.period
        finally:
            renderer.close()

    def _follower(self) -> _Mujoco:
        """A free camera that keeps the root body in its middle."""
        camera = mujoco.MjvCamera()
        mujoco.mjv_defaultFreeCamera(self.model, camera)
        camera.type, camera.trackbodyid = mujoco.mjtCamera.mjCAMERA_TRACKING, self._root
        return camera

    def _observe(self) -> Observation:
        values = {name: read() for name, read in self._readers.items()}
        known = {LAST_ACTION: self._actions, COMMAND: self._command}
        return {"policy": self._assembler(values | {name: known[name] for name in self._known})}

    def _reward(self) -> float:
        if self._velocity is None:
            return self.period
        error = self._velocity()[:2] - self._command[:2]
        return self.period * float(np.exp(-(error @ error) / TRACKING))

    def _has_fallen(self) -> bool:
        upright = float(self.data.xmat[self._root, 6:] @ self._up)
        sunk = self._height > 0 and float(self.data.xpos[self._root, 2]) < FALLEN_HEIGHT * self._height
        return upright < FALLEN_COSINE or sunk


def _timing(document: Document, model: _Mujoco) -> tuple[float, int]:
    """The control period in seconds, and the model's steps in it."""
    if document.timing is None:
        raise ConfigurationError(
            "the policy's document has no timing, so nobody knows how often it has to act; expected a policy of a task "
            "with a MuJoCo model: play it with env="
        )
    period, step = document.timing.policy_step, float(model.opt.timestep)
    count = round(period / step)
    if count < 1 or abs(count * step - period) > 1e-9:
        raise ConfigurationError(
            f"the policy acts every {period:g} s, which is no multiple of the model's timestep of {step:g} s; expected "
            "one that divides it: change <option timestep> in the MJCF"
        )
    return period, count


def _actuators(document: Document, model: _Mujoco) -> NDArray[np.int64]:
    """Which actuator of the model each output drives: by the document's names, never by order."""
    known = model_facts.actuator_names(model)
    if not document.action.names:
        raise ConfigurationError(
            "the policy's document names no actuators, so nobody knows what its outputs drive; expected a policy of a "
            "task with a MuJoCo model: play it with env="
        )
    for name in document.action.names:
        if name not in known:
            raise ConfigurationError(
                f"the model has no actuator {name!r}, which the policy drives; {nearest(name, known)}"
            )
    return np.array([known.index(name) for name in document.action.names])

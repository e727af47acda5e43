"""Observation terms that can be read from plain MuJoCo, by the names that an exported policy's document gives them.

===================  ==============================================================================================
term                 value
===================  ==============================================================================================
joint_positions      ``qpos`` of the joints that the term names (absolute: the document's offset makes them relative)
joint_velocities     ``qvel`` of the joints that the term names
angular_velocity     the model's gyro, rad/s in the frame of its site; without one the root body's, in its own
linear_velocity      the model's velocimeter, m/s in the frame of its site; without one the root body's, in its own
gravity              the direction of gravity, of length 1, in the frame of the gyro's site, else of the root body
last_action          the outputs ``actions`` of the step before
command              the velocities asked for: forward m/s, sideways m/s, turning rad/s
qpos, qvel           the last columns of ``qpos``; all of ``qvel``
cinert, cvel         MuJoCo's of all bodies but the world (gymnasium's Humanoid)
qfrc_actuator        the last columns of MuJoCo's: generalised forces of the actuators
cfrc_ext             MuJoCo's of all bodies but the world: external forces, contacts included
===================  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import mujoco
import numpy as np
from numpy.typing import NDArray

from rlplastic.deploy.control import LAST_ACTION
from rlplastic.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from rlplastic.deploy.document import ObservationTerm

Vector = NDArray[np.float64]
_Mujoco: TypeAlias = Any  # mujoco has no types
Reader = Callable[[], Vector]
COMMAND = "command"
FROM_RUNNER = (LAST_ACTION, COMMAND)
"""Terms that the loop itself knows."""


def readers(model: _Mujoco, data: _Mujoco, terms: tuple[ObservationTerm, ...]) -> dict[str, Reader]:
    """A function for each term that reads its value from ``data``; those of `FROM_RUNNER` are left out.

    Raises:
        ConfigurationError: a term is not in the table, the model lacks a joint that it names, or its width differs.
    """
    made: dict[str, Reader] = {}
    for term in terms:
        if term.name in FROM_RUNNER:
            continue
        if term.name not in _SOURCES:
            raise ConfigurationError(
                f"the policy reads the term {term.name!r}, which mjcf= cannot measure; play it with env=, or choose a "
                f"policy of these terms: {nearest('', (*_SOURCES, *FROM_RUNNER))}"
            )
        read = _SOURCES[term.name](model, data, term)
        width = len(read())
        if width != term.width:
            raise ConfigurationError(
                f"the model gives {width} numbers for the term {term.name!r} where the policy was trained with "
                f"{term.width}; expected the MJCF of the same robot"
            )
        made[term.name] = read
    return made


def root_body(model: _Mujoco) -> int:
    """The body that the first joint moves; the world's where nothing moves."""
    return int(model.jnt_bodyid[0]) if model.njnt else 0


def _joints(model: _Mujoco, term: ObservationTerm) -> list[int]:
    known = [model.joint(index).name for index in range(model.njnt)]
    missing = [name for name in term.elements if name not in known]
    if missing or not term.elements:
        what = f"has no joint {missing[0]!r}; {nearest(missing[0], known)}" if missing else "is not asked for joints"
        raise ConfigurationError(f"the term {term.name!r} cannot be read: the model {what}")
    return [known.index(name) for name in term.elements]


def _joint_positions(model: _Mujoco, data: _Mujoco, term: ObservationTerm) -> Reader:
    columns = model.jnt_qposadr[_joints(model, term)]
    return lambda: data.qpos[columns].copy()


def _joint_velocities(model: _Mujoco, data: _Mujoco, term: ObservationTerm) -> Reader:
    columns = model.jnt_dofadr[_joints(model, term)]
    return lambda: data.qvel[columns].copy()


def _sensor(model: _Mujoco, kind: int) -> int | None:
    found = np.flatnonzero(model.sensor_type == kind)
    return int(found[0]) if found.size else None


def linear_velocity(model: _Mujoco, data: _Mujoco) -> Reader:
    """The velocimeter, else the root body's velocity, in its own frame."""
    return _measured(model, data, int(mujoco.mjtSensor.mjSENS_VELOCIMETER), 3)


def _measured(model: _Mujoco, data: _Mujoco, kind: int, first: int) -> Reader:
    """A sensor of three axes, else the root body's velocity: rotation from entry 0, translation from entry 3."""
    sensor = _sensor(model, kind)
    if sensor is not None:
        start = int(model.sensor_adr[sensor])
        return lambda: data.sensordata[start : start + 3].copy()
    body = root_body(model)

    def velocity() -> Vector:
        both = np.zeros(6)
        mujoco.mj_objectVelocity(model, data, mujoco.mjtObj.mjOBJ_XBODY, body, both, 1)
        return both[first : first + 3]

    return velocity


def _gravity(model: _Mujoco, data: _Mujoco, term: ObservationTerm) -> Reader:
    gyro, body = _sensor(model, int(mujoco.mjtSensor.mjSENS_GYRO)), root_body(model)
    site = None if gyro is None else int(model.sensor_objid[gyro])
    down = np.array([0.0, 0.0, -1.0])

    def direction() -> Vector:
        axes = data.xmat[body] if site is None else data.site_xmat[site]
        turned: Vector = axes.reshape(3, 3).T @ down
        return turned

    return direction


def _last_columns(field: str, skipped_bodies: int = 0) -> Callable[[_Mujoco, _Mujoco, ObservationTerm], Reader]:
    def source(model: _Mujoco, data: _Mujoco, term: ObservationTerm) -> Reader:
        return lambda: getattr(data, field)[skipped_bodies:].reshape(-1)[-term.width :].copy()

    return source


_SOURCES: dict[str, Callable[[_Mujoco, _Mujoco, ObservationTerm], Reader]] = {
    "joint_positions": _joint_positions,
    "joint_velocities": _joint_velocities,
    "angular_velocity": lambda model, data, _: _measured(model, data, int(mujoco.mjtSensor.mjSENS_GYRO), 0),
    "linear_velocity": lambda model, data, _: linear_velocity(model, data),
    "gravity": _gravity,
    "qpos": _last_columns("qpos"),
    "qvel": _last_columns("qvel"),
    "cinert": _last_columns("cinert", 1),
    "cvel": _last_columns("cvel", 1),
    "qfrc_actuator": _last_columns("qfrc_actuator"),
    "cfrc_ext": _last_columns("cfrc_ext", 1),
}

"""What an MJCF model says about actuators and joints, as the compiled model has it (MuJoCo, "XML reference").

Gains are read from the actuators' parameters, not from the XML's attributes, so that classes, defaults and damping
ratios are resolved. A servo's force is gain * ctrl + bias: for a position servo gain = kp, bias = -kp q - kd q'.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import mujoco
import numpy as np
from numpy.typing import NDArray

from rlplastic.deploy.document import Action, Joint, Kind

Model: TypeAlias = Any  # mujoco.MjModel; the package has no types

_FREE = ("x", "y", "z", "qw", "qx", "qy", "qz"), ("vx", "vy", "vz", "wx", "wy", "wz")
_BALL = ("qw", "qx", "qy", "qz"), ("wx", "wy", "wz")


def actuator_names(model: Model) -> tuple[str, ...]:
    """In the order of ``ctrl``; an actuator without a name has that of its joint, else its number."""
    joints = driven_joints(model)
    return tuple(model.actuator(i).name or joints[i] or f"actuator_{i}" for i in range(model.nu))


def driven_joints(model: Model) -> tuple[str | None, ...]:
    """The hinge or slide that each actuator drives; None for tendons, sites, bodies and joints with more axes."""
    names: list[str | None] = []
    for i in range(model.nu):
        on_joint = model.actuator_trntype[i] == mujoco.mjtTrn.mjTRN_JOINT
        joint = model.actuator_trnid[i, 0]
        names.append(joint_name(model, joint) if on_joint and _is_simple(model, joint) else None)
    return tuple(names)


def joint_name(model: Model, joint: int) -> str:
    """A joint's name, else its number."""
    return model.joint(joint).name or f"joint_{joint}"


def kinds(model: Model) -> tuple[Kind, ...]:
    """What each actuator's command is; `other` for muscles, filters, geared servos and whatever else there is."""
    return tuple(_kind(model, i) for i in range(model.nu))


def _kind(model: Model, i: int) -> Kind:
    fixed = model.actuator_gaintype[i] == mujoco.mjtGain.mjGAIN_FIXED
    if not fixed or model.actuator_dyntype[i] != mujoco.mjtDyn.mjDYN_NONE:
        return "other"
    gain, (constant, on_position, on_velocity) = model.actuator_gainprm[i, 0], model.actuator_biasprm[i, :3]
    if model.actuator_biastype[i] == mujoco.mjtBias.mjBIAS_NONE:
        return "torque" if gain == 1 else "other"
    if model.actuator_biastype[i] != mujoco.mjtBias.mjBIAS_AFFINE or constant or model.actuator_gear[i, 0] != 1:
        return "other"
    if on_position == -gain:
        return "position"
    return "velocity" if on_position == 0 and on_velocity == -gain else "other"


def joints(model: Model) -> tuple[Joint, ...]:
    """Every hinge and slide, in the model's order."""
    driven, kind, home = driven_joints(model), kinds(model), home_position(model)
    found = []
    for number in (j for j in range(model.njnt) if _is_simple(model, j)):
        name, dof = joint_name(model, number), model.jnt_dofadr[number]
        output = driven.index(name) if driven.count(name) == 1 else None
        limited = bool(model.jnt_limited[number])
        servo = None if output is None or kind[output] not in ("position", "velocity") else output
        found.append(
            Joint(
                name=name,
                default_position=float(home[model.jnt_qposadr[number]]),
                output=output,
                kp=float(model.actuator_gainprm[servo, 0]) if servo is not None and kind[servo] == "position" else None,
                kd=None if servo is None else float(0.0 - model.actuator_biasprm[servo, 2]),
                damping=float(model.dof_damping[dof]),
                friction=float(model.dof_frictionloss[dof]),
                armature=float(model.dof_armature[dof]),
                lower=float(model.jnt_range[number, 0]) if limited else None,
                upper=float(model.jnt_range[number, 1]) if limited else None,
                effort=_effort(model, number, output),
            )
        )
    return tuple(found)


def _effort(model: Model, joint: int, output: int | None) -> tuple[float, float] | None:
    """Limits of the force on a joint: of the actuator, of the joint, of a torque command; the tightest."""
    limits: list[NDArray[np.float64]] = []
    if output is not None:
        gear = model.actuator_gear[output, 0]
        if model.actuator_forcelimited[output]:
            limits.append(np.sort(model.actuator_forcerange[output] * gear))
        if model.actuator_ctrllimited[output] and _kind(model, output) == "torque":
            limits.append(np.sort(model.actuator_ctrlrange[output] * gear))
    if model.jnt_actfrclimited[joint]:
        limits.append(model.jnt_actfrcrange[joint])
    if not limits:
        return None
    return float(max(low for low, _ in limits)), float(min(high for _, high in limits))


def home_position(model: Model) -> NDArray[np.float64]:
    """(nq,) of the keyframe ``home``, else the reference pose."""
    key = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_KEY, "home")
    position: NDArray[np.float64] = model.qpos0 if key < 0 else model.key_qpos[key]
    return position


def position_names(model: Model) -> tuple[str, ...]:
    """A name for every element of ``qpos``: the joint's, with the axis where it has several."""
    return _element_names(model, 0)


def velocity_names(model: Model) -> tuple[str, ...]:
    """A name for every element of ``qvel``."""
    return _element_names(model, 1)


def _element_names(model: Model, which: int) -> tuple[str, ...]:
    names: list[str] = []
    for number in range(model.njnt):
        name = joint_name(model, number)
        if _is_simple(model, number):
            names.append(name)
        else:
            axes = _FREE if model.jnt_type[number] == mujoco.mjtJoint.mjJNT_FREE else _BALL
            names += [f"{name}.{axis}" for axis in axes[which]]
    return tuple(names)


def has_quaternions(model: Model) -> bool:
    """Whether a joint turns about more than one axis; MuJoCo's quaternions are (w, x, y, z)."""
    return not all(_is_simple(model, joint) for joint in range(model.njnt))


def _is_simple(model: Model, joint: int) -> bool:
    return int(model.jnt_type[joint]) in (mujoco.mjtJoint.mjJNT_HINGE, mujoco.mjtJoint.mjJNT_SLIDE)


@dataclass(frozen=True)
class Pose:
    """Positions and velocities of joints by name; what is not named is at home and at rest."""

    position: Mapping[str, float]
    velocity: Mapping[str, float]


def responses(
    model: Model, action: Action, decimation: int, raw: float, pose: Pose, contacts: bool
) -> NDArray[np.float64]:
    """How far each driven joint moves in one policy step when one output is ``raw`` instead of 0.

    (A, A), outputs by joints, both in the order of ``action``, whose names are thereby proven or refuted. ``contacts``:
    whether bodies touch each other and the ground, which is where it is at home.
    """
    model = copy.deepcopy(model)
    if not contacts:
        model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_CONTACT
    names = actuator_names(model)
    order = [names.index(name) for name in action.names]
    driven = [model.actuator_trnid[i, 0] for i in order]

    def position(raw_action: NDArray[np.float64]) -> NDArray[np.float64]:
        data = mujoco.MjData(model)
        data.qpos[:] = home_position(model)
        for index, name in enumerate(position_names(model)):
            data.qpos[index] = pose.position.get(name, data.qpos[index])
        for index, name in enumerate(velocity_names(model)):
            data.qvel[index] = pose.velocity.get(name, 0.0)
        command = raw_action
        for step in (action.box, action.target):
            if step is not None:
                command = np.clip(np.asarray(step.scale) * command + np.asarray(step.offset), step.low, step.high)
        data.ctrl[order] = command
        mujoco.mj_step(model, data, decimation)
        moved: NDArray[np.float64] = data.qpos[model.jnt_qposadr[driven]]
        return moved

    still = position(np.zeros(len(order)))
    return np.stack([position(row) - still for row in raw * np.eye(len(order))])

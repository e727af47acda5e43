"""What a policy's inputs and outputs mean in its task: read from the task's package, its options and its MJCF.

Where facts come from:

==============  ======================================================  =========================================
family          model                                                   observation terms
==============  ======================================================  =========================================
mujoco          the file that envpool loads; gymnasium's own instance   gymnasium's ``observation_structure`` (v5)
dmc             the file that envpool loads                             the task's dictionary
playground      the scene that the task loads (G1 and Go1, joystick)    `_JOYSTICK`, proven on the running task
others          none                                                    the task's dictionary, or one term
==============  ======================================================  =========================================

What is missing is listed in ``absent`` with its reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlplastic.config import EnvConfig
from rlplastic.deploy.document import Action, AffineMap, CommandRange, Joint, Observation, ObservationTerm, Timing
from rlplastic.envs import VectorEnv, make_envs
from rlplastic.errors import EnvironmentContractError
from rlplastic.exporting import model_facts
from rlplastic.exporting.model_facts import Model

_LOCOMOTION = "mujoco/playground/assets/mujoco_playground/_src/locomotion"
_SCENES = {
    "G1JoystickFlatTerrain": f"{_LOCOMOTION}/g1/xmls/scene_mjx_feetonly_flat_terrain.xml",
    "G1JoystickRoughTerrain": f"{_LOCOMOTION}/g1/xmls/scene_mjx_feetonly_rough_terrain.xml",
    "Go1JoystickFlatTerrain": f"{_LOCOMOTION}/go1/xmls/scene_mjx_feetonly_flat_terrain.xml",
    "Go1JoystickRoughTerrain": f"{_LOCOMOTION}/go1/xmls/scene_mjx_feetonly_rough_terrain.xml",
}
_MOTION = ("linear_velocity", "angular_velocity", "gravity")
_OF_JOINTS = ("joint_positions", "joint_velocities", "last_action")
_JOYSTICK = {
    "G1": (*_MOTION, "command", *_OF_JOINTS, "gait_phase"),
    "Go1": (*_MOTION, *_OF_JOINTS, "command"),
}
"""Terms of ``state``, as MuJoCo Playground's joystick tasks concatenate them."""
POSITIONS = ("qpos", "position", "joint_angles", "joint_positions")
VELOCITIES = ("qvel", "velocity", "joint_velocities")
"""Terms whose elements, where they are named, are positions and velocities of joints."""
_CLIPPED_VELOCITIES = {"Hopper-v5": (-10.0, 10.0), "Walker2d-v5": (-10.0, 10.0)}
"""What gymnasium's tasks write into their code; its Ant has the range of contact forces as an attribute."""
_ELEMENTS: dict[str, tuple[str, ...]] = {
    "linear_velocity": ("x", "y", "z"),
    "angular_velocity": ("x", "y", "z"),
    "gravity": ("x", "y", "z"),
    "command": ("lin_vel_x", "lin_vel_y", "ang_vel_yaw"),
    "gait_phase": ("cos_left", "cos_right", "sin_left", "sin_right"),
}


@dataclass(frozen=True)
class TaskFacts:
    """The parts of a document that follow from the task."""

    backend: str
    """The backend, its version, and its own name of the task."""
    observation: Observation
    action: Action
    joints: tuple[Joint, ...] = ()
    timing: Timing | None = None
    has_quaternions: bool = False
    commands: tuple[CommandRange, ...] = ()
    absent: dict[str, str] = field(default_factory=dict)
    model: Model | None = None
    model_file: str | None = None
    model_sha256: str | None = None


@dataclass(frozen=True)
class _Source:
    """The model of a task, and the task's options."""

    model: Model
    file: Path
    base: Path
    decimation: int
    options: Any


def task_facts(env: EnvConfig) -> TaskFacts:
    """Everything that can be known of a task, read anew from one of its environments.

    Raises:
        ConfigurationError: unknown backend, family, task or option.
        EnvironmentContractError: the task breaks the contract of `rlplastic.envs.base`.
    """
    envs = make_envs(env, seed=0, role="eval", num_envs=1)
    try:
        return _facts(env, envs)
    finally:
        envs.close()


def _facts(env: EnvConfig, envs: VectorEnv) -> TaskFacts:
    box = AffineMap(
        scale=tuple(((envs.action_high - envs.action_low) / 2).tolist()),
        offset=tuple(((envs.action_high + envs.action_low) / 2).tolist()),
        low=tuple(envs.action_low.tolist()),
        high=tuple(envs.action_high.tolist()),
        already_applied=True,
    )
    source = _source(env)
    observation, refined = _observation(env, envs, None if isinstance(source, str) else source)
    absent = {} if refined else {"observation.terms": "the task's package names no parts of its observation"}
    facts = TaskFacts(envs.description.partition(", ")[0], observation, Action(envs.action_dim, box), absent=absent)
    if isinstance(source, str):
        model = dict.fromkeys(("action.names", "joints", "timing", "quaternion_order"), source)
        return replace(facts, absent=absent | model)
    if source.model.nu != envs.action_dim:
        reason = f"{source.file.name} has {source.model.nu} actuators, so the task changes it before it runs"
        return replace(facts, absent=absent | dict.fromkeys(("action.names", "joints", "timing"), reason))
    return _with_model(facts, env, source)


def _with_model(facts: TaskFacts, env: EnvConfig, source: _Source) -> TaskFacts:
    model = source.model
    action = replace(
        facts.action,
        names=model_facts.actuator_names(model),
        joints=model_facts.driven_joints(model),
        kind=model_facts.kinds(model),
        gear=tuple(model.actuator_gear[:, 0].tolist()),
        target=_target(source) if env.task in _SCENES else None,
    )
    step = float(model.opt.timestep)
    return replace(
        facts,
        action=action,
        joints=model_facts.joints(model),
        timing=Timing(step, source.decimation, source.decimation * step),
        has_quaternions=model_facts.has_quaternions(model),
        commands=_commands(source.options),
        model=model,
        model_file=str(source.file.relative_to(source.base)),
        model_sha256=hashlib.sha256(source.file.read_bytes()).hexdigest(),
    )


def without_noise(env: EnvConfig) -> EnvConfig:
    """The task whose sensors are exact, where it has the option."""
    return replace(env, kwargs={**env.kwargs, "noise_level": 0.0}) if env.task in _SCENES else env


def _source(env: EnvConfig) -> _Source | str:
    """Model and options of a task, or why there is no model."""
    if env.backend == "gymnasium":
        return _gymnasium_source(env)
    if env.backend == "torch":
        return "a simulator in torch gives no MuJoCo model away"
    import envpool

    from rlplastic.envs.catalogue import resolve

    options = envpool.make_spec(resolve(env.family, env.task), **env.kwargs).config
    base = Path(options.base_path)
    if env.family == "mujoco":
        folder = base / "mujoco" / "assets_gym"
        own = folder / options.xml_file.replace(".xml", "_envpool.xml")  # which envpool loads where there is one
        file = own if own.exists() else folder / options.xml_file
    elif env.family == "dmc":
        file = base / "mujoco" / "assets_dmc" / f"{env.task.partition('-')[0]}.xml"
    elif env.task in _SCENES:
        file = base / _SCENES[env.task]
    else:
        return f"no model file is known for tasks like {env.task}"
    if not file.exists():
        return f"{file.name} is not among the files that the task's package installs"
    model = _compiled(file)
    if isinstance(model, str):
        return model
    if env.task not in _SCENES:
        return _Source(model, file, base.parent, int(options.frame_skip), options)
    model.opt.timestep = options.sim_dt
    if "kp" in options._fields:  # Go1's task writes its gains over the model's
        model.actuator_gainprm[:, 0], model.actuator_biasprm[:, 1] = options.kp, -options.kp
        model.dof_damping[6:] = options.kd
    return _Source(model, file, base.parent, round(options.ctrl_dt / options.sim_dt), options)


def _compiled(file: Path) -> Model | str:
    import mujoco

    try:
        return mujoco.MjModel.from_xml_path(str(file))
    except ValueError as error:  # a file that the task completes before it loads it
        return f"{file.name} does not compile as it is installed ({' '.join(str(error).split())[:80]})"


def _gymnasium_source(env: EnvConfig) -> _Source | str:
    """From an instance of the environment: whatever it runs is what it is."""
    import gymnasium

    from rlplastic.envs.gymnasium_adapter import make_env

    instance: Any = make_env(env.task, dict(env.kwargs))
    try:
        bare = instance.unwrapped
        if not hasattr(bare, "model") or not hasattr(bare, "frame_skip") or not hasattr(bare, "fullpath"):
            return f"{env.task} has no MuJoCo model"
        file = Path(bare.fullpath)
        base = Path(gymnasium.__file__).parents[1]
        return _Source(bare.model, file, base if file.is_relative_to(base) else file.parent, bare.frame_skip, None)
    finally:
        instance.close()


def _observation(env: EnvConfig, envs: VectorEnv, source: _Source | None) -> tuple[Observation, bool]:
    """Terms of the group ``policy``, and whether the task or its package names them."""
    width = envs.observation_dims["policy"]
    stacked = int(getattr(source.options, "frame_stack", 1)) if source is not None else 1
    whole = {"policy": [("observation", slice(0, width))]}
    declared: Sequence[tuple[str, slice]] = getattr(envs, "terms", whole)["policy"]
    if len(declared) == 1:
        parts = _parts(env, source, width // stacked)
        if parts:
            return Observation(width, _laid_out(parts), frames=stacked), True
    sizes = [(name, (columns.stop - columns.start) // stacked) for name, columns in declared]
    model = None if source is None else source.model
    terms = _laid_out([_plain(name, size, _elements(name, size, model)) for name, size in sizes], history=stacked)
    return Observation(width, terms), len(declared) > 1


def _elements(name: str, size: int, model: Model | None) -> tuple[str, ...]:
    """Joints behind dm_control's terms of that name, all in the model's order."""
    if model is None:
        return ()
    angles = tuple(joint.name for joint in model_facts.joints(model))
    positions = model_facts.position_names(model)
    found = {
        "joint_angles": angles,
        "position": positions[1:] if size == len(positions) - 1 else positions,  # planar robots hide where they are
        "velocity": model_facts.velocity_names(model),
    }.get(name, ())
    return found if len(found) == size else ()


def _parts(env: EnvConfig, source: _Source | None, width: int) -> list[ObservationTerm]:
    """The parts of an observation that is one array, from its package; none where it does not name them."""
    if source is None:
        return []
    if env.task in _SCENES:
        return _joystick_parts(env, source)
    of_gymnasium = env.backend == "gymnasium"
    if env.family not in ("mujoco", "gymnasium") or (not of_gymnasium and env.kwargs.keys() - {"frame_stack"}):
        return []
    from rlplastic.envs.gymnasium_adapter import make_env

    try:
        instance: Any = make_env(env.task, dict(env.kwargs) if of_gymnasium else {})
    except EnvironmentContractError:
        return []
    bare = instance.unwrapped
    structure = dict(getattr(bare, "observation_structure", None) or {})
    instance.close()
    skipped = structure.pop("skipped_qpos", 0)
    if sum(structure.values()) != width:
        return []
    names = {
        "qpos": model_facts.position_names(source.model)[skipped:],
        "qvel": model_facts.velocity_names(source.model),
    }
    clips = {"qvel": _CLIPPED_VELOCITIES.get(env.task), "cfrc_ext": getattr(bare, "_contact_force_range", None)}
    terms = [_plain(name, size, names.get(name, ())) for name, size in structure.items() if size]
    return [replace(term, clip=clips.get(term.name)) for term in terms]


def _joystick_parts(env: EnvConfig, source: _Source) -> list[ObservationTerm]:
    driven = [joint for joint in model_facts.joints(source.model) if joint.output is not None]
    names = tuple(joint.name for joint in driven)
    terms = []
    for name in _JOYSTICK[env.task.partition("Joystick")[0]]:
        elements = _ELEMENTS.get(name, names)
        term = _plain(name, len(elements), elements)
        if name == "joint_positions":
            term = replace(term, offset=tuple(0.0 - joint.default_position for joint in driven))
        if name == "last_action":
            # the task observes before it notes the action that it was given
            term = replace(term, elements=model_facts.actuator_names(source.model), delay=1)
        terms.append(term)
    return terms


def _plain(name: str, size: int, elements: tuple[str, ...] = ()) -> ObservationTerm:
    return ObservationTerm(name, 0, size, scale=(1.0,) * size, offset=(0.0,) * size, elements=elements)


def _laid_out(terms: Sequence[ObservationTerm], history: int = 1) -> tuple[ObservationTerm, ...]:
    """The terms one after the other, each with its history."""
    laid, at = [], 0
    for term in terms:
        laid.append(replace(term, start=at, stop=at + history * term.stop, history=history))
        at = laid[-1].stop
    return tuple(laid)


def _target(source: _Source) -> AffineMap:
    """Joystick tasks command position servos: home position + action_scale * action, within the actuators' ranges."""
    model, width = source.model, source.model.nu
    defaults = {joint.name: joint.default_position for joint in model_facts.joints(model)}
    return AffineMap(
        scale=(float(source.options.action_scale),) * width,
        offset=tuple(defaults[str(name)] for name in model_facts.driven_joints(model)),
        low=tuple(model.actuator_ctrlrange[:, 0].tolist()),
        high=tuple(model.actuator_ctrlrange[:, 1].tolist()),
        already_applied=False,
    )


def _commands(options: Any) -> tuple[CommandRange, ...]:  # noqa: ANN401 - a generated named tuple
    """Ranges of joystick commands: by name (G1), or the largest magnitude of each (Go1)."""
    ranges = []
    for index, name in enumerate(_ELEMENTS["command"]):
        if hasattr(options, f"{name}_min"):
            ranges.append(CommandRange(name, getattr(options, f"{name}_min"), getattr(options, f"{name}_max")))
        elif hasattr(options, f"command_a{index}"):
            most = getattr(options, f"command_a{index}")
            ranges.append(CommandRange(name, -most, most))
    return tuple(ranges)

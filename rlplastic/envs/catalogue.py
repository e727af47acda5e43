"""Task names: from a family's own spelling to envpool's id, and the observation terms that dm_control declares.

Families and their spelling: ``mujoco`` and ``classic`` as in gymnasium (`Ant-v5`), ``dmc`` as in dm_control
(`humanoid-run`), ``playground`` as in MuJoCo Playground (`G1JoystickFlatTerrain`), ``metaworld`` as in Meta-World
(`reach-v3`), ``myosuite`` as in MyoSuite (`myoElbowPose1D6MRandom-v0`). A task of the family ``torch`` is a factory,
`module:function` (see `rlplastic.envs.torch_adapter`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from rlplastic.errors import ConfigurationError, nearest

_MUJOCO = (
    "Ant",
    "HalfCheetah",
    "Hopper",
    "Humanoid",
    "HumanoidStandup",
    "InvertedDoublePendulum",
    "InvertedPendulum",
    "Pusher",
    "Reacher",
    "Swimmer",
    "Walker2d",
)
_CLASSIC = ("BipedalWalker", "BipedalWalkerHardcore", "LunarLanderContinuous", "MountainCarContinuous", "Pendulum")
_DMC: dict[str, tuple[str, ...]] = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": ("balance", "balance_sparse", "swingup", "swingup_sparse", "three_poles", "two_poles"),
    "cheetah": ("run",),
    "dog": ("fetch", "run", "stand", "trot", "walk"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("swim", "upright"),
    "hopper": ("hop", "stand"),
    "humanoid": ("run", "run_pure_state", "stand", "walk"),
    "humanoid_CMU": ("run", "stand", "walk"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("escape", "fetch", "run", "walk"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer15", "swimmer6"),
    "walker": ("run", "stand", "walk"),
}
_PREFIXES = {"playground": "MuJoCoPlayground/", "metaworld": "MetaWorld/", "myosuite": "MyoSuite/"}
EXAMPLES: Mapping[str, str] = {
    "mujoco": "Ant-v5",
    "dmc": "humanoid-run",
    "playground": "G1JoystickFlatTerrain",
    "metaworld": "reach-v3",
    "myosuite": "myoHandPoseFixed-v0",
    "classic": "Pendulum-v1",
    "gymnasium": "HalfCheetah-v5",
    "torch": "examples.torch_pendulum:make",
}
"""One task of every family, told where a family is chosen without a task."""
FAMILIES = tuple(EXAMPLES)

_DOG = (
    "joint_angles",
    "joint_velocites",  # dm_control's own spelling
    "torso_pelvis_height",
    "z_projection",
    "torso_com_velocity",
    "inertial_sensors",
    "foot_forces",
    "touch_sensors",
    "actuator_state",
)
_HUMANOID = ("joint_angles", "head_height", "extremities", "torso_vertical", "com_velocity", "velocity")
_QUADRUPED = ("egocentric_state", "torso_velocity", "torso_upright", "imu", "force_torque")

DECLARED_TERMS: Mapping[str, tuple[str, ...]] = {
    "DogRun-v1": _DOG,
    "DogStand-v1": _DOG,
    "DogTrot-v1": _DOG,
    "DogWalk-v1": _DOG,
    "FingerSpin-v1": ("position", "velocity", "touch"),
    "FishSwim-v1": ("joint_angles", "upright", "target", "velocity"),
    "FishUpright-v1": ("joint_angles", "upright", "velocity"),
    "HumanoidRun-v1": _HUMANOID,
    "HumanoidStand-v1": _HUMANOID,
    "HumanoidWalk-v1": _HUMANOID,
    "HumanoidRunPureState-v1": ("position", "velocity"),
    "QuadrupedEscape-v1": (*_QUADRUPED, "origin", "rangefinder"),
    "QuadrupedFetch-v1": (*_QUADRUPED, "ball_state", "target_position"),
    "QuadrupedRun-v1": _QUADRUPED,
    "QuadrupedWalk-v1": _QUADRUPED,
}
"""What dm_control 1.0.50 declares for the tasks whose envpool dictionary is longer or ordered differently.

One envpool class serves all tasks of a domain, so its dictionary has the terms of all of them; those that the task
does not declare are never filled. Tasks not listed agree with dm_control in names, order and widths.
"""


def tasks(family: str) -> dict[str, str]:
    """Every task of a family: the family's own spelling to envpool's id. ``gymnasium`` lists gymnasium's registry.

    ``torch`` has only our example.

    Raises:
        ConfigurationError: unknown family.
    """
    if family == "dmc":
        return {
            f"{domain}-{task}": _camel(domain) + _camel(task) + "-v1"
            for domain, names in _DMC.items()
            for task in names
        }
    if family == "gymnasium":
        import gymnasium

        return {name: name for name in gymnasium.registry}
    if family == "torch":  # a factory is anybody's: nothing lists them
        return {EXAMPLES["torch"]: EXAMPLES["torch"]}
    if family not in FAMILIES:
        raise ConfigurationError(f"there is no environment family {family!r}; {nearest(family, FAMILIES)}")
    import envpool

    known = envpool.list_all_envs()
    if family in _PREFIXES:
        prefix = _PREFIXES[family]
        return {_spelling(family, name.removeprefix(prefix)): name for name in known if name.startswith(prefix)}
    bases = _MUJOCO if family == "mujoco" else _CLASSIC
    return {name: name for name in known if name.rpartition("-v")[0] in bases}


def resolve(family: str, task: str) -> str:
    """envpool's id of a task (gymnasium's for the family ``gymnasium``).

    Raises:
        ConfigurationError: unknown family or task; names the family that has it, or the nearest spellings.
    """
    known = tasks(family)
    if task in known:
        return known[task]
    if family == "gymnasium" and ":" in task:  # "module:Id-v0" registers on import
        return task
    other = find_family(task)
    hint = f"it belongs to env={other}" if other else nearest(task, known)
    raise ConfigurationError(f"the family {family} has no task {task!r}; {hint}")


def require_task(family: str, task: str) -> None:
    """Refuse a family that was chosen without a task: ``configs/env/<family>.yaml`` leaves it empty.

    Raises:
        ConfigurationError: ``task`` is empty.
    """
    if not task:
        raise ConfigurationError(
            f"env={family} is a family of tasks and none was named; give one, such as "
            f"env.task={EXAMPLES.get(family, 'Ant-v5')}"
        )


def find_family(task: str) -> str | None:
    """The first family that spells a task like this, or None."""
    return next((family for family in FAMILIES if task in tasks(family)), None)


def _camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _spelling(family: str, name: str) -> str:
    """envpool's name without its prefix, spelled as the family's own package does."""
    if family == "playground":
        return name.removesuffix("-v1")
    if family == "metaworld":
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
    return name

"""The gap between one simulator and another, or a robot: seven perturbations, under the same names wherever used.

What changes the signals (`Signals`) works on any task; what changes the dynamics (`Dynamics`) edits a MuJoCo model:

    observation    o'_t = o_{t - observation_delay} + observation_noise * n_t,  n_t ~ N(0, 1)
    action         a'_t = a_{t - action_delay}
    contact        mu' = friction * mu
    inertia        m' = mass * m,  I' = mass * I
    actuators      force' = gain * force
    push           F = push * m g along a drawn horizontal direction, for `PUSH_SECONDS` every `PUSH_EVERY` seconds

The same names are ranges in training (``env.randomise``), one value in a rollout (``perturb`` of rlplastic.play) and
the axes of its sweep. All draws are keyed: nothing is left to save.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlplastic.errors import ConfigurationError
from rlplastic.seeding import key

Array = NDArray[Any]
Model: TypeAlias = Any  # mujoco has no types
PUSH_SECONDS = 0.1
"""How long a push lasts: push=1 changes the speed of a free robot by about 1 m/s."""
PUSH_EVERY = 2.0
"""Seconds of simulation from the beginning of one push to that of the next; the first comes after as long."""
GRAVITY = 9.81
"""m/s^2 by which a robot's weight is reckoned, whatever gravity its model has."""
SCALED_FIELDS: Mapping[str, str] = {
    "geom_friction": "friction",
    "pair_friction": "friction",
    "body_mass": "mass",
    "body_inertia": "mass",
    "actuator_gainprm": "gain",
    "actuator_biasprm": "gain",
}
"""Fields of a MuJoCo model and the factor each is multiplied with.

MuJoCo takes the larger friction of two geoms, so scaling all of them scales every contact. An actuator's force is
gain * control + bias: a position servo keeps its target and becomes stiffer. Limits of forces stay.
"""


@dataclass
class Perturbation:
    """One value of each; the defaults change nothing.

    Raises:
        ConfigurationError: a value is out of range.
    """

    observation_noise: float = 0.0
    """Standard deviation of normal noise on every element of an observation, in its units."""
    observation_delay: int = 0
    """Steps by which observations come late; until then the first one is repeated."""
    action_delay: int = 0
    """Steps by which actions come late; until then the middle of the action Box acts."""
    friction: float = 1.0
    """Factor on all friction coefficients."""
    mass: float = 1.0
    """Factor on all masses and inertias."""
    gain: float = 1.0
    """Factor on the force of every actuator."""
    push: float = 0.0
    """Force of the pushes on the root body, in weights of the robot."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value >= 0) or (field.name == "mass" and value == 0):
                least = "a number above 0" if field.name == "mass" else "a number of 0 or more"
                raise ConfigurationError(f"{field.name}={value} is out of range; expected {least}")

    def changed(self) -> list[str]:
        """Names of what is not neutral."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


NAMES = tuple(field.name for field in fields(Perturbation))
OF_SIGNALS = ("observation_noise", "observation_delay", "action_delay")
OF_DYNAMICS = tuple(name for name in NAMES if name not in OF_SIGNALS)


class Signals:
    """Noise and delays of one episode, between a simulator and its policy.

    Args:
        perturbation: how noisy, how late.
        middle: (A,) the action that acts until the first one arrives.
        seed: of the noise; another for every episode.
    """

    def __init__(self, perturbation: Perturbation, middle: Array, seed: int) -> None:
        self._noise = perturbation.observation_noise
        self._normal = np.random.Generator(np.random.Philox(seed))
        self._observations: deque[Array] = deque(maxlen=perturbation.observation_delay + 1)
        delay = perturbation.action_delay
        self._actions: deque[Array] = deque([middle] * delay, maxlen=delay + 1)

    def observe(self, observation: Array) -> Array:
        """What the policy sees at this step in place of ``observation`` (of any shape, always the same one)."""
        self._observations.append(observation)
        late = self._observations[0]
        if self._noise == 0:
            return late
        return (late + self._noise * self._normal.standard_normal(late.shape)).astype(late.dtype)

    def act(self, action: Array) -> Array:
        """What acts at this step in place of ``action``."""
        self._actions.append(action)
        return self._actions[0]


def scaled(nominal: Mapping[str, Array], perturbation: Perturbation) -> dict[str, Array]:
    """The `SCALED_FIELDS` of a model under a perturbation; with factors of 1 they are ``nominal``, bit for bit."""
    return {name: nominal[name] * getattr(perturbation, factor) for name, factor in SCALED_FIELDS.items()}


class Dynamics:
    """A MuJoCo model and its data, to be perturbed anew as often as needed: every time from the nominal model.

    Args:
        model, data: those that are simulated; edited in place.
        seconds: of one control step.
        gain: whether the actuators' gains will be changed.

    Raises:
        ConfigurationError: ``gain`` is asked for and an actuator's force is not affine in its control (muscles).
    """

    def __init__(self, model: Model, data: Model, seconds: float, gain: bool) -> None:
        self._model, self._data = model, data
        self._nominal = {name: getattr(model, name).copy() for name in SCALED_FIELDS}
        self._scratch: Model = None
        self._perturbation = Perturbation()
        self._seed = 0
        self._root = int(model.jnt_bodyid[0]) if model.njnt else 0
        self._lasts = max(1, round(PUSH_SECONDS / seconds))
        self._period = max(self._lasts + 1, round(PUSH_EVERY / seconds))
        if gain:
            _require_affine_actuators(model)

    def perturb(self, perturbation: Perturbation, seed: int) -> None:
        """Make the model what ``perturbation`` says; call it before the simulation is reset.

        Args:
            perturbation: relative to the nominal model.
            seed: of the directions of pushes; another for every episode.
        """
        for name, values in scaled(self._nominal, perturbation).items():
            getattr(self._model, name)[:] = values
        if perturbation.mass != self._perturbation.mass:
            self._derive()
        self._perturbation, self._seed = perturbation, seed

    def push(self, step: int) -> None:
        """Set the force on the root body for control step ``step`` (0 is an episode's first)."""
        if self._perturbation.push == 0:
            return
        self._data.xfrc_applied[self._root, :3] = self.force(step)

    def force(self, step: int) -> NDArray[np.float64]:
        """(3,) newtons in world axes at a control step."""
        count, phase = divmod(step, self._period)
        if count == 0 or phase >= self._lasts:
            return np.zeros(3)
        weight = float(self._model.body_mass.sum()) * GRAVITY
        angle = 2 * math.pi * fraction("push", self._seed, count)
        newtons = self._perturbation.push * weight
        return np.array([newtons * math.cos(angle), newtons * math.sin(angle), 0.0])

    def _derive(self) -> None:
        """Have MuJoCo compute anew what it derives from masses: inverse weights, subtree masses, statistics."""
        import mujoco

        if self._scratch is None:
            self._scratch = mujoco.MjData(self._model)
        mujoco.mj_setConst(self._model, self._scratch)


def _require_affine_actuators(model: Model) -> None:
    import mujoco

    gains = [int(mujoco.mjtGain.mjGAIN_FIXED), int(mujoco.mjtGain.mjGAIN_AFFINE)]
    biases = [int(mujoco.mjtBias.mjBIAS_NONE), int(mujoco.mjtBias.mjBIAS_AFFINE)]
    if not (np.isin(model.actuator_gaintype, gains).all() and np.isin(model.actuator_biastype, biases).all()):
        raise ConfigurationError(
            "gain cannot scale the actuators of this model; expected motors and servos whose force is affine in the "
            "control: leave gain out"
        )


def fraction(*parts: str | int) -> float:
    """A number in [0, 1) that depends on every part, and on nothing else."""
    return float(key(*parts, bits=53)) / 2.0**53

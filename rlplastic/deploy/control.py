"""A control loop's inside: measurements by name to a row, the policy, and a command that a robot may be given.

    measurements -> assembled row -> policy -> actuator command -> joint limits -> rate limit -> robot
          stale, missing or not finite: ------> the safe command ----------------> rate limit -> robot

Nothing here reads a clock or a sensor: the caller says how old the measurements are. One policy step is one call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlplastic.deploy.document import Document, Observation, ObservationTerm
from rlplastic.deploy.policy import OnnxPolicy, Rows
from rlplastic.errors import ConfigurationError, nearest

Doubles = NDArray[np.float64]
LAST_ACTION = "last_action"
"""The term that the controller fills in by itself, where a policy has it."""


class ObservationAssembler:
    """Values by the names of terms to the policy's row, with their scales, histories and delays.

    Before there is a history, the first value stands in for the older ones, as in a freshly reset task.
    """

    def __init__(self, observation: Observation) -> None:
        self.observation = observation
        self._values: dict[str, deque[Doubles]] = {}
        self._frames: deque[Doubles] = deque()
        self.reset()

    def reset(self) -> None:
        """Forget the history: an episode begins."""
        self._values = {t.name: deque(maxlen=t.history + t.delay) for t in self.observation.terms}
        self._frames = deque(maxlen=self.observation.frames)

    def check(self, values: Mapping[str, ArrayLike]) -> dict[str, Doubles]:
        """The values as float64 arrays, without touching the history.

        Raises:
            ConfigurationError: a term is missing, unknown, or has another number of elements.
        """
        unknown = sorted(values.keys() - self._values.keys())
        if unknown:
            hint = nearest(unknown[0], self._values)
            raise ConfigurationError(f"the policy has no observation term {unknown[0]!r}; {hint}")
        found = {}
        for term in self.observation.terms:
            if term.name not in values:
                raise ConfigurationError(f"the observation term {term.name!r} is missing; expected all of its policy")
            found[term.name] = np.asarray(values[term.name], np.float64).reshape(-1)
            if found[term.name].shape != (term.width,):
                raise ConfigurationError(
                    f"the observation term {term.name!r} has {found[term.name].size} elements; expected {term.width}"
                )
        return found

    def __call__(self, values: Mapping[str, ArrayLike]) -> Rows:
        """The row (1, D) of this policy step; errors as `check`."""
        checked = self.check(values)
        frame = np.concatenate([self._columns(term, checked[term.name]) for term in self.observation.terms])
        row = np.concatenate(_remembered(self._frames, frame, self.observation.order))
        return row.astype(np.float32)[None]

    def _columns(self, term: ObservationTerm, value: Doubles) -> Doubles:
        kept = self._values[term.name]
        seen = _remembered(kept, value, "oldest_first")[: term.history]  # the last ones are too new by the delay
        columns = [np.asarray(term.scale) * one + np.asarray(term.offset) for one in seen]
        if term.order == "newest_first":
            columns.reverse()
        joined = np.concatenate(columns)
        return joined if term.clip is None else np.clip(joined, *term.clip)


def _remembered(kept: deque[Doubles], newest: Doubles, order: str) -> list[Doubles]:
    """All that a memory holds after ``newest`` came in, which fills it if it is the first."""
    kept.append(newest)
    while len(kept) < (kept.maxlen or 0):
        kept.append(newest)
    return list(kept) if order == "oldest_first" else list(reversed(kept))


@dataclass(frozen=True)
class Limits:
    """What the robot may be asked for.

    safe_command: (A,) in the actuators' units, sent whenever the policy cannot be trusted; max_age: seconds after which
    measurements are stale; max_rate: largest change of a command per second, a number or (A,); None: no limit.
    """

    safe_command: ArrayLike
    max_age: float
    max_rate: ArrayLike | None = None


@dataclass(frozen=True)
class Command:
    """command: (A,) for the actuators in the order of outputs; fault: why it is the safe one, or None."""

    command: Doubles
    fault: str | None


class Controller:
    """A policy with a watchdog around it; call `step` once per policy step.

    Args:
        policy: the loaded policy.
        limits: what the robot may be asked for.
        period: seconds between calls; None: the document's policy step.

    Raises:
        ConfigurationError: a limit has the wrong size or is not finite, or no period is known.
    """

    def __init__(self, policy: OnnxPolicy, limits: Limits, period: float | None = None) -> None:
        document = policy.document
        step = document.timing.policy_step if document.timing is not None else None
        if period is None and step is None:
            raise ConfigurationError(
                "the policy's document has no timing; give the period between two calls in seconds"
            )
        self.period = float(period if period is not None else step or 0.0)
        self.policy, self.assembler = policy, ObservationAssembler(document.observation)
        width = policy.action_dim
        self._low, self._high = command_bounds(document)
        self._safe = _vector("safe_command", limits.safe_command, width)
        rate = np.inf if limits.max_rate is None else _vector("max_rate", limits.max_rate, width)
        self._most = np.asarray(rate) * self.period
        self._max_age = limits.max_age
        self._takes_last_action = LAST_ACTION in {term.name for term in document.observation.terms}
        self.reset()

    def reset(self, command: ArrayLike | None = None) -> None:
        """Begin anew from ``command``, what the actuators are at now; None: the safe command."""
        self.assembler.reset()
        self._previous = self._safe if command is None else _vector("command", command, len(self._safe))
        self._last_action: Doubles = np.zeros(len(self._safe))

    def step(self, values: Mapping[str, ArrayLike], age: float) -> Command:
        """The command for measurements (by term) that are ``age`` seconds old; a sensor cannot make it raise."""
        given = {LAST_ACTION: self._last_action, **values} if self._takes_last_action else values
        fault, wanted = self._judge(given, age), self._safe
        if fault is None:
            actions = self.policy.run(self.assembler(given)).actions[0].astype(np.float64)
            if np.isfinite(actions).all():
                self._last_action = actions
                wanted = np.clip(decode(self.policy.document, actions), self._low, self._high)
            else:
                fault = "the policy's output is not finite"
        if fault is not None:
            self.assembler.reset()  # a history with a gap in it is none
        self._previous = self._previous + np.clip(wanted - self._previous, -self._most, self._most)
        return Command(self._previous, fault)

    def _judge(self, values: Mapping[str, ArrayLike], age: float) -> str | None:
        """Why measurements cannot be used; None if they can."""
        if not 0 <= age <= self._max_age:  # NaN is not
            return f"the measurements are {age:g} s old, more than {self._max_age:g} s"
        try:
            checked = self.assembler.check(values)
        except (ConfigurationError, ValueError, TypeError) as error:
            return str(error)
        broken = [name for name, value in checked.items() if not np.isfinite(value).all()]
        return f"{', '.join(broken)}: not finite" if broken else None


def decode(document: Document, actions: Doubles) -> Doubles:
    """Actuators' commands (…, A) from ``actions``: the map that the task applied after the policy, if it has one."""
    target = document.action.target
    if target is None or target.already_applied:
        return actions
    command: Doubles = np.clip(np.asarray(target.scale) * actions + np.asarray(target.offset), target.low, target.high)
    return command


def command_bounds(document: Document) -> tuple[Doubles, Doubles]:
    """Smallest and largest command (A,): the last map's bounds and, for positions, the limits of the driven joints."""
    last = document.action.target or document.action.box
    low, high = np.array(last.low), np.array(last.high)
    joints = {joint.name: joint for joint in document.joints}
    for index, (name, kind) in enumerate(zip(document.action.joints, document.action.kind, strict=False)):
        joint = joints.get(name or "")
        if kind == "position" and joint is not None:
            low[index] = max(low[index], -np.inf if joint.lower is None else joint.lower)
            high[index] = min(high[index], np.inf if joint.upper is None else joint.upper)
    return low, high


def _vector(name: str, value: ArrayLike, width: int) -> Doubles:
    array = np.asarray(value, np.float64)
    if array.shape not in ((), (width,)) or not np.isfinite(array).all():
        raise ConfigurationError(f"{name} is {value!r}; expected a finite number, or {width} of them")
    return np.broadcast_to(array, (width,)).astype(np.float64)

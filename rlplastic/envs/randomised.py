"""A Gymnasium environment that changes: domain randomisation from episode to episode, and a task that switches.

What it changes to is drawn in `rlplastic.envs.changes`. A switch takes hold where an episode begins, so that no
episode, and no transition of the replay, is of two tasks. Nothing here needs to be saved: environments that are rebuilt
and stepped through the same actions change alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from rlplastic.envs.changes import Clock, drawn, drawn_friction, drawn_order
from rlplastic.envs.gymnasium_adapter import make_env
from rlplastic.envs.perturbation import NAMES, OF_DYNAMICS, OF_SIGNALS, Dynamics, Signals
from rlplastic.errors import ConfigurationError
from rlplastic.seeding import key

if TYPE_CHECKING:
    from rlplastic.config import EnvConfig

Array = NDArray[Any]


def make_randomised(config: EnvConfig, kwargs: dict[str, Any], clock: Clock) -> Randomised:
    """One environment of a configuration; for the errors see `make_env` and `Randomised`."""
    return Randomised(make_env(config.task, kwargs), config, clock)


class Randomised(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One environment under ``config.randomise`` and ``config.switch``.

    Raises:
        ConfigurationError: the dynamics are to be changed and the task is no MuJoCo task of gymnasium, or what is to be
            changed of observations or actions is not one flat Box.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], config: EnvConfig, clock: Clock) -> None:
        super().__init__(env)
        self._config, self._clock = config, clock
        self._seed, self._episode, self._steps, self._step = 0, -1, 0, 0
        asked = [name for name in NAMES if getattr(config.randomise, name) is not None]
        switch = config.switch if config.switch_every is not None else None
        if switch == "observations" or any(name in OF_SIGNALS for name in asked):
            _require_flat(env, config.task)
        if switch == "actions":
            _require_equal_bounds(env, config.task)
        box: Any = env.action_space
        self._middle: Array = ((box.low + box.high) / 2).astype(box.dtype)
        self._dynamics: Dynamics | None = None
        if switch == "friction" or any(name in OF_DYNAMICS for name in asked):
            simulation: Any = env.unwrapped
            if not all(hasattr(simulation, name) for name in ("model", "data", "dt")):
                raise ConfigurationError(
                    f"{config.task} has no MuJoCo model whose {', '.join(asked) or switch} could be changed; expected "
                    "a MuJoCo task of gymnasium, such as env=hopper env.backend=gymnasium"
                )
            self._dynamics = Dynamics(simulation.model, simulation.data, float(simulation.dt), "gain" in asked)

    @property
    def task(self) -> int:
        """The number of the task that an episode would have which begins now."""
        every = self._config.switch_every
        return 0 if every is None else (self._clock.transitions + self._steps * self._clock.pace) // every

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Draw the episode's perturbation, and its task; start it."""
        if seed is not None:
            self._seed, self._episode = seed, -1
        self._episode += 1
        self._step = 0
        perturbation = drawn(self._config.randomise, self._seed, self._episode)
        task, sequence = self.task, self._config.switch_seed
        switch = self._config.switch if self._config.switch_every is not None else None
        if switch == "friction":
            perturbation.friction *= drawn_friction(self._config.switch_friction, sequence, task)
        if self._dynamics is not None:
            self._dynamics.perturb(perturbation, key("push", self._seed, self._episode))
        self._signals = Signals(perturbation, self._middle, key("noise", self._seed, self._episode))
        observation, info = self.env.reset(seed=seed, options=options)
        self._sees = drawn_order(switch, sequence, task, len(observation)) if switch == "observations" else None
        self._acts = drawn_order(switch, sequence, task, len(self._middle)) if switch == "actions" else None
        return self._seen(observation), info

    def step(self, action: Array) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One control step of the changed task."""
        action = self._signals.act(action if self._acts is None else action[self._acts])
        if self._dynamics is not None:
            self._dynamics.push(self._step)
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._step += 1
        self._steps += 1
        return self._seen(observation), reward, terminated, truncated, info

    def _seen(self, observation: Any) -> Any:  # noqa: ANN401 - an array, or a dictionary where nothing is changed
        if isinstance(observation, dict):
            return observation
        seen = self._signals.observe(observation)
        return seen if self._sees is None else seen[self._sees]


def _require_flat(env: gymnasium.Env[Any, Any], task: str) -> None:
    space = env.observation_space
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ConfigurationError(
            f"the observations of {task} are {space}; expected one flat Box where noise, delay or another order is "
            "asked for: wrap the environment in gymnasium.wrappers.FlattenObservation"
        )


def _require_equal_bounds(env: gymnasium.Env[Any, Any], task: str) -> None:
    box = env.action_space
    if not isinstance(box, spaces.Box) or np.unique(box.low).size > 1 or np.unique(box.high).size > 1:
        raise ConfigurationError(
            f"the action bounds of {task} differ from element to element; expected equal ones where env.switch=actions "
            "permutes them: choose another switch"
        )

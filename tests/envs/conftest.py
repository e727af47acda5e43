"""A tiny environment whose observation says where it is, so that every autoreset row can be predicted by counting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

LENGTHS = (3, 1, 4, 2)


class CountingEnv(gymnasium.Env[Any, np.ndarray]):
    """Observation (episode, step, first action entry); episode k of seed s lasts LENGTHS[(s + k) % 4] steps.

    Even episodes terminate, odd ones are truncated; the reward is 100 * episode + step.
    """

    def __init__(self, form: str = "box") -> None:
        self.form = form
        self.action_space = spaces.Box(np.array([-2, 0], np.float32), np.array([4, 1], np.float32))
        box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        if form == "dict":
            self.observation_space: spaces.Space[Any] = spaces.Dict(
                {"place": spaces.Box(-np.inf, np.inf, (2,)), "echo": spaces.Box(-np.inf, np.inf, (), np.float64)}
            )
        elif form == "privileged":
            self.observation_space = spaces.Dict({"state": box, "privileged_state": spaces.Box(-np.inf, np.inf, (4,))})
        else:
            self.observation_space = box
        self.seed, self.episode, self.count = 0, -1, 0

    def _observe(self, echo: float) -> Any:
        place = np.array([self.episode, self.count], np.float32)
        flat = np.array([*place, echo], np.float32)
        if self.form == "dict":
            return {"place": place, "echo": np.array(echo, np.float64)}
        if self.form == "privileged":
            return {"state": flat, "privileged_state": np.array([*flat, self.seed], np.float32)}
        return flat

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.seed = seed
        self.episode, self.count = self.episode + 1, 0
        return self._observe(0.0), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        ended = self.count >= LENGTHS[(self.seed + self.episode) % len(LENGTHS)]
        reward = 100.0 * self.episode + self.count
        even = self.episode % 2 == 0
        return self._observe(float(action[0])), reward, ended and even, ended and not even, {}


@pytest.fixture
def counting_env() -> Callable[..., Callable[[], CountingEnv]]:
    """`counting_env(form)` is a factory of counting environments."""

    def of(form: str = "box") -> Callable[[], CountingEnv]:
        return lambda: CountingEnv(form)

    return of


@pytest.fixture
def lengths() -> tuple[int, ...]:
    """Episode lengths of the counting environment, see there."""
    return LENGTHS

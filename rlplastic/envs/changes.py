"""What changes from episode to episode of an environment, and what from task to task: all draws, as pure functions.

Randomisation draws every perturbation of `rlplastic.envs.perturbation` uniformly from its range (``env.randomise``),
keyed by (construction seed, name, episode). Switches make a run non-stationary, as studies of plasticity need it
(``env.switch``): all environments of a run go through the same sequence of tasks, task k being drawn by
(``env.switch_seed``, k), so that runs of other seeds and agents meet the same tasks:

    friction       a factor on all friction, log-uniform ("Slippery Ant", arXiv 2306.13812)
    observations   a permutation of the elements of the observation
    actions        a permutation of the elements of the action
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlplastic.envs.perturbation import NAMES, Perturbation, fraction
from rlplastic.errors import ConfigurationError
from rlplastic.seeding import key

if TYPE_CHECKING:
    from rlplastic.config import EnvConfig, RandomiseConfig


@dataclass(frozen=True)
class Clock:
    """Where in a run's sequence of tasks an environment is.

    transitions: of the run when the environment was built; pace: transitions of the run in one step of the environment,
    which is the number of environments in training, and 0 in evaluations: no task changes then.
    """

    transitions: int = 0
    pace: int = 0


def changes(config: EnvConfig) -> list[str]:
    """What a configuration randomises or switches, a clause each; empty for an environment that stays as it is.

    Raises:
        ConfigurationError: a range or a period is out of range.
    """
    told = []
    for name in NAMES:
        values = getattr(config.randomise, name)
        if values is None:
            continue
        if len(values) != 2 or not values[0] <= values[1]:
            raise ConfigurationError(
                f"env.randomise.{name}={values} is no range; expected [lowest, highest], such as [0.5,1.5]"
            )
        for value in values:
            Perturbation(**{name: value})
        told.append(f"{name} in [{values[0]:g}, {values[1]:g}]")
    if config.switch_every is not None:
        low, high = config.switch_friction if len(config.switch_friction) == 2 else (0.0, 0.0)
        if not 0 < low <= high < math.inf:
            raise ConfigurationError(
                f"env.switch_friction={config.switch_friction} is no range; expected [lowest, highest] above 0, "
                "such as [0.02,2]"
            )
        told.append(f"{config.switch} switched every {config.switch_every:,} transitions")
    return told


def drawn(ranges: RandomiseConfig, seed: int, episode: int) -> Perturbation:
    """The perturbation of one episode of the environment with construction seed ``seed``."""
    values: dict[str, Any] = {}
    for name in NAMES:
        span = getattr(ranges, name)
        if span is None:
            continue
        low, high = span
        part = fraction("randomise", seed, name, episode)
        # every whole number of a range of delays is equally likely
        whole = name in ("observation_delay", "action_delay")
        values[name] = low + math.floor(part * (high - low + 1)) if whole else low + part * (high - low)
    return Perturbation(**values)


def drawn_friction(span: list[float], seed: int, task: int) -> float:
    """The factor of friction in task number ``task`` of the sequence ``seed``."""
    low, high = math.log(span[0]), math.log(span[1])
    return math.exp(low + fraction("switch friction", seed, task) * (high - low))


def drawn_order(what: str, seed: int, task: int, size: int) -> NDArray[np.int64]:
    """The permutation of ``what`` in task number ``task`` of the sequence ``seed``."""
    return np.random.Generator(np.random.Philox(key(f"switch {what}", seed, task))).permutation(size)

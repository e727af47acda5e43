"""How good a policy is: undiscounted returns of whole episodes, deterministic actions, environments of its own.

Every environment contributes exactly its first episode. Counting the first E episodes that *end* instead would favour
short ones: of several environments stepped together, those that fail early deliver more episodes.

Intervals are Student's t over episodes: they say how well the mean of this one policy is known, not how much training
runs differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlplastic.config import EnvConfig
from rlplastic.envs import Observation, VectorEnv, make_envs, step
from rlplastic.errors import ConfigurationError, NonFiniteError

MOST_EPISODES = 10_000
"""Each is an environment of its own."""
LONGEST_EPISODE = 100_000
"""Steps after which an episode of a task without a time limit counts as endless."""


@dataclass(frozen=True)
class Evaluation:
    """Episodes in the order of environments; all arrays are (E,).

    returns: float64, undiscounted; lengths: int64, transitions; terminated: bool, False where only the time limit ended
    the episode.
    """

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    terminated: NDArray[np.bool_]

    @classmethod
    def from_lists(cls, saved: Mapping[str, Sequence[float]]) -> Evaluation:
        """From lists by name, as JSON keeps them."""
        dtypes = {"returns": np.float64, "lengths": np.int64, "terminated": np.bool_}
        return cls(**{name: np.array(saved[name], dtype) for name, dtype in dtypes.items()})

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Sample standard deviation of the returns (divisor E - 1); 0 for one episode."""
        return float(self.returns.std(ddof=1)) if len(self.returns) > 1 else 0.0

    @property
    def ci95(self) -> tuple[float, float]:
        """95 % Student-t interval of the mean return; of width 0 for one episode, which says nothing about spread."""
        if len(self.returns) == 1:
            return self.mean, self.mean
        from scipy.special import stdtrit

        half = float(stdtrit(len(self.returns) - 1, 0.975)) * self.std / len(self.returns) ** 0.5
        return self.mean - half, self.mean + half


def evaluate(
    act: Callable[[Observation], NDArray[np.float32]],
    env: EnvConfig,
    *,
    seed: int,
    episodes: int,
    index: int = 0,
    transitions: int = 0,
) -> Evaluation:
    """Play ``episodes`` episodes, one per environment, in environments built for it and closed afterwards.

    Nothing outside is touched, random generators included: an evaluation cannot change a training run.

    Args:
        act: observation groups (E, dim) to actions (E, A) in [-1, 1]; a deterministic policy.
        env: the task; ``num_envs`` is not read.
        seed: of the run; evaluation environments never share a seed with training environments.
        episodes: E.
        index: counts the evaluations of a run, so that each sees other starting states.
        transitions: of the run so far; a task that switches stays what it is by then.

    Raises:
        ConfigurationError: no or too many episodes were asked for, or an episode did not end.
        NonFiniteError: a return or an action is not finite.
    """
    if not 1 <= episodes <= MOST_EPISODES:
        raise ConfigurationError(f"episodes={episodes} was given; expected a number from 1 to {MOST_EPISODES:,}")
    envs = make_envs(env, seed=seed, role="eval", num_envs=episodes, rebuild=index, transitions=transitions)
    try:
        evaluation = first_episodes(act, envs)
    finally:
        envs.close()
    bad = np.flatnonzero(~np.isfinite(evaluation.returns))[:8].tolist()
    if bad:
        raise NonFiniteError(
            f"the return of evaluation episodes {bad} of {env.task} is not finite; expected finite rewards: "
            "look for a simulation that blew up"
        )
    return evaluation


def first_episodes(act: Callable[[Observation], NDArray[np.float32]], envs: VectorEnv) -> Evaluation:
    """Reset ``envs`` and play until every environment has ended its first episode; later episodes are not counted.

    Both autoreset modes are served alike: they differ only in the rows after an environment's first end.

    Raises:
        ConfigurationError: an episode outlived the time limit, or `LONGEST_EPISODE` where the task declares none.
    """
    limit = envs.max_episode_steps or LONGEST_EPISODE
    returns = np.zeros(envs.num_envs, np.float64)
    lengths = np.zeros(envs.num_envs, np.int64)
    terminated = np.zeros(envs.num_envs, np.bool_)
    running = np.ones(envs.num_envs, np.bool_)
    observation = envs.reset()
    for _ in range(limit):
        result = step(envs, act(observation))
        observation = result.observation
        np.add(returns, result.reward, out=returns, where=running)
        lengths += running
        terminated |= running & result.terminated
        running &= ~(result.terminated | result.truncated)
        if not running.any():
            return Evaluation(returns, lengths, terminated)
    raise ConfigurationError(
        f"{int(running.sum())} of {envs.num_envs} evaluation episodes did not end within {limit} steps; expected a "
        "task whose episodes end: give it a time limit, such as env.kwargs.max_episode_steps=1000"
    )

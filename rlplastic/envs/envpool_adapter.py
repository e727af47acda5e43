"""The contract of `rlplastic.envs.base` over envpool (Weng et al., arXiv 2206.10558), checked against version 1.2.5.

What envpool does, and what the adapter makes of it:

- NEXT_STEP autoreset. The row after a done is the reset: its reward is whatever the buffer held (dm_control and
  MetaWorld tasks never write it), so the adapter sets it to 0; ``elapsed_step`` 0 marks such a row.
- ``batch_size == num_envs`` makes envpool return rows ordered by environment; with a smaller batch rows come in no
  fixed order, so a smaller batch is never used. Overlap is send (all), learn, receive (all).
- Seeds are fixed at construction, one per environment.
- envpool calls the end at the time limit ``truncated`` even if the robot falls in that very step. Where the task
  reports the fall separately (MuJoCo Playground) the adapter restores ``terminated``. dm_control tasks end by the time
  limit only, except LQR, which terminates with discount 0.
- MyoSuite tasks ignore their seeds and start every episode alike, the `*Random` ones too (sail-sg/envpool issue 432,
  fixed after 1.2.5); ``description`` says so.
- Some dm_control tasks carry terms of their sibling tasks that they never fill; `catalogue.DECLARED_TERMS` leaves them
  out.
"""

from __future__ import annotations

import os
import warnings
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlplastic.envs.base import ActionMap, AutoresetMode, Observation, Step, check_actions
from rlplastic.envs.catalogue import DECLARED_TERMS
from rlplastic.envs.observations import action_box, layout_of
from rlplastic.errors import ConfigurationError, EnvironmentContractError, nearest

# set by the adapter itself, or without meaning for the contract
_RESERVED = (
    "num_envs",
    "batch_size",
    "num_threads",
    "seed",
    "env_seed",
    "max_num_players",
    "gym_reset_return_info",
    "base_path",
)
_NO_LIMIT = 1_000_000_000
_Pool: TypeAlias = Any  # envpool generates its classes at run time


class EnvpoolEnv:
    """A `VectorEnv` over one envpool task.

    Args:
        task_id: envpool's id, such as ``Ant-v5`` or ``HumanoidRun-v1`` (see `catalogue.resolve`).
        num_envs: environments stepped together.
        seeds: one 31-bit construction seed per environment.
        threads: simulation threads; None: one per available core, at most one per environment.
        kwargs: options of the task (``frame_skip``, ``max_episode_steps``, reward scales, ...).

    Attributes:
        terms: per observation group, the list of (term, slice of columns).

    Raises:
        ConfigurationError: unknown task or option, or an option of the wrong type.
        EnvironmentContractError: the task has no continuous action Box or no flat observations.
    """

    def __init__(
        self,
        task_id: str,
        num_envs: int,
        seeds: list[int],
        threads: int | None = None,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        if num_envs < 1 or len(seeds) != num_envs:
            raise ConfigurationError(
                f"{num_envs} environments and {len(seeds)} seeds were given; expected at least one and a seed for each"
            )
        self.num_envs = num_envs
        self.threads = min(num_envs, threads or _cores())
        self.autoreset = AutoresetMode.NEXT_STEP
        self.deterministic = True
        self._pending = False
        with warnings.catch_warnings():
            # gymnasium warns when envpool hands it float64 bounds for a float32 Box
            warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
            self._env = _build(task_id, num_envs, seeds, self.threads, dict(kwargs or {}))
            layout = layout_of(self._env.observation_space, task_id, DECLARED_TERMS.get(task_id))
            low, high = action_box(self._env.action_space, task_id)
        self._layout = layout
        self._map = ActionMap(low, high)
        self.terms = layout.terms
        self.observation_dims = layout.dims
        self.action_dim = len(low)
        self.action_low, self.action_high = self._map.low, self._map.high
        limit = int(self._env.spec.config.max_episode_steps)
        self.max_episode_steps = limit if 0 < limit < _NO_LIMIT else None
        self._separates_falls = "info:terminated" in self._env.spec.state_array_spec
        self.description = f"envpool {_version()} {task_id}, {num_envs} environments on {self.threads} threads"
        if task_id.startswith("MyoSuite/") and _version() == "1.2.5":
            self.description += "; this version starts every MyoSuite episode alike, Random tasks too"

    def reset(self) -> Observation:
        """Start an episode in every environment; a step in flight is finished and dropped."""
        env = self._open()
        if self._pending:
            self.receive()
        observation, info = env.reset()
        if not np.array_equal(info["env_id"], np.arange(self.num_envs)):
            raise EnvironmentContractError(
                f"envpool returned rows in the order {info['env_id'].tolist()[:8]}; expected environment order, as "
                "envpool 1.2.5 gives with batch_size == num_envs: install that version"
            )
        return self._layout(observation)

    def send(self, actions: NDArray[np.float32]) -> None:
        """Check ``actions`` and start stepping; see `VectorEnv.send`."""
        check_actions(actions, self.num_envs, self.action_dim)
        env = self._open()
        if self._pending:
            raise EnvironmentContractError("a step is already in flight; expected receive() before the next send()")
        env.send(self._map(actions))
        self._pending = True

    def receive(self) -> Step:
        """Wait for the step that ``send`` started; ``info`` is envpool's dictionary, untouched."""
        env = self._open()
        if not self._pending:
            raise EnvironmentContractError("no step is in flight; expected send(actions) before receive()")
        observation, reward, terminated, truncated, info = env.recv()
        self._pending = False
        reward[info["elapsed_step"] == 0] = 0.0
        if self._separates_falls:
            terminated |= truncated & info["terminated"]
        return Step(self._layout(observation), reward, terminated, truncated, info)

    def close(self) -> None:
        """Stop the threads and free the simulators; calling it twice is harmless."""
        if self._env is not None:
            if self._pending:
                self._env.recv()
                self._pending = False
            self._env.close()
            self._env = None

    def _open(self) -> _Pool:
        if self._env is None:
            raise EnvironmentContractError("the environments are closed; expected an open EnvpoolEnv: build a new one")
        return self._env


def _cores() -> int:
    """Cores this process may use; macOS has no affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version() -> str:
    import envpool

    return str(envpool.__version__)


def _build(task_id: str, num_envs: int, seeds: list[int], threads: int, kwargs: dict[str, Any]) -> _Pool:
    """envpool's gymnasium-style pool, with every foreseeable failure as one sentence."""
    import envpool

    if task_id not in (known := envpool.list_all_envs()):
        raise ConfigurationError(f"envpool has no task {task_id!r}; {nearest(task_id, known)}")
    options = set(envpool.make_spec(task_id).config._fields) - set(_RESERVED)
    for name in kwargs:
        if name not in options:
            raise ConfigurationError(f"{task_id} has no option env.kwargs.{name}; {nearest(name, options)}")
    try:
        return envpool.make_gymnasium(
            task_id, num_envs=num_envs, batch_size=num_envs, num_threads=threads, seed=list(seeds), **kwargs
        )
    except TypeError as error:
        raise ConfigurationError(
            f"{task_id} refuses the options {kwargs}; expected values of the types of its defaults, as in "
            f"{ {name: getattr(envpool.make_spec(task_id).config, name) for name in kwargs} }"
        ) from error
    except (RuntimeError, MemoryError) as error:
        raise ConfigurationError(
            f"envpool could not start {num_envs} environments of {task_id} on {threads} threads ({error}); expected "
            "what the machine has threads and memory for: lower env.num_envs or env.threads"
        ) from error

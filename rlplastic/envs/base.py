"""What an environment must be: one page, the same for every backend.

An adapter is vectorised: it steps ``num_envs`` environments at once and resets finished ones by itself, in one of two
declared ways (names as in gymnasium):

- ``NEXT_STEP``: the step that ends an episode returns the true final observation. The following step ignores its
  action and returns the reset observation with reward 0; that row is not a transition.
- ``SAME_STEP``: the step that ends an episode already returns the reset observation; the true final one is in
  ``info["final_observation"]``, a dictionary of groups whose rows are meaningful where the episode ended.

Observations are dictionaries of float32 arrays (num_envs, dim): ``policy`` always, ``critic`` too where the task has
privileged observations. Actions enter as float32 (num_envs, action_dim) in [-1, 1]; the adapter maps them affinely to
the task's own bounds.

Where a simulator computes in torch, observations and actions may be tensors on its device instead of numpy arrays
(`VectorEnv` of ``Tensor``): whole vectors then never travel. What is one number per environment, rewards and ends, is
always a numpy array: the host has to decide by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypeVar

from rlplastic.errors import EnvironmentContractError, NonFiniteError

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]
Rows = TypeVar("Rows", bound="NDArray[np.float32] | Tensor", default=NDArray[np.float32])
"""Vectors of all environments, (N, dim) float32: numpy arrays, or torch tensors on the simulator's device."""
Observation: TypeAlias = dict[str, Rows]


class AutoresetMode(StrEnum):
    """How an adapter restarts finished episodes; see the module's text."""

    NEXT_STEP = "next_step"
    SAME_STEP = "same_step"


class Step(NamedTuple, Generic[Rows]):
    """What one vector step returns.

    observation: groups of (N, dim) float32; reward: (N,) float32; terminated, truncated: (N,) bool;
    info: backend's extras, ``final_observation`` under SAME_STEP and, where observations are tensors, ``finite``: (N,)
    bool, whether the row's numbers are, as seen on the device while nobody waited for it.
    """

    observation: Observation[Rows]
    reward: NDArray[np.float32]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    info: dict[str, Any]


@runtime_checkable
class VectorEnv(Protocol[Rows]):
    """The contract. ``send`` and ``receive`` are the two halves of ``step``, so that a learner can work in between."""

    num_envs: int
    observation_dims: dict[str, int]
    """Width of each observation group, ``policy`` first."""
    action_dim: int
    action_low: NDArray[np.float64]
    """(action_dim,) bounds of the simulator's own action Box."""
    action_high: NDArray[np.float64]
    autoreset: AutoresetMode
    max_episode_steps: int | None
    deterministic: bool
    """Whether equal construction seeds and equal actions give equal bits; exact resume relies on it."""
    description: str
    """One line for the start-up banner: backend and version, task, threads."""

    def reset(self) -> Observation[Rows]:
        """Start an episode in every environment."""
        ...

    def send(self, actions: Rows) -> None:
        """Check ``actions`` ((N, action_dim), float32, finite, in [-1, 1]) and start stepping.

        Raises:
            EnvironmentContractError: wrong shape, dtype or range.
            NonFiniteError: an action is not finite.
        """
        ...

    def receive(self) -> Step[Rows]:
        """Wait for the step that ``send`` started.

        Raises:
            NonFiniteError: an action is not finite, which could not be told sooner without waiting for a device.
        """
        ...

    def close(self) -> None:
        """Release processes, threads and memory; calling it twice is harmless."""
        ...


def step(envs: VectorEnv[Rows], actions: Rows) -> Step[Rows]:
    """One whole vector step."""
    envs.send(actions)
    return envs.receive()


def on_host(groups: Mapping[str, Any]) -> Observation:
    """Groups of arrays or tensors as numpy arrays; those of tensors on a CPU share their memory."""
    return {name: rows if isinstance(rows, np.ndarray) else rows.cpu().numpy() for name, rows in groups.items()}


class ActionMap:
    """The affine map between the agent's [-1, 1] and the simulator's Box.

    Raises:
        EnvironmentContractError: a bound is infinite or low >= high.
    """

    def __init__(self, low: Array, high: Array) -> None:
        self.low = np.asarray(low, np.float64).reshape(-1)
        self.high = np.asarray(high, np.float64).reshape(-1)
        if not (np.isfinite(self.low).all() and np.isfinite(self.high).all() and (self.low < self.high).all()):
            raise EnvironmentContractError(
                f"the action bounds low={self.low.tolist()} high={self.high.tolist()} are not finite and increasing; "
                "expected a bounded Box: wrap the environment so that every action dimension has finite limits"
            )
        self._half = (self.high - self.low) / 2
        self._middle = (self.high + self.low) / 2

    def __call__(self, actions: NDArray[np.float32]) -> NDArray[np.float64]:
        """Actions in [-1, 1], (N, A) float32, to float64 actions inside the Box."""
        scaled = self._middle + self._half * actions.astype(np.float64)
        # rounding can carry an extreme action one unit in the last place outside the Box
        np.maximum(scaled, self.low, out=scaled)
        return np.minimum(scaled, self.high, out=scaled)


def check_actions(actions: Array, num_envs: int, action_dim: int) -> None:
    """Refuse what a simulator would accept silently; see ``VectorEnv.send`` for the errors."""
    if not isinstance(actions, np.ndarray) or actions.shape != (num_envs, action_dim) or actions.dtype != np.float32:
        found = f"{actions.dtype} {actions.shape}" if isinstance(actions, np.ndarray) else type(actions).__name__
        raise EnvironmentContractError(
            f"actions are {found}; expected a float32 array of shape ({num_envs}, {action_dim}) with values in [-1, 1]"
        )
    largest = np.abs(actions).max(initial=0.0)  # NaN if there is one
    if largest <= 1.0:
        return
    if not np.isfinite(actions).all():
        rows = np.flatnonzero(~np.isfinite(actions).all(axis=1))[:8].tolist()
        raise NonFiniteError(f"the action of environments {rows} is not finite; expected numbers in [-1, 1]")
    raise EnvironmentContractError(
        f"an action has magnitude {largest:.4g}; expected values in [-1, 1], which the adapter maps to the Box"
    )

"""What the loop asks of an agent, and nothing more; and what a run must know of a kind of agents before it has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlplastic.config import AgentConfig
from rlplastic.envs.base import Observation, Rows, Step

if TYPE_CHECKING:
    from rlplastic.replay.sample import Batch

Setting = int | float | str


class Agent(Protocol):
    """An off-policy agent: acts on observations, learns from batches on its device."""

    COLUMNS: ClassVar[tuple[str, ...]]
    """Entries of the state that have a row per environment, of which every rank has its own; all else is the same on
    all ranks."""
    device: torch.device
    updates: int
    """Critic updates done so far."""
    td_error: Tensor | None
    """(B,) of the last update, if its batch had weights: what new priorities are made of."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Named networks, for checkpoints, norms and the plasticity monitor."""
        ...

    @property
    def reward_scale(self) -> Tensor:
        """Scalar on the device that rewards are multiplied with at sampling time."""
        ...

    def explore(self, observation: Observation[Rows], step: int, active: NDArray[np.bool_], uniform: bool) -> Rows:
        """Actions (N, A) in [-1, 1] for vector step ``step``; a pure function of state, (seed, step) and observation.

        For observations that are tensors they are one, on the same device.

        Where ``active`` (N,) is False the environment will ignore the action. ``uniform`` asks for random actions.
        """
        ...

    def act(self, observation: Observation[Rows]) -> Rows:
        """Deterministic actions (N, A): what evaluation and export use."""
        ...

    def observe(self, step: Step[Any], valid: NDArray[np.bool_]) -> None:
        """Take in a vector step's rewards (for reward scaling); called once per step, before any update on it."""
        ...

    def update(self, batch: Batch, budget_used: float) -> dict[str, Tensor]:
        """One update; ``budget_used`` in [0, 1] positions learning-rate schedules. Metrics stay on the device."""
        ...

    def norms(self) -> dict[str, Tensor]:
        """Scalars under `norm/` for the logs; empty for agents without bounded norms."""
        ...

    def initialise(self, state: dict[str, Tensor], parts: Sequence[str]) -> None:
        """Take ``actor`` or ``critic`` from another agent's `state_dict`; everything else starts anew.

        Raises:
            RuntimeError: names or shapes differ.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Everything learning depends on, as flat tensors under stable names."""
        ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`, bit for bit."""
        ...


@dataclass(frozen=True)
class AgentKind:
    """A kind of agents, by which `agent=` finds it: our own are in `rlplastic.agents.AGENTS`."""

    config: type[AgentConfig]
    """Its settings."""
    make: Callable[..., Agent]
    """Builds an agent from a resolved configuration and what `rlplastic.agents.make_agent` hands to all."""
    actor_like: Callable[[Mapping[str, Tensor]], nn.Module]
    """An actor of the sizes of saved tensors, for evaluation and export without an agent. It has ``observation_dim``,
    and maps observations (B, D) to the mean (B, A) before tanh and the log standard deviation."""
    columns: tuple[str, ...] = ()
    """`Agent.COLUMNS` of its agents."""
    settings: Mapping[str, tuple[Setting, str]] = field(default_factory=dict)
    """What open settings are for it whatever the hardware, by dotted key, each with its reason. One that names its
    ``precision`` has no bfloat16."""

"""What FlashSAC and plain SAC are alike as the loop sees them: acting, reward statistics, schedule, exact state.

They differ in their networks and losses, in the noise they explore with, and in the order of an update's steps.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlplastic import seeding
from rlplastic.agents import steps
from rlplastic.agents.exploration import uniform_actions
from rlplastic.agents.flow import FlowCritic
from rlplastic.agents.graphs import GraphedUpdate, Record
from rlplastic.agents.reward_scaling import RewardScaler
from rlplastic.config import FlashSACConfig, SACConfig
from rlplastic.distributed import ALONE, Group
from rlplastic.envs.base import Observation, Rows, Step
from rlplastic.kernels.replay_insert import upload

if TYPE_CHECKING:
    from rlplastic.replay.sample import Batch

L = TypeVar("L", bound=steps.Learner)


def _like(observation: Rows, actions: NDArray[np.float32] | Tensor) -> Rows:
    """The actions as the observation came: an array on the host, or a tensor on its device."""
    if isinstance(observation, Tensor):
        return cast("Rows", upload(actions, observation.device))
    return cast("Rows", actions.cpu().numpy() if isinstance(actions, Tensor) else actions)


class SoftActorCritic(ABC, Generic[L]):
    """An agent around a learner; see `rlplastic.agents.base.Agent` for what each method owes the loop.

    Args:
        learner: networks, optimizers and losses, on ``device``.
        agent: hyper-parameters.
        scaler: statistics that rewards are scaled by.
        action_dim: action dimensions.
        critic_group: the observation group that the critic reads.
        target_noise: M of noise U[-M, M] in every target of the critic.
        seed: everything random is a function of it and of step counts.
        planned_updates: stretch the learning-rate cosine over this many critic updates (the published schedule);
            None: over the budget, by the fraction given to `update`.
        device: where the networks live.
        group: the ranks that learn together; every rank draws noise of its own.
        record: records updates as graphs, which later updates replay; None: every update runs as it is.
    """

    COLUMNS: ClassVar[tuple[str, ...]] = ("reward.returns",)
    """Entries of the state that have a row per environment; every rank has its own."""
    ACTOR_ROWS: ClassVar[int] = 1
    """Rows of noise that an actor step takes for each row of the batch."""

    def __init__(
        self,
        learner: L,
        agent: FlashSACConfig | SACConfig,
        scaler: RewardScaler,
        *,
        action_dim: int,
        critic_group: str,
        target_noise: float,
        seed: int,
        planned_updates: int | None,
        device: torch.device | str,
        group: Group = ALONE,
        record: Record | None = None,
    ) -> None:
        self.learner = learner
        self.config, self.device, self.seed, self.group = agent, torch.device(device), seed, group
        self.action_dim = action_dim
        self.updates = 0
        self.td_error: Tensor | None = None
        self.critic_group = critic_group
        self._planned_updates = planned_updates
        self._target_noise = target_noise
        self._scaler = scaler
        self._reward_scale = torch.ones((), device=self.device)
        self._graphed = None if record is None else GraphedUpdate(record)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by name."""
        learner = self.learner
        return {"actor": learner.actor, "critic": learner.critic, "target_critic": learner.target_critic}

    # Acting

    @abstractmethod
    def exploration_noise(self, step: int, active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Standard-normal noise (N, A) of vector step ``step``; see `rlplastic.agents.base.Agent.explore`."""

    @torch.no_grad()
    def explore(self, observation: Observation[Rows], step: int, active: NDArray[np.bool_], uniform: bool) -> Rows:
        """Actions tanh(mean + std * noise), or uniform random ones."""
        if uniform:
            random = uniform_actions(len(active), self.action_dim, self.seed, step, self.group.rank)
            return _like(observation["policy"], random)
        noise = upload(self.exploration_noise(step, active), self.device)
        mean, log_std = self.learner.actor(upload(observation["policy"], self.device))
        return _like(observation["policy"], torch.tanh(mean + log_std.exp() * noise))

    @torch.no_grad()
    def act(self, observation: Observation[Rows]) -> Rows:
        """Deterministic actions tanh(mean), (N, A)."""
        mean, _ = self.learner.actor(upload(observation["policy"], self.device))
        return _like(observation["policy"], torch.tanh(mean))

    # Learning

    def observe(self, step: Step[Any], valid: NDArray[np.bool_]) -> None:
        """Take in one vector step's rewards; the scale used by the next sampled batch follows."""
        self._scaler.observe(step.reward, step.terminated | step.truncated, valid)

    @property
    def reward_scale(self) -> Tensor:
        """Scalar that rewards are multiplied with at sampling time, brought up to date on the device."""
        return self._reward_scale.fill_(self._scaler.scale)

    def update(self, batch: Batch, budget_used: float) -> dict[str, Tensor]:
        """One update on a batch whose rewards are already scaled, with noise of its own."""
        rng = seeding.generator(self.device, self.update_seed, "update", self.updates)
        rows = len(batch.reward)

        def noise(count: int) -> Tensor:
            return torch.randn(count, self.action_dim, generator=rng, device=self.device)

        actor_noise = noise(self.ACTOR_ROWS * rows) if self.actor_is_due else None
        critic = self.learner.critic
        of_critic = critic.noise(rows, self.action_dim, rng) if isinstance(critic, FlowCritic) else noise(rows)
        inputs = self._perturbed(steps.inputs_of(batch, self.critic_group))
        return self.update_with(inputs, actor_noise, of_critic, budget_used)

    def _perturbed(self, inputs: steps.Inputs) -> steps.Inputs:
        """With noise in the targets, if any is asked for: the reward is a summand of every kind of critic's."""
        if not self._target_noise:
            return inputs
        rng = seeding.generator(self.device, self.update_seed, "target noise", self.updates)
        uniform = torch.rand(inputs.reward.shape, generator=rng, device=self.device)
        return replace(inputs, reward=inputs.reward + self._target_noise * (2 * uniform - 1))

    @property
    def update_seed(self) -> int:
        """Key of an update's noise: every rank draws its own, the first as a lone process does."""
        return seeding.key("update", self.seed, self.group.rank) if self.group.rank else self.seed

    @property
    def actor_is_due(self) -> bool:
        """Whether the next update moves the actor and the temperature."""
        return self.updates % self.config.actor_every == 0

    def update_with(
        self, inputs: steps.Inputs, actor_noise: Tensor | None, critic_noise: steps.CriticNoise, budget_used: float
    ) -> dict[str, Tensor]:
        """One update with the given noise: standard normal for the actor when it is due, and what the critic takes."""
        arguments = inputs, actor_noise, critic_noise, self.rates(budget_used)
        metrics = self.move(*arguments) if self._graphed is None else self._graphed(self.move, *arguments)
        self.td_error = metrics.pop("td_error", None)
        self.updates += 1
        return metrics

    @abstractmethod
    def move(
        self, inputs: steps.Inputs, actor_noise: Tensor | None, critic_noise: steps.CriticNoise, rates: steps.Rates
    ) -> dict[str, Tensor]:
        """The steps of one update in the agent's order; noise as for `update_with`."""

    def rates(self, budget_used: float) -> steps.Rates:
        """Learning rates of the next update."""
        return steps.Rates(
            critic=self.learning_rate(self.updates, budget_used),
            actor=self.learning_rate(self.updates // self.config.actor_every, budget_used),
        )

    def learning_rate(self, index: int, budget_used: float) -> float:
        """The rate of an optimizer's ``index``-th step (from 0): constant unless there is a final one."""
        first, last = self.config.learning_rate, self.config.final_learning_rate
        assert first is not None, "resolve the configuration first"
        if last is None:
            return first
        return steps.learning_rate(steps.position_of(index, budget_used, self._planned_updates), first, last)

    def norms(self) -> dict[str, Tensor]:
        """Nothing where no norm is bounded."""
        return {}

    # State

    def _optimizers(self) -> steps.Optimizers:
        learner = self.learner
        return {
            "actor": (learner.actor_optimizer, learner.actor),
            "critic": (learner.critic_optimizer, learner.critic),
            "temperature": (learner.temperature_optimizer, None),
        }

    def branch(self) -> Self:
        """A twin that learns what this agent would: its own copy of all that is learned, the rest is shared.

        After equal updates both are equal bit for bit. Reward statistics, held noise and compiled gradients are one.
        """
        twin = copy.copy(self)
        twin.learner, twin._graphed = copy.deepcopy(self.learner), None  # recordings move this agent's tensors
        return twin

    def learned_state(self) -> dict[str, Tensor]:
        """Networks, optimizers and temperature: what an update moves; not copies."""
        return steps.learned_state(self.modules, self.learner.log_alpha, self._optimizers())

    def load_learned_state(self, state: dict[str, Tensor]) -> None:
        """Take over `learned_state` of an agent of the same sizes in place, bit for bit.

        Raises:
            RuntimeError: names or shapes differ from this agent's.
        """
        steps.load_learned_state(state, self.modules, self.learner.log_alpha, self._optimizers())

    def state_dict(self) -> dict[str, Tensor]:
        """Networks, optimizers, temperature, reward statistics and counters as flat CPU tensors."""
        state = self.learned_state()
        state |= {f"reward.{entry}": value for entry, value in self._scaler.state_dict().items()}
        state["updates"] = torch.tensor(self.updates)
        return {name: value.detach().cpu() for name, value in state.items()}

    def initialise(self, state: dict[str, Tensor], parts: Sequence[str]) -> None:
        """Take ``actor`` (with the temperature) or ``critic`` (with its target and the reward statistics).

        Raises:
            RuntimeError: names or shapes differ.
        """
        if "actor" in parts:
            steps.take_actor(state, self.learner.actor, self.learner.log_alpha)
        if "critic" in parts:
            steps.take_critic(state, self.learner.critic, self.learner.target_critic)
            # The critic's values are in units of the scaled return, so the scale comes along.
            self._scaler.load_state_dict(self._scaler.state_dict() | {"moments": state["reward.moments"]})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`, bit for bit.

        Raises:
            RuntimeError: names or shapes differ from this agent's.
        """
        self.load_learned_state(state)
        self._scaler.load_state_dict(steps.part(state, "reward."))
        self.updates = int(state["updates"])

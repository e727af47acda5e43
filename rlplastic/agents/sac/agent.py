"""Plain SAC as the loop sees it (arXiv 1812.05905, settings of Stable-Baselines3): the agent that falls ill."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlplastic import seeding
from rlplastic.agents import steps
from rlplastic.agents.adam import Adam
from rlplastic.agents.exploration import gaussian_noise, uniform_actions
from rlplastic.agents.reward_scaling import RewardScaler
from rlplastic.agents.sac import update
from rlplastic.agents.sac.networks import Actor, Critic
from rlplastic.config import SACConfig, ScalarCriticConfig
from rlplastic.envs.base import Observation, Step

if TYPE_CHECKING:
    from rlplastic.replay.sample import Batch


class SAC:
    """Soft actor-critic with ReLU networks and nothing that bounds them; layer norm and weight decay are options.

    Args:
        observation_dims: width of each observation group; the critic reads ``critic`` where there is one.
        action_dim: action dimensions.
        num_envs: environments that feed it (reward statistics are per environment).
        agent: hyper-parameters; widths and gamma must be set.
        critic: how many critics.
        seed: everything random is a function of it and of step counts.
        planned_updates: as for `rlplastic.agents.flashsac.FlashSAC`; without a final learning rate it changes nothing.
        device: where the networks live.
        compile: turns a loss function into a faster equal one (``torch.compile``), or leaves it.
    """

    def __init__(
        self,
        observation_dims: dict[str, int],
        action_dim: int,
        num_envs: int,
        agent: SACConfig,
        critic: ScalarCriticConfig,
        *,
        seed: int = 0,
        planned_updates: int | None = None,
        device: torch.device | str = "cpu",
        compile: Callable[[Any], Any] = lambda function: function,
    ) -> None:
        assert agent.critic_width and agent.actor_width and agent.gamma is not None, "resolve the configuration first"
        self.config, self.device, self.seed = agent, torch.device(device), seed
        self.action_dim = action_dim
        self.updates = 0
        self._planned_updates = planned_updates
        self._critic_group = "critic" if "critic" in observation_dims else "policy"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.key("networks", seed))
            actor = Actor(
                observation_dims["policy"], action_dim, agent.actor_width, agent.actor_depth, agent.layer_norm
            )
            value = Critic(
                observation_dims[self._critic_group],
                action_dim,
                agent.critic_width,
                agent.critic_depth,
                critic.num_members,
                agent.layer_norm,
            )
        self.learner = self._learner(actor.to(self.device), value.to(self.device), compile)
        self.td_error: Tensor | None = None
        self.modules: dict[str, nn.Module] = {
            "actor": self.learner.actor,
            "critic": self.learner.critic,
            "target_critic": self.learner.target_critic,
        }
        # Scalar critics have no support that returns must stay within: only the deviation divides.
        self._scaler = RewardScaler(num_envs, agent.gamma, float("inf"), agent.reward_scaling)
        self._reward_scale = torch.ones((), device=self.device)

    def _learner(self, actor: Actor, critic: Critic, compile: Callable[[Any], Any]) -> update.Learner:
        config = self.config
        log_alpha = nn.Parameter(torch.tensor([config.initial_alpha], device=self.device).log())
        return update.Learner(
            actor=actor,
            critic=critic,
            target_critic=copy.deepcopy(critic).requires_grad_(False),
            log_alpha=log_alpha,
            actor_optimizer=Adam(actor.parameters(), config.weight_decay),
            critic_optimizer=Adam(critic.parameters(), config.weight_decay),
            temperature_optimizer=Adam([log_alpha]),
            actor_loss=compile(update.actor_loss),
            critic_loss=compile(update.critic_loss),
            target_entropy=-float(self.action_dim),
            target_rate=config.target_rate,
            backup_entropy=config.backup_entropy,
        )

    # Acting

    @torch.no_grad()
    def explore(
        self, observation: Observation, step: int, active: NDArray[np.bool_], uniform: bool
    ) -> NDArray[np.float32]:
        """Actions drawn from the policy, or uniform random ones; see `rlplastic.agents.base.Agent.explore`."""
        if uniform:
            return uniform_actions(len(active), self.action_dim, self.seed, step)
        noise = torch.from_numpy(gaussian_noise(len(active), self.action_dim, self.seed, step)).to(self.device)
        mean, log_std = self.learner.actor(self._policy_input(observation))
        actions: NDArray[np.float32] = torch.tanh(mean + log_std.exp() * noise).cpu().numpy()
        return actions

    @torch.no_grad()
    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Deterministic actions tanh(mean), (N, A)."""
        mean, _ = self.learner.actor(self._policy_input(observation))
        actions: NDArray[np.float32] = torch.tanh(mean).cpu().numpy()
        return actions

    def _policy_input(self, observation: Observation) -> Tensor:
        return torch.from_numpy(observation["policy"]).to(self.device)

    # Learning

    def observe(self, step: Step, valid: NDArray[np.bool_]) -> None:
        """Take in one vector step's rewards, for `reward_scale` where rewards are scaled."""
        self._scaler.observe(step.reward, step.terminated | step.truncated, valid)

    @property
    def reward_scale(self) -> Tensor:
        """Scalar that rewards are multiplied with at sampling time; 1 unless ``reward_scaling`` is on."""
        return self._reward_scale.fill_(self._scaler.scale)

    def update(self, batch: Batch, budget_used: float) -> dict[str, Tensor]:
        """One update on a batch; see `rlplastic.agents.sac.update`."""
        rng = seeding.generator(self.device, self.seed, "update", self.updates)

        def noise() -> Tensor:
            return torch.randn(len(batch.reward), self.action_dim, generator=rng, device=self.device)

        inputs = steps.inputs_of(batch, self._critic_group)
        return self.update_with(inputs, noise() if self.actor_is_due else None, noise(), budget_used)

    @property
    def actor_is_due(self) -> bool:
        """Whether the next update moves the actor and the temperature."""
        return self.updates % self.config.actor_every == 0

    def update_with(
        self, inputs: steps.Inputs, actor_noise: Tensor | None, target_noise: Tensor, budget_used: float
    ) -> dict[str, Tensor]:
        """One update with the given standard-normal noise (B, A): for the actor when it is due, and for a'."""
        learner = self.learner
        rate = self._learning_rate(self.updates, budget_used)
        metrics = update.critic_step(learner, inputs, target_noise, rate)
        if actor_noise is not None:
            rate = self._learning_rate(self.updates // self.config.actor_every, budget_used)
            metrics |= update.actor_step(learner, inputs, actor_noise, rate)
            metrics |= steps.temperature_step(
                learner.log_alpha,
                learner.temperature_optimizer,
                metrics["policy/entropy"],
                learner.target_entropy,
                rate,
            )
        steps.follow(learner.target_critic, learner.critic, learner.target_rate)
        self.td_error = metrics.pop("td_error", None)
        self.updates += 1
        return metrics

    def _learning_rate(self, index: int, budget_used: float) -> float:
        """The rate of an optimizer's ``index``-th step (from 0): constant unless a final one was asked for."""
        if self.config.final_learning_rate is None:
            return self.config.learning_rate
        position = steps.position_of(index, budget_used, self._planned_updates)
        return steps.learning_rate(position, self.config.learning_rate, self.config.final_learning_rate)

    # State

    def _optimizers(self) -> steps.Optimizers:
        learner = self.learner
        return {
            "actor": (learner.actor_optimizer, learner.actor),
            "critic": (learner.critic_optimizer, learner.critic),
            "temperature": (learner.temperature_optimizer, None),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Networks, optimizers, temperature, reward statistics and counters as flat CPU tensors."""
        state = steps.learned_state(self.modules, self.learner.log_alpha, self._optimizers())
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
            self._scaler.load_state_dict(self._scaler.state_dict() | {"moments": state["reward.moments"]})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`, bit for bit.

        Raises:
            RuntimeError: names or shapes differ from this agent's.
        """
        steps.load_learned_state(state, self.modules, self.learner.log_alpha, self._optimizers())
        self._scaler.load_state_dict(steps.part(state, "reward."))
        self.updates = int(state["updates"])

    def norms(self) -> dict[str, Tensor]:
        """Nothing: no norm is bounded here."""
        return {}

"""FlashSAC as the loop sees it: acting, reward statistics, updates, and exact state (arXiv 2604.04539)."""

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
from rlplastic.agents.exploration import uniform_actions
from rlplastic.agents.flashsac import update
from rlplastic.agents.flashsac.exploration import HeldNoise
from rlplastic.agents.flashsac.networks import Actor, Critic
from rlplastic.agents.layers import NormBounds
from rlplastic.agents.reward_scaling import RewardScaler
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig
from rlplastic.envs.base import Observation, Step
from rlplastic.kernels.categorical import categorical_target, categorical_target_triton

if TYPE_CHECKING:
    from rlplastic.replay.sample import Batch


class FlashSAC:
    """SAC with few, large updates whose weight, feature and gradient norms are bounded.

    Args:
        observation_dims: width of each observation group; the critic reads ``critic`` where there is one.
        action_dim: action dimensions.
        num_envs: environments that feed it (exploration noise and reward statistics are per environment).
        agent: hyper-parameters; widths and gamma must be set.
        critic: the value representation.
        seed: everything random is a function of it and of step counts.
        planned_updates: stretch the learning-rate cosine over this many critic updates (the published schedule);
            None: over the budget, by the fraction given to `update`.
        device: where the networks live.
        bf16: round the inputs and outputs of the losses' trunk products to bfloat16.
        compile: turns a loss function into a faster equal one (``torch.compile``), or leaves it.
        kernels: torch, or triton on a GPU, for the projections.
    """

    def __init__(
        self,
        observation_dims: dict[str, int],
        action_dim: int,
        num_envs: int,
        agent: FlashSACConfig,
        critic: CategoricalCriticConfig,
        *,
        seed: int = 0,
        planned_updates: int | None = None,
        device: torch.device | str = "cpu",
        bf16: bool = False,
        compile: Callable[[Any], Any] = lambda function: function,
        kernels: str = "torch",
    ) -> None:
        assert agent.critic_width and agent.actor_width and agent.gamma is not None, "resolve the configuration first"
        self.config, self.device, self.seed = agent, torch.device(device), seed
        self.action_dim = action_dim
        self.updates = 0
        self._planned_updates = planned_updates
        self._critic_group = "critic" if "critic" in observation_dims else "policy"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.key("networks", seed))
            actor = Actor(observation_dims["policy"], action_dim, agent.actor_width, agent.num_blocks)
            value = Critic(
                observation_dims[self._critic_group],
                action_dim,
                agent.critic_width,
                agent.num_blocks,
                critic.num_atoms,
                critic.support,
                critic.num_members,
            )
        self.learner = self._learner(actor.to(self.device), value.to(self.device), bf16, compile, kernels)
        self.td_error: Tensor | None = None
        self.modules: dict[str, nn.Module] = {
            "actor": self.learner.actor,
            "critic": self.learner.critic,
            "target_critic": self.learner.target_critic,
        }
        longest = agent.noise_repeat_max
        self._noise = HeldNoise(num_envs, action_dim, longest, agent.noise_per_env, seed)
        self._scaler = RewardScaler(num_envs, agent.gamma, critic.support, agent.reward_scaling)
        self._reward_scale = torch.ones((), device=self.device)

    def _learner(
        self, actor: Actor, critic: Critic, bf16: bool, compile: Callable[[Any], Any], kernels: str
    ) -> update.Learner:
        config = self.config
        actor_bounds, critic_bounds = NormBounds(actor, kernels), NormBounds(critic, kernels)
        actor_bounds.project()
        critic_bounds.project()
        log_alpha = nn.Parameter(torch.tensor([config.initial_alpha], device=self.device).log())
        return update.Learner(
            actor=actor,
            critic=critic,
            target_critic=copy.deepcopy(critic).requires_grad_(False),
            log_alpha=log_alpha,
            actor_optimizer=Adam(actor.parameters()),
            critic_optimizer=Adam(critic.parameters()),
            temperature_optimizer=Adam([log_alpha]),
            actor_bounds=actor_bounds,
            critic_bounds=critic_bounds,
            actor_loss=compile(update.actor_loss),
            critic_loss=compile(update.critic_loss),
            project=categorical_target_triton if kernels == "triton" else categorical_target,
            target_entropy=update.target_entropy(self.action_dim, config.target_std),
            target_rate=config.target_rate,
            backup_entropy=config.backup_entropy,
            bf16=bf16,
        )

    # Acting

    @torch.no_grad()
    def explore(
        self, observation: Observation, step: int, active: NDArray[np.bool_], uniform: bool
    ) -> NDArray[np.float32]:
        """Actions with held noise, or uniform random ones; see `rlplastic.agents.base.Agent.explore`."""
        if uniform:
            return uniform_actions(len(active), self.action_dim, self.seed, step)
        noise = torch.from_numpy(self._noise.at(step, active)).to(self.device)
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
        """Take in one vector step's rewards; the scale used by the next sampled batch follows."""
        self._scaler.observe(step.reward, step.terminated | step.truncated, valid)

    @property
    def reward_scale(self) -> Tensor:
        """Scalar that rewards are multiplied with at sampling time, brought up to date on the device."""
        return self._reward_scale.fill_(self._scaler.scale)

    def update(self, batch: Batch, budget_used: float) -> dict[str, Tensor]:
        """One update on a batch whose rewards are already scaled; see `rlplastic.agents.flashsac.update`."""
        rng = seeding.generator(self.device, self.seed, "update", self.updates)
        rows = len(batch.reward)
        inputs = steps.inputs_of(batch, self._critic_group)

        def noise(count: int) -> Tensor:
            return torch.randn(count, self.action_dim, generator=rng, device=self.device)

        return self.update_with(inputs, noise(2 * rows) if self.actor_is_due else None, noise(rows), budget_used)

    @property
    def actor_is_due(self) -> bool:
        """Whether the next update moves the actor and the temperature."""
        return self.updates % self.config.actor_every == 0

    def update_with(
        self, inputs: steps.Inputs, actor_noise: Tensor | None, target_noise: Tensor, budget_used: float
    ) -> dict[str, Tensor]:
        """One update with the given standard-normal noise: (2B, A) for the actor when it is due, (B, A) for a'."""
        metrics: dict[str, Tensor] = {}
        if actor_noise is not None:
            rate = self._learning_rate(self.updates // self.config.actor_every, budget_used)
            metrics |= update.actor_step(self.learner, inputs, actor_noise, rate)
            metrics |= update.temperature_step(self.learner, metrics["policy/entropy"], rate)
        rate = self._learning_rate(self.updates, budget_used)
        metrics |= update.critic_step(self.learner, inputs, target_noise, rate)
        self.td_error = metrics.pop("td_error", None)
        self.updates += 1
        return metrics

    def _learning_rate(self, index: int, budget_used: float) -> float:
        """The rate of an optimizer's ``index``-th step (from 0): f(0) is the start, then half a cosine."""
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
        """Networks, optimizers, temperature, noise, reward statistics and counters as flat CPU tensors."""
        state = steps.learned_state(self.modules, self.learner.log_alpha, self._optimizers())
        state |= {f"noise.{entry}": value for entry, value in self._noise.state_dict().items()}
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
        steps.load_learned_state(state, self.modules, self.learner.log_alpha, self._optimizers())
        self._noise.load_state_dict(steps.part(state, "noise."))
        self._scaler.load_state_dict(steps.part(state, "reward."))
        self.updates = int(state["updates"])

    def norms(self) -> dict[str, Tensor]:
        """How far each bounded norm is from its bound, by network (0 up to rounding)."""
        bounds = {"actor": self.learner.actor_bounds, "critic": self.learner.critic_bounds}
        return {
            f"norm/{name}_{kind}": value for name, bound in bounds.items() for kind, value in bound.deviations().items()
        }

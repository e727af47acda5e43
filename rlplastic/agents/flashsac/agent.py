"""FlashSAC as the loop sees it (arXiv 2604.04539): its networks, noise and norms around what every SAC does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlplastic import seeding
from rlplastic.agents import steps
from rlplastic.agents.adam import Adam
from rlplastic.agents.flashsac import update
from rlplastic.agents.flashsac.exploration import HeldNoise
from rlplastic.agents.flashsac.networks import Actor, Critic, make_critic
from rlplastic.agents.flow import FlowCritic
from rlplastic.agents.graphs import Record
from rlplastic.agents.layers import NormBounds
from rlplastic.agents.pooling import reduction
from rlplastic.agents.reward_scaling import RewardScaler
from rlplastic.agents.soft_actor_critic import SoftActorCritic
from rlplastic.config import CriticConfig, FlashSACConfig
from rlplastic.distributed import ALONE, Group, Reduce

SUPPORT = 5.0
"""Rewards are scaled so that returns stay within +-5, also where the critic's values have no bounds (published)."""


class FlashSAC(SoftActorCritic[update.Learner]):
    """SAC with few, large updates whose weight, feature and gradient norms are bounded.

    Args:
        observation_dims: width of each observation group; the critic reads ``critic`` where there is one.
        action_dim: action dimensions.
        num_envs: environments that feed it (exploration noise and reward statistics are per environment).
        agent: hyper-parameters; widths and gamma must be set.
        critic: the value representation.
        seed: everything random is a function of it and of step counts.
        planned_updates: see `rlplastic.agents.soft_actor_critic.SoftActorCritic`.
        device: where the networks live.
        bf16: round the inputs and outputs of the losses' trunk products to bfloat16.
        compile: turns a loss's gradient into a faster equal one (``torch.compile``), or leaves it.
        kernels: torch, or triton on a GPU, for the projections.
        group: the ranks that learn together; ``num_envs`` are this one's.
        bn_sync: see `rlplastic.agents.pooling`.
        record: see `rlplastic.agents.graphs`.
    """

    COLUMNS = (*SoftActorCritic.COLUMNS, "noise.noise", "noise.remaining")
    ACTOR_ROWS = 2  # its joint forward on [s; s']

    def __init__(
        self,
        observation_dims: dict[str, int],
        action_dim: int,
        num_envs: int,
        agent: FlashSACConfig,
        critic: CriticConfig,
        *,
        seed: int = 0,
        planned_updates: int | None = None,
        device: torch.device | str = "cpu",
        bf16: bool = False,
        compile: Callable[[Any], Any] = lambda function: function,
        kernels: str = "torch",
        group: Group = ALONE,
        bn_sync: str = "running",
        record: Record | None = None,
    ) -> None:
        assert agent.critic_width and agent.actor_width and agent.gamma is not None, "resolve the configuration first"
        critic_group = "critic" if "critic" in observation_dims else "policy"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.key("networks", seed))
            actor = Actor(observation_dims["policy"], action_dim, agent.actor_width, agent.num_blocks)
            value = make_critic(
                observation_dims[critic_group], action_dim, agent.critic_width, agent.num_blocks, critic, kernels
            )
        support = value.support if value.support < math.inf else SUPPORT
        super().__init__(
            _learner(
                actor.to(device),
                value.to(device),
                action_dim,
                agent,
                bf16,
                compile,
                kernels,
                partial(reduction, group, bn_sync),
            ),
            agent,
            RewardScaler(num_envs, agent.gamma, support, bool(agent.reward_scaling), group),
            action_dim=action_dim,
            critic_group=critic_group,
            target_noise=critic.target_noise,
            seed=seed,
            planned_updates=planned_updates,
            device=device,
            group=group,
            record=record,
        )
        self._noise = HeldNoise(num_envs, action_dim, agent.noise_repeat_max, agent.noise_per_env, seed, group.rank)

    def exploration_noise(self, step: int, active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Noise that every environment holds for a while; see `rlplastic.agents.flashsac.exploration`."""
        return self._noise.at(step, active)

    def move(
        self, inputs: steps.Inputs, actor_noise: Tensor | None, critic_noise: steps.CriticNoise, rates: steps.Rates
    ) -> dict[str, Tensor]:
        """Actor and temperature when they are due, then critic and target; the actor's noise is (2B, A)."""
        learner = self.learner
        metrics: dict[str, Tensor] = {}
        if actor_noise is not None:
            metrics |= update.actor_step(learner, inputs, actor_noise, rates.actor)
            metrics |= steps.temperature_step(learner, metrics["policy/entropy"], rates.actor)
        return metrics | update.critic_step(learner, inputs, critic_noise, rates.critic)

    def norms(self) -> dict[str, Tensor]:
        """How far each bounded norm is from its bound, by network (0 up to rounding)."""
        bounds = {"actor": self.learner.actor_bounds, "critic": self.learner.critic_bounds}
        return {
            f"norm/{name}_{kind}": value for name, bound in bounds.items() for kind, value in bound.deviations().items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """What any soft actor-critic saves, and the noise that is being held."""
        return super().state_dict() | {f"noise.{entry}": value for entry, value in self._noise.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from `state_dict`, bit for bit.

        Raises:
            RuntimeError: names or shapes differ from this agent's.
        """
        super().load_state_dict(state)
        self._noise.load_state_dict(steps.part(state, "noise."))


def _learner(
    actor: Actor,
    critic: Critic | FlowCritic,
    action_dim: int,
    agent: FlashSACConfig,
    bf16: bool,
    compile: Callable[[Any], Any],
    kernels: str,
    reduce_with: Callable[..., Reduce],
) -> update.Learner:
    actor_bounds, critic_bounds = NormBounds(actor, kernels), NormBounds(critic, kernels)
    actor_bounds.project()
    critic_bounds.project()
    assert agent.target_rate is not None and agent.initial_alpha is not None, "resolve the configuration first"
    log_alpha = steps.log_alpha_of(agent.initial_alpha, actor)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    critic_loss: steps.Loss = update.flow_critic_loss if isinstance(critic, FlowCritic) else update.critic_loss
    return update.Learner(
        actor=actor,
        critic=critic,
        target_critic=target_critic,
        log_alpha=log_alpha,
        actor_optimizer=Adam(actor.parameters(), reduce=reduce_with(actor)),
        critic_optimizer=Adam(critic.parameters(), reduce=reduce_with(critic, target_critic)),
        temperature_optimizer=Adam([log_alpha]),
        actor_bounds=actor_bounds,
        critic_bounds=critic_bounds,
        actor_gradient=compile(steps.gradient_of(update.actor_loss)),
        critic_gradient=compile(steps.gradient_of(critic_loss)),
        target_entropy=update.target_entropy(action_dim, agent.target_std),
        target_rate=agent.target_rate,
        backup_entropy=agent.backup_entropy,
        bf16=bf16,
    )

"""Plain SAC as the loop sees it (arXiv 1812.05905, settings of Stable-Baselines3): the agent that falls ill."""

from __future__ import annotations

import copy
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
from rlplastic.agents.exploration import gaussian_noise
from rlplastic.agents.flow import FlowCritic
from rlplastic.agents.graphs import Record
from rlplastic.agents.pooling import reduction
from rlplastic.agents.reward_scaling import RewardScaler
from rlplastic.agents.sac import update
from rlplastic.agents.sac.networks import Actor, Critic, make_critic
from rlplastic.agents.soft_actor_critic import SoftActorCritic
from rlplastic.config import CriticConfig, SACConfig
from rlplastic.distributed import ALONE, Group, Reduce


class SAC(SoftActorCritic[steps.Learner]):
    """Soft actor-critic with ReLU networks and nothing that bounds them; layer norm and weight decay are options.

    Args:
        observation_dims: width of each observation group; the critic reads ``critic`` where there is one.
        action_dim: action dimensions.
        num_envs: environments that feed it (reward statistics are per environment).
        agent: hyper-parameters; widths and gamma must be set.
        critic: the value representation.
        seed: everything random is a function of it and of step counts.
        planned_updates: see `rlplastic.agents.soft_actor_critic.SoftActorCritic`; nothing without a final rate.
        device: where the networks live.
        compile: turns a loss's gradient into a faster equal one (``torch.compile``), or leaves it.
        group: the ranks that learn together; ``num_envs`` are this one's.
        bn_sync: see `rlplastic.agents.pooling`; nothing without batch norms.
        record: see `rlplastic.agents.graphs`.
    """

    def __init__(
        self,
        observation_dims: dict[str, int],
        action_dim: int,
        num_envs: int,
        agent: SACConfig,
        critic: CriticConfig,
        *,
        seed: int = 0,
        planned_updates: int | None = None,
        device: torch.device | str = "cpu",
        compile: Callable[[Any], Any] = lambda function: function,
        group: Group = ALONE,
        bn_sync: str = "running",
        record: Record | None = None,
    ) -> None:
        assert agent.critic_width and agent.actor_width and agent.gamma is not None, "resolve the configuration first"
        critic_group = "critic" if "critic" in observation_dims else "policy"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.key("networks", seed))
            actor = Actor(
                observation_dims["policy"], action_dim, agent.actor_width, agent.actor_depth, agent.layer_norm
            )
            value = make_critic(
                observation_dims[critic_group],
                action_dim,
                agent.critic_width,
                agent.critic_depth,
                critic,
                agent.layer_norm,
            )
        super().__init__(
            _learner(
                actor.to(device), value.to(device), action_dim, agent, compile, partial(reduction, group, bn_sync)
            ),
            agent,
            # Scalar critics have no support that returns must stay within: only the deviation divides.
            RewardScaler(num_envs, agent.gamma, value.support, bool(agent.reward_scaling), group),
            action_dim=action_dim,
            critic_group=critic_group,
            target_noise=critic.target_noise,
            seed=seed,
            planned_updates=planned_updates,
            device=device,
            group=group,
            record=record,
        )

    def exploration_noise(self, step: int, active: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Fresh noise in every step: actions are draws from the policy."""
        return gaussian_noise(len(active), self.action_dim, self.seed, step, self.group.rank)

    def move(
        self, inputs: steps.Inputs, actor_noise: Tensor | None, critic_noise: steps.CriticNoise, rates: steps.Rates
    ) -> dict[str, Tensor]:
        """Critics, then actor and temperature when they are due, then target; all noise is (B, A)."""
        learner = self.learner
        metrics = steps.critic_step(learner, inputs, critic_noise, rates.critic)
        if actor_noise is not None:
            metrics |= steps.actor_step(learner, inputs, actor_noise, rates.actor)
            metrics |= steps.temperature_step(learner, metrics["policy/entropy"], rates.actor)
        steps.follow(learner.target_parameters, learner.critic_optimizer.parameters, learner.target_rate)
        return metrics


def _learner(
    actor: Actor,
    critic: Critic | FlowCritic,
    action_dim: int,
    agent: SACConfig,
    compile: Callable[[Any], Any],
    reduce_with: Callable[..., Reduce],
) -> steps.Learner:
    assert agent.target_rate is not None and agent.initial_alpha is not None, "resolve the configuration first"
    log_alpha = steps.log_alpha_of(agent.initial_alpha, actor)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    critic_loss: steps.Loss = update.flow_critic_loss if isinstance(critic, FlowCritic) else update.critic_loss
    return steps.Learner(
        actor=actor,
        critic=critic,
        target_critic=target_critic,
        log_alpha=log_alpha,
        actor_optimizer=Adam(actor.parameters(), agent.weight_decay, reduce_with(actor)),
        critic_optimizer=Adam(critic.parameters(), agent.weight_decay, reduce_with(critic, target_critic)),
        temperature_optimizer=Adam([log_alpha]),
        actor_gradient=compile(steps.gradient_of(update.actor_loss)),
        critic_gradient=compile(steps.gradient_of(critic_loss)),
        target_entropy=-float(action_dim),
        target_rate=agent.target_rate,
        backup_entropy=agent.backup_entropy,
    )

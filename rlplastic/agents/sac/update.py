"""The losses of plain SAC (arXiv 1812.05905, algorithm 1).

They are pure functions of networks, batch and noise: everything random comes in as an argument, they can be compiled
from outside, and nothing here synchronises with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlplastic.agents import steps
from rlplastic.agents.flow import FlowCritic, FlowNoise
from rlplastic.agents.heads import squashed_sample
from rlplastic.agents.sac.networks import Actor, Critic
from rlplastic.agents.steps import Inputs, Metrics


def critic_loss(
    actor: Actor,
    critic: Critic,
    target_critic: Critic,
    alpha: Tensor,
    inputs: Inputs,
    noise: Tensor,
    backup_entropy: bool = True,
) -> tuple[Tensor, Metrics]:
    """Mean over members and rows of (Q(s, a) - y)^2, y = r + discount (min Q'(s', a') - alpha log pi(a'|s')).

    Noise is (B, A) for a' ~ pi(s'). Categorical critics: the cross-entropy with the projected target instead.
    """
    with torch.no_grad():
        mean, log_std = actor(inputs.next_observation)
        next_action, next_log_prob = squashed_sample(mean, log_std, noise)
        next_outputs = target_critic(inputs.next_critic_observation, next_action)
        bonus = steps.entropy_bonus(alpha, next_log_prob, backup_entropy)
        target, target_mean = target_critic.values.target(next_outputs, inputs.reward, inputs.discount, bonus)
    outputs = critic(inputs.critic_observation, inputs.action)
    losses, predicted = critic.values.losses(outputs, target), critic.values.expected(outputs.detach())
    return steps.value_loss(losses, target_mean, predicted, bonus, critic.support, inputs.weight)


def flow_critic_loss(
    actor: Actor,
    critic: FlowCritic,
    target_critic: FlowCritic,
    alpha: Tensor,
    inputs: Inputs,
    noise: FlowNoise,
    backup_entropy: bool = True,
) -> tuple[Tensor, Metrics]:
    """Squared error of the velocities, and of the distilled critics against where these lead (arXiv 2509.06863)."""
    with torch.no_grad():
        mean, log_std = actor(inputs.next_observation)
        next_action, next_log_prob = squashed_sample(mean, log_std, noise.action)
        next_field = target_critic.field.given(inputs.next_critic_observation, next_action)
        endpoints = target_critic.trajectory(next_field, noise.target)[-1]
        bonus = steps.entropy_bonus(alpha, next_log_prob, backup_entropy)
        target, target_mean = target_critic.target(endpoints, inputs.reward, inputs.discount, bonus)
    field = critic.field.given(inputs.critic_observation, inputs.action)
    distilled = None
    if critic.distilled is not None:
        distilled = critic.distilled(inputs.critic_observation, inputs.action)
    return steps.flow_loss(critic, field, distilled, noise, (target, target_mean), bonus, inputs.weight)


def actor_loss(
    actor: Actor, critic: Critic | FlowCritic, alpha: Tensor, inputs: Inputs, noise: Tensor
) -> tuple[Tensor, Metrics]:
    """E[alpha log pi(a|s) - min Q(s, a)]; noise is (B, A).

    The critic's parameters must not require gradients while this runs.
    """
    mean, log_std = actor(inputs.observation)
    action, log_prob = squashed_sample(mean, log_std, noise)
    value = critic.value(inputs.critic_observation, action)
    return steps.policy_loss(alpha, action, log_prob, log_std, value)

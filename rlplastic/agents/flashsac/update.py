"""One FlashSAC update, in the paper's order (arXiv 2604.04539): actor, temperature, critic, target.

The losses are pure functions of networks, batch and noise; everything random comes in as an argument, so that an
update can be replayed against a recording, compiled from outside, and repeated bit for bit after a resume. The steps
around them move parameters. No function here synchronises with the host: metrics stay tensors.

Which statistics a batch norm uses in which call:

=====================================  ===============  ==========================================
call                                   network          statistics
=====================================  ===============  ==========================================
actor loss: pi on [s; s']              actor            batch, and updates running
actor loss: Q(s, a)                    critic           running
a' for the target                      actor            running
target Q on [s; s']                    target critic    batch, and updates its own (never read)
prediction on [s; s']                  critic           batch, and updates running
rollout, evaluation, export            actor            running
=====================================  ===============  ==========================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlplastic.agents import steps
from rlplastic.agents.flashsac.networks import Actor, Critic
from rlplastic.agents.flow import FlowCritic, FlowNoise
from rlplastic.agents.heads import squashed_sample
from rlplastic.agents.layers import NormBounds
from rlplastic.agents.steps import Inputs, Metrics


@dataclass
class Learner(steps.Learner):
    """Also what bounds norms, and the precision of products."""

    actor_bounds: NormBounds
    critic_bounds: NormBounds
    bf16: bool
    """Round the inputs and outputs of the trunks' products to bfloat16 in the losses; acting is always float32."""


def actor_loss(
    actor: Actor, critic: Critic | FlowCritic, alpha: Tensor, inputs: Inputs, noise: Tensor, bf16: bool = False
) -> tuple[Tensor, Metrics]:
    """E[alpha log pi(a|s) - min Q(s, a)]; noise is (2B, A) for the joint forward on [s; s'].

    The critic's parameters must not require gradients while this runs.
    """
    rows = inputs.observation.shape[0]
    mean, log_std = actor(torch.cat((inputs.observation, inputs.next_observation)), True, bf16)
    actions, log_probs = squashed_sample(mean, log_std, noise)
    action, log_prob = actions[:rows], log_probs[:rows]
    value = critic.value(inputs.critic_observation, action, False, bf16)
    return steps.policy_loss(alpha, action, log_prob, log_std[:rows], value)


def critic_loss(
    actor: Actor,
    critic: Critic,
    target_critic: Critic,
    alpha: Tensor,
    inputs: Inputs,
    noise: Tensor,
    backup_entropy: bool = True,
    bf16: bool = False,
) -> tuple[Tensor, Metrics]:
    """Cross-entropy of every member's prediction against the projected target; noise is (B, A) for a' ~ pi(s').

    Scalar critics: the squared error instead.

    Both critics see [s; s'] with [a; a'] in one forward pass, so that their batch statistics cover both halves.
    """
    rows = inputs.observation.shape[0]
    observations = torch.cat((inputs.critic_observation, inputs.next_critic_observation))
    with torch.no_grad():
        mean, log_std = actor(inputs.next_observation, False, bf16)
        next_action, next_log_prob = squashed_sample(mean, log_std, noise)
        actions = torch.cat((inputs.action, next_action))
        next_outputs = target_critic(observations, actions, True, bf16)[:, rows:]
        bonus = steps.entropy_bonus(alpha, next_log_prob, backup_entropy)
        target, target_mean = target_critic.values.target(next_outputs, inputs.reward, inputs.discount, bonus)
    outputs = critic(observations, actions, True, bf16)[:, :rows]
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
    bf16: bool = False,
) -> tuple[Tensor, Metrics]:
    """Squared error of the velocities, and of the distilled critics against where these lead (arXiv 2509.06863).

    All fields see [s; s' for each noise] with [a; a'] in one forward pass, as above. The distilled critics see one of
    the noises' a', so that both halves of their statistics are of one size.
    """
    rows, noises = len(inputs.reward), len(noise.action)
    here, there = slice(0, rows), slice(rows, None)
    observations = torch.cat((inputs.critic_observation, inputs.next_critic_observation.repeat(noises, 1)))
    with torch.no_grad():
        mean, log_std = actor(inputs.next_observation, False, bf16)
        next_action, next_log_prob = squashed_sample(mean, log_std, noise.action)
        actions = torch.cat((inputs.action, next_action.flatten(0, 1)))
        next_field = target_critic.field.given(observations, actions, True, bf16, there, noises)
        endpoints = target_critic.trajectory(next_field, noise.target)[-1]
        bonus = steps.entropy_bonus(alpha, next_log_prob, backup_entropy)
        target, target_mean = target_critic.target(endpoints, inputs.reward, inputs.discount, bonus)
    field = critic.field.given(observations, actions, True, bf16, here)
    distilled = None
    if critic.distilled is not None:
        distilled = critic.distilled(observations[: 2 * rows], actions[: 2 * rows], True, bf16)[:, here]
    return steps.flow_loss(critic, field, distilled, noise, (target, target_mean), bonus, inputs.weight)


def target_entropy(action_dim: int, std: float) -> float:
    """Entropy of a Gaussian of deviation ``std`` in ``action_dim`` dimensions: A/2 log(2 pi e std^2)."""
    return 0.5 * action_dim * math.log(2 * math.pi * math.e * std**2)


def actor_step(learner: Learner, inputs: Inputs, noise: Tensor, rate: steps.Rate) -> Metrics:
    """Move the actor along its loss, with the critic frozen, and re-project it."""
    metrics = steps.actor_step(learner, inputs, noise, rate, learner.bf16)
    learner.actor_bounds.project()
    return metrics


def critic_step(learner: Learner, inputs: Inputs, noise: steps.CriticNoise, rate: steps.Rate) -> Metrics:
    """Move the critic towards its target, re-project it, and let the target critic follow."""
    metrics = steps.critic_step(learner, inputs, noise, rate, learner.bf16)
    learner.critic_bounds.project()
    steps.follow(learner.target_parameters, learner.critic_optimizer.parameters, learner.target_rate)
    return metrics

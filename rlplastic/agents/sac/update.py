"""The losses of plain SAC (arXiv 1812.05905, algorithm 1).

They are pure functions of networks, batch and noise: everything random comes in as an argument, they can be compiled
from outside, and nothing here synchronises with the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlplastic.agents import steps
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

    Noise is (B, A) for a' ~ pi(s'). With weights each row's squares are multiplied by its weight, and the metrics also
    hold ``td_error`` (B,), the members' mean |y - Q|, for new priorities.
    """
    with torch.no_grad():
        mean, log_std = actor(inputs.next_observation)
        next_action, next_log_prob = squashed_sample(mean, log_std, noise)
        next_value = target_critic(inputs.next_critic_observation, next_action).amin(0)
        bonus = -alpha * next_log_prob if backup_entropy else torch.zeros_like(next_log_prob)
        target = inputs.reward + inputs.discount * (next_value + bonus)
    error = critic(inputs.critic_observation, inputs.action) - target
    squares = error.square()
    loss = (squares if inputs.weight is None else squares * inputs.weight).mean()
    metrics = {
        "loss/critic": loss.detach(),
        "value/target_mean": target.mean(),
        "value/max_entropy_term": (-bonus).max(),
    }
    if inputs.weight is not None:
        metrics["td_error"] = error.detach().abs().mean(0)
    return loss, metrics


def actor_loss(actor: Actor, critic: Critic, alpha: Tensor, inputs: Inputs, noise: Tensor) -> tuple[Tensor, Metrics]:
    """E[alpha log pi(a|s) - min Q(s, a)]; noise is (B, A).

    The critic's parameters must not require gradients while this runs.
    """
    mean, log_std = actor(inputs.observation)
    action, log_prob = squashed_sample(mean, log_std, noise)
    value = critic(inputs.critic_observation, action).amin(0)
    return steps.policy_loss(alpha, action, log_prob, log_std, value)

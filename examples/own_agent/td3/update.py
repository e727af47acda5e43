"""The losses of TD3 (arXiv 1802.09477, algorithm 1): pure functions, which can be compiled from outside."""

from __future__ import annotations

import torch
from torch import Tensor

from rlplastic.agents.sac.networks import Critic
from rlplastic.agents.steps import Inputs, Metrics
from td3.networks import Actor


def critic_loss(
    target_actor: Actor, critic: Critic, target_critic: Critic, inputs: Inputs, noise: Tensor
) -> tuple[Tensor, Metrics]:
    """Mean of (Q(s, a) - y)^2, y = r + discount min Q'(s', clip(pi'(s') + noise, -1, 1)); noise is (B, A)."""
    with torch.no_grad():
        next_action = (torch.tanh(target_actor(inputs.next_observation)[0]) + noise).clamp(-1, 1)
        target = inputs.reward + inputs.discount * target_critic.value(inputs.next_critic_observation, next_action)
    error = critic(inputs.critic_observation, inputs.action) - target
    losses = error.square() if inputs.weight is None else error.square() * inputs.weight
    loss = losses.mean()
    return loss, {
        "loss/critic": loss.detach(),
        "value/target_mean": target.mean(),
        "td_error": error.detach().abs().mean(0),
    }


def actor_loss(actor: Actor, critic: Critic, inputs: Inputs) -> tuple[Tensor, Metrics]:
    """-E[Q_1(s, pi(s))]."""
    value = critic(inputs.critic_observation, torch.tanh(actor(inputs.observation)[0]))[0].mean()
    return -value, {"loss/actor": -value.detach(), "value/q_mean": value.detach()}

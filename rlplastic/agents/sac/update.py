"""One update of plain SAC, in the paper's order (arXiv 1812.05905, algorithm 1): critics, actor, temperature, target.

The losses are pure functions of networks, batch and noise: everything random comes in as an argument, they can be
compiled from outside, and nothing here synchronises with the host.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlplastic.agents.adam import Adam
from rlplastic.agents.heads import squashed_sample
from rlplastic.agents.sac.networks import Actor, Critic
from rlplastic.agents.steps import Inputs, Metrics, minimise


@dataclass
class Learner:
    """Everything an update reads and moves."""

    actor: Actor
    critic: Critic
    target_critic: Critic
    log_alpha: torch.nn.Parameter
    actor_optimizer: Adam
    critic_optimizer: Adam
    temperature_optimizer: Adam
    actor_loss: Callable[..., tuple[Tensor, Metrics]]
    """`actor_loss`, compiled or not."""
    critic_loss: Callable[..., tuple[Tensor, Metrics]]
    """`critic_loss`, compiled or not."""
    target_entropy: float
    target_rate: float
    backup_entropy: bool

    def alpha(self) -> Tensor:
        """The entropy temperature, detached."""
        return self.log_alpha.detach().exp()


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
    loss = (alpha * log_prob - value).mean()
    metrics = {
        "loss/actor": loss.detach(),
        "policy/entropy": -log_prob.detach().mean(),
        "policy/action_mean": action.detach().mean(),
        "policy/std": log_std.detach().exp().mean(),
        "value/q_mean": value.detach().mean(),
    }
    return loss, metrics


def critic_step(learner: Learner, inputs: Inputs, noise: Tensor, rate: float) -> Metrics:
    """Move the critics towards their target."""
    loss, metrics = learner.critic_loss(
        learner.actor,
        learner.critic,
        learner.target_critic,
        learner.alpha(),
        inputs,
        noise,
        learner.backup_entropy,
    )
    minimise(loss, learner.critic_optimizer, rate)
    return metrics


def actor_step(learner: Learner, inputs: Inputs, noise: Tensor, rate: float) -> Metrics:
    """Move the actor along its loss, with the critic frozen."""
    learner.critic.requires_grad_(False)
    loss, metrics = learner.actor_loss(learner.actor, learner.critic, learner.alpha(), inputs, noise)
    minimise(loss, learner.actor_optimizer, rate)
    learner.critic.requires_grad_(True)
    return metrics

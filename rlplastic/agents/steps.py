"""What every soft actor-critic does alike (arXiv 1812.05905): inputs, steps, target, schedule, saved state.

Plain functions, so that an agent's own `update` reads from top to bottom and takes from here only what is the same.
None of them synchronises with the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rlplastic.agents.adam import Adam
from rlplastic.agents.flow import FlowCritic, FlowNoise, Velocity

if TYPE_CHECKING:
    from rlplastic.replay.sample import Batch

Metrics = dict[str, Tensor]
CriticNoise = Tensor | FlowNoise
"""What a critic's loss takes: standard normal (B, A) for a' ~ pi(s'), and more of it where values are flows."""
Loss = Callable[..., tuple[Tensor, Metrics]]
Gradient = Callable[..., tuple[Sequence[Tensor], Metrics]]
"""Of parameters, and the arguments of a loss: the loss's gradient by these parameters, and its metrics."""
Rate = float | Tensor
"""A learning rate; as a tensor () it is read when a recorded update runs, and not when it is recorded."""
Optimizers = Mapping[str, tuple[Adam, nn.Module | None]]
"""Each by its name, with the network whose parameters it moves; None: the temperature."""


@dataclass(frozen=True)
class Inputs:
    """What the losses read of a batch: policy observations for the actor, critic observations for the critic."""

    observation: Tensor
    next_observation: Tensor
    critic_observation: Tensor
    next_critic_observation: Tensor
    action: Tensor
    reward: Tensor
    """Scaled, (B,)."""
    discount: Tensor
    """gamma^k of the k steps summed, 0 if terminated, (B,)."""
    weight: Tensor | None = None
    """Factor of each row's critic loss under prioritised draws, (B,)."""


def inputs_of(batch: Batch, critic_group: str) -> Inputs:
    """A batch as the losses read it; the critic sees the observation group ``critic_group``."""
    return Inputs(
        observation=batch.observation["policy"],
        next_observation=batch.next_observation["policy"],
        critic_observation=batch.observation[critic_group],
        next_critic_observation=batch.next_observation[critic_group],
        action=batch.action,
        reward=batch.reward,
        discount=batch.discount,
        weight=batch.weight,
    )


class Rates(NamedTuple):
    """Learning rates of one update."""

    critic: Rate
    actor: Rate
    """The temperature's, too."""


@dataclass
class Learner:
    """Everything that an update of any soft actor-critic reads and moves."""

    actor: nn.Module
    critic: nn.Module
    target_critic: nn.Module
    log_alpha: nn.Parameter
    actor_optimizer: Adam
    critic_optimizer: Adam
    temperature_optimizer: Adam
    actor_gradient: Gradient
    """Of the agent's ``update.actor_loss``, compiled or not."""
    critic_gradient: Gradient
    """Of the agent's ``update.critic_loss`` or ``flow_critic_loss``, compiled or not."""
    target_entropy: float
    target_rate: float
    backup_entropy: bool
    target_parameters: list[Tensor] = field(init=False)
    """Of the target critic, in the order of the critic's; listed once, as optimizers list theirs."""

    def __post_init__(self) -> None:
        self.target_parameters = list(self.target_critic.parameters())

    def alpha(self) -> Tensor:
        """The entropy temperature, detached."""
        return self.log_alpha.detach().exp()


def gradient_of(loss: Loss) -> Gradient:
    """The gradient of a loss as one function, so that a compiler sees the way back, too, and can join both ways."""

    @wraps(loss)
    def gradient(parameters: Sequence[Tensor], *arguments: Any) -> tuple[Sequence[Tensor], Metrics]:  # noqa: ANN401
        value, metrics = loss(*arguments)
        return torch.autograd.grad(value, parameters), metrics

    return gradient


def log_alpha_of(initial_alpha: float, network: nn.Module) -> nn.Parameter:
    """The temperature's parameter (1,) at its start, where ``network`` lives."""
    return nn.Parameter(torch.tensor([initial_alpha], device=next(network.parameters()).device).log())


def policy_loss(
    alpha: Tensor, action: Tensor, log_prob: Tensor, log_std: Tensor, value: Tensor
) -> tuple[Tensor, Metrics]:
    """E[alpha log pi(a|s) - Q(s, a)] and what is told of a policy.

    Args:
        alpha: (1,).
        action: (B, A), squashed.
        log_prob: (B,).
        log_std: (B, A), before squashing.
        value: (B,), the smaller of the members' values.
    """
    entropy = -log_prob.mean()
    loss = (alpha * log_prob - value).mean()
    metrics = {
        "loss/actor": loss.detach(),
        "policy/entropy": entropy.detach(),
        "policy/action_mean": action.detach().mean(),
        "policy/std": log_std.detach().exp().mean(),
        "value/q_mean": value.detach().mean(),
    }
    return loss, metrics


def entropy_bonus(alpha: Tensor, log_prob: Tensor, backup_entropy: bool) -> Tensor:
    """What the entropy adds to the next state's value: -alpha log pi(a'|s'), or 0; as ``log_prob``."""
    return -alpha * log_prob if backup_entropy else torch.zeros_like(log_prob)


def value_loss(
    losses: Tensor, target_mean: Tensor, predicted: Tensor, bonus: Tensor, support: float, weight: Tensor | None
) -> tuple[Tensor, Metrics]:
    """Mean over members and rows of a critic's losses, and what is told of values.

    With weights each row's losses are multiplied by its weight, and the metrics also hold ``td_error`` (B,), the
    members' mean |target - Q|, for new priorities.

    Args:
        losses: (members, B).
        target_mean: (B,), before it is clipped.
        predicted: (members, B), the members' values, detached.
        bonus: the entropy bonus that the targets hold, of any shape.
        support: where targets are clipped, if anywhere.
        weight: (B,), or None.
    """
    loss = (losses if weight is None else losses * weight).mean()
    metrics = {
        "loss/critic": loss.detach(),
        "value/target_mean": target_mean.mean(),
        "value/max_entropy_term": (-bonus).max(),
    }
    if support < math.inf:
        metrics["value/target_clipped"] = (target_mean.abs() > support).float().mean()
    if weight is not None:
        metrics["td_error"] = (target_mean - predicted).abs().mean(0)
    return loss, metrics


def flow_loss(
    critic: FlowCritic,
    field: Velocity,
    distilled: Tensor | None,
    noise: FlowNoise,
    targets: tuple[Tensor, Tensor],
    bonus: Tensor,
    weight: Tensor | None,
) -> tuple[Tensor, Metrics]:
    """Squared error of the velocities, and of the distilled critics against where these lead (arXiv 2509.06863).

    Args:
        critic: the flows.
        field: its velocities at (s, a).
        distilled: (members, B), what its distilled critics say there, if it has any.
        noise: of the loss and of the reading.
        targets: (B,), as they are regressed on and before they are clipped.
        bonus: as for `value_loss`.
        weight: as for `value_loss`.
    """
    target, target_mean = targets
    losses = critic.losses(field, noise.source, noise.time, target)
    with torch.no_grad():
        read = critic.trajectory(field, noise.reading)[-1].mean(1)
    if distilled is None:
        return value_loss(losses, target_mean, read, bonus, critic.support, weight)
    distances = (distilled - read).square()
    loss, metrics = value_loss(losses + distances, target_mean, read, bonus, critic.support, weight)
    return loss, metrics | {"loss/distilled": distances.detach().mean()}


def actor_step(learner: Learner, inputs: Inputs, noise: Tensor, rate: Rate, *options: Any) -> Metrics:  # noqa: ANN401
    """Move the actor along its loss, with the critic frozen; ``options`` go to the loss."""
    optimizer, frozen = learner.actor_optimizer, learner.critic_optimizer.parameters
    for parameter in frozen:
        parameter.requires_grad_(False)
    gradients, metrics = learner.actor_gradient(
        optimizer.parameters, learner.actor, learner.critic, learner.alpha(), inputs, noise, *options
    )
    for parameter in frozen:
        parameter.requires_grad_(True)
    return descend(optimizer, gradients, metrics, rate)


def critic_step(learner: Learner, inputs: Inputs, noise: CriticNoise, rate: Rate, *options: Any) -> Metrics:  # noqa: ANN401
    """Move the critics towards their target; ``options`` go to the loss."""
    optimizer, networks = learner.critic_optimizer, (learner.actor, learner.critic, learner.target_critic)
    gradients, metrics = learner.critic_gradient(
        optimizer.parameters, *networks, learner.alpha(), inputs, noise, learner.backup_entropy, *options
    )
    return descend(optimizer, gradients, metrics, rate)


def temperature_step(learner: Learner, entropy: Tensor, rate: Rate) -> Metrics:
    """Move log alpha along alpha (H - H_target), so that alpha grows while the policy's entropy is below its target.

    ``entropy`` is that of the actor before its step, of all ranks. In log alpha this loss is its own gradient.
    """
    alpha = learner.alpha()
    loss = alpha * (entropy - learner.target_entropy)
    learner.temperature_optimizer.step([loss], rate)
    return {"loss/temperature": loss, "policy/alpha": alpha}


def learning_rate(position: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` to ``end`` over ``position`` in [0, 1]."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(max(position, 0.0), 1.0)))


def position_of(index: int, budget_used: float, planned_updates: int | None) -> float:
    """Where on the schedule an optimizer's ``index``-th step (from 0) is: by the budget, or by planned steps.

    The published schedule holds its start for two steps: f(0) is the start, and so is the cosine's first value.
    """
    if planned_updates is None:
        return budget_used
    return max(index - 1, 0) / max(planned_updates - 1, 1)


@torch.no_grad()
def follow(targets: list[Tensor], parameters: list[Tensor], rate: float) -> None:
    """Targets <- lerp(targets, parameters, rate); buffers are not copied, nothing is re-projected."""
    torch._foreach_lerp_(targets, parameters, rate)


def descend(optimizer: Adam, gradients: Sequence[Tensor], metrics: Metrics, rate: Rate) -> Metrics:
    """One optimizer step at learning rate ``rate``; returns the metrics, scalars as means over ranks.

    They travel with the gradients, so that all ranks know the same entropy and stop at the same NaN.
    """
    scalars = {name: value for name, value in metrics.items() if value.ndim == 0}
    reduced = optimizer.reduce([*gradients, *scalars.values()])
    optimizer.step(reduced[: len(gradients)], rate)
    return {**metrics, **dict(zip(scalars, reduced[len(gradients) :], strict=True))}


# State


def learned_state(modules: Mapping[str, nn.Module], log_alpha: Tensor, optimizers: Optimizers) -> dict[str, Tensor]:
    """Networks, temperature and optimizers as flat tensors under stable names; not copies."""
    state = {
        f"{name}.{entry}": value for name, module in modules.items() for entry, value in module.state_dict().items()
    }
    state["temperature.log_alpha"] = log_alpha.detach()
    for name, (optimizer, owner) in optimizers.items():
        for index, entry in enumerate(_entries(owner)):
            for slot, value in optimizer.state_of(index).items():
                state[f"optimizer.{name}.{entry}.{slot}"] = value
    return state


def load_learned_state(
    state: dict[str, Tensor], modules: Mapping[str, nn.Module], log_alpha: Tensor, optimizers: Optimizers
) -> None:
    """Take over `learned_state`, bit for bit.

    Raises:
        RuntimeError: names or shapes differ.
    """
    for name, module in modules.items():
        module.load_state_dict(part(state, f"{name}."))
    with torch.no_grad():
        log_alpha.copy_(state["temperature.log_alpha"])
    for name, (optimizer, owner) in optimizers.items():
        for index, entry in enumerate(_entries(owner)):
            optimizer.load(index, part(state, f"optimizer.{name}.{entry}."))


def take_actor(state: dict[str, Tensor], actor: nn.Module, log_alpha: Tensor) -> None:
    """Take another agent's actor and its temperature.

    Raises:
        RuntimeError: names or shapes differ.
    """
    actor.load_state_dict(part(state, "actor."))
    with torch.no_grad():
        log_alpha.copy_(state["temperature.log_alpha"])


def take_critic(state: dict[str, Tensor], critic: nn.Module, target_critic: nn.Module) -> None:
    """Take another agent's critic and its target.

    Raises:
        RuntimeError: names or shapes differ.
    """
    critic.load_state_dict(part(state, "critic."))
    target_critic.load_state_dict(part(state, "target_critic."))


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below ``prefix``, named by what follows it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _entries(module: nn.Module | None) -> list[str]:
    """Names of the parameters of an optimizer, in its order."""
    return ["log_alpha"] if module is None else [name for name, _ in module.named_parameters()]

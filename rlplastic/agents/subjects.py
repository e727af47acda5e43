"""What of an agent can be measured: its actor and critic as `rlplastic.plasticity.Subject`s, and its values and errors.

Everything here reads and changes nothing: batch norms use running statistics, and the noise of actions is the same in
every call, so that two readings differ only by what was learned in between. A batch is `rlplastic.agents.steps.Inputs`.

The TD target is the agent's own, y = r + discount (min Q'(s', a') - alpha log pi(a'|s')), and so is the loss: squared
error for scalar critics, cross-entropy with the projected target for categorical ones, squared errors of velocities for
flows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlplastic import seeding
from rlplastic.agents import steps
from rlplastic.agents.flashsac import networks as flashsac
from rlplastic.agents.flow import FlowCritic, FlowNoise, Velocity
from rlplastic.agents.heads import Categorical, Values, squashed_sample
from rlplastic.agents.sac import networks as sac
from rlplastic.agents.soft_actor_critic import SoftActorCritic
from rlplastic.agents.steps import Inputs
from rlplastic.plasticity import BOUNDED, PLAIN, ROW_NORMED, ModuleReader, Profile, Subject
from rlplastic.plasticity.activations import Kind

if TYPE_CHECKING:
    from rlplastic.replay.sample import Batch

Agent = SoftActorCritic[Any]


@dataclass(frozen=True)
class _Kind:
    """How networks of one kind are read; each callable takes the network first."""

    profile: Profile
    modes: tuple[bool, ...]
    """What follows the inputs: FlashSAC's networks are asked for running statistics."""
    layers: Callable[[nn.Module], dict[str, Kind] | None]
    """Hidden layers of a network by name, the last one last; None: its activation modules."""
    units: int
    """Dimension of the units in activations."""


def _norms(network: nn.Module) -> dict[str, Kind]:
    """FlashSAC's rectifiers are fused into its norms; the features that a head reads come last."""
    names = [name for name, _ in network.named_modules() if name.endswith(("expand_norm", "contract_norm"))]
    # The distilled critics of a flow are not the network whose rank counts: its field comes last.
    names.sort(key=lambda name: not name.startswith("distilled."))
    post = [name for name, _ in network.named_modules() if name.endswith("post_norm") and "distilled" not in name]
    return {name: "rectifier" for name in names} | {name: "linear" for name in post}


def _rectifiers(network: nn.Module) -> dict[str, Kind]:
    """The activation modules of a flow, those of its field last, as above."""
    names = [name for name, part in network.named_modules() if isinstance(part, nn.ReLU)]
    return {name: "rectifier" for name in sorted(names, key=lambda name: not name.startswith("distilled."))}


FLASHSAC = _Kind(profile=BOUNDED, modes=(False,), layers=_norms, units=-2)
SAC = _Kind(profile=PLAIN, modes=(), layers=lambda network: None, units=-1)
KINDS: dict[type[nn.Module], _Kind] = {
    flashsac.Actor: FLASHSAC,
    flashsac.Critic: FLASHSAC,
    flashsac.VelocityField: replace(FLASHSAC, profile=ROW_NORMED),
    sac.Actor: SAC,
    sac.Critic: SAC,
    sac.VelocityField: replace(SAC, layers=_rectifiers),
}
"""By the class of an actor, a critic, or the field of a flow."""


def kind_of(network: nn.Module) -> _Kind:
    """How an actor or critic is read."""
    read: object = network.field if isinstance(network, FlowCritic) else network
    return next(kind for network_type, kind in KINDS.items() if isinstance(read, network_type))


def subjects(agent: Agent) -> dict[str, Subject]:
    """The actor and the critic of an agent, for `rlplastic.plasticity.measure` on `Inputs` with one row or more.

    Ranks are those of the last hidden layer, so a batch of twice its width is enough.
    """
    learner = agent.learner
    actor, critic = learner.actor, learner.critic
    of_actor, of_critic = kind_of(actor), kind_of(critic)
    actor_reader = ModuleReader(
        actor, lambda inputs: _policy(actor, inputs.observation), of_actor.layers(actor), units=of_actor.units
    )
    critic_reader = ModuleReader(
        critic,
        lambda inputs: _run(critic, inputs.critic_observation, inputs.action),
        of_critic.layers(critic),
        units=of_critic.units,
    )
    categorical = isinstance(getattr(critic, "values", None), Categorical)
    return {
        "actor": Subject(
            "actor",
            actor,
            actor_reader,
            profile=of_actor.profile,
            loss=lambda inputs: policy_loss(agent, inputs),
            output=lambda inputs: _policy(actor, inputs.observation)[0][0, 0],
            rank_layers=_last(actor_reader),
        ),
        "critic": Subject(
            "critic",
            critic,
            critic_reader,
            members=members_of(agent),
            profile=of_critic.profile,
            loss=lambda inputs: td_losses(agent, inputs).mean(),
            output=lambda inputs: values(agent, inputs.critic_observation, inputs.action)[:, 0].mean(),
            logits=(lambda inputs: _output(critic, inputs.critic_observation, inputs.action)) if categorical else None,
            rank_layers=_last(critic_reader),
        ),
    }


def _policy(actor: nn.Module, observation: Tensor) -> tuple[Tensor, Tensor]:
    """Observations (B, D) to mean and log_std, (B, A) each."""
    mean, log_std = actor(observation, *kind_of(actor).modes)
    return mean, log_std


def _output(critic: nn.Module, observation: Tensor, action: Tensor) -> Tensor:
    """What a critic's head gives, (members, B, ...); of a flow its value, (members, B)."""
    output: Tensor = critic(observation, action, *kind_of(critic).modes)
    return output


def _run(critic: nn.Module, observation: Tensor, action: Tensor) -> None:
    """Once through every layer: of a flow, the field at t = 0 and the distilled critics."""
    if not isinstance(critic, FlowCritic):
        _output(critic, observation, action)
        return
    one_step(critic, observation, action)
    if critic.distilled is not None:
        critic.distilled(observation, action, *kind_of(critic).modes)


def one_step(critic: FlowCritic, observation: Tensor, action: Tensor, *modes: bool) -> Tensor:
    """The mean end of one Euler step from the bank's noises, (members, B): what a field says at t = 0."""
    field = critic.field.given(observation, action, *(modes or kind_of(critic).modes))
    return critic.trajectory(field, critic.bank, 1)[-1].mean(-2)


def _last(reader: ModuleReader) -> list[str]:
    """The name of a network's last hidden layer."""
    if reader.layers is not None:
        return [list(reader.layers)[-1]]
    return [[name for name, part in reader.module.named_modules() if isinstance(part, nn.ReLU)][-1]]


def members_of(agent: Agent) -> int:
    """How many critics the ensemble has."""
    return len(next(agent.learner.critic.parameters()))


def inputs_of(agent: Agent, batch: Batch) -> Inputs:
    """Copies of a sampled batch on the agent's device, which the sampler does not overwrite; without weights.

    Over several ranks those of all of them, one after another: what is read or decided on them is the same everywhere.
    """
    inputs = steps.inputs_of(batch, agent.critic_group)
    names = [field.name for field in fields(Inputs) if field.name != "weight"]
    copies = {name: getattr(inputs, name).to(agent.device, copy=True) for name in names}
    return Inputs(**{name: agent.group.joined_rows(tensor) for name, tensor in copies.items()})


def rows_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    """Rows ``start`` to ``stop`` of a batch: micro-batches, or single states."""
    given = {field.name: getattr(inputs, field.name) for field in fields(Inputs)}
    rows: dict[str, Any] = {name: tensor if tensor is None else tensor[start:stop] for name, tensor in given.items()}
    return Inputs(**rows)


def values(agent: Agent, observation: Tensor, action: Tensor) -> Tensor:
    """Q of every member, (members, B), in units of the scaled return.

    Args:
        agent: whose critic.
        observation: critic observations (B, D).
        action: (B, A).
    """
    return critic_values(agent.learner.critic, observation, action)


def critic_values(critic: nn.Module, observation: Tensor, action: Tensor) -> Tensor:
    """As `values`, of any critic network of a known kind, such as a copy."""
    output = _output(critic, observation, action)
    return output if isinstance(critic, FlowCritic) else _values_of(critic).expected(output)


def _values_of(critic: nn.Module) -> Values:
    assert isinstance(critic, flashsac.Critic | sac.Critic)
    return critic.values


def policy_mean(agent: Agent, observation: Tensor) -> Tensor:
    """Mean (B, A) of the policy before squashing, on policy observations (B, D)."""
    return _policy(agent.learner.actor, observation)[0]


@torch.no_grad()
def td_targets(agent: Agent, inputs: Inputs) -> Tensor:
    """The TD target (B,) of every row, of the target critic and actor as they are now."""
    return _targets(agent, inputs)[1]


def td_losses(agent: Agent, inputs: Inputs) -> Tensor:
    """The critic's loss (B,) of every row, mean over members; differentiable by the critic's parameters.

    A flow's is that of its velocities: what is distilled from it has no target of its own.
    """
    return losses_to(agent.learner.critic, inputs, outputs_target(agent, inputs))


def outputs_target(agent: Agent, inputs: Inputs) -> Tensor:
    """What the critic's outputs learn: probabilities (B, K) of a categorical one, else the TD target (B,)."""
    return _targets(agent, inputs)[0]


def losses_to(critic: nn.Module, inputs: Inputs, target: Tensor, number: int = 0) -> Tensor:
    """Losses (B,) of a critic of a known kind, such as a copy, against `outputs_target`; mean over members.

    Args:
        critic: whose loss.
        inputs: of which states and actions are read.
        target: as `outputs_target` gives it.
        number: of the draw of a flow's noise.
    """
    if isinstance(critic, FlowCritic):
        noise = flow_noise(critic, inputs, number)
        field = critic.field.given(inputs.critic_observation, inputs.action, *kind_of(critic).modes)
        return critic.losses(field, noise.source, noise.time, target).mean(0)
    output = _output(critic, inputs.critic_observation, inputs.action)
    return _values_of(critic).losses(output, target).mean(0)


@torch.no_grad()
def _targets(agent: Agent, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The target of the critic's outputs, and its mean (B,) before clipping."""
    learner = agent.learner
    target_critic = learner.target_critic
    noise = flow_noise(target_critic, inputs) if isinstance(target_critic, FlowCritic) else None
    action, log_prob = _actions(agent, inputs.next_observation, None if noise is None else noise.action)
    bonus = steps.entropy_bonus(learner.alpha(), log_prob, learner.backup_entropy)
    if isinstance(target_critic, FlowCritic) and noise is not None:
        endpoints = target_critic.trajectory(_next_field(target_critic, inputs, action), noise.target)[-1]
        return target_critic.target(endpoints, inputs.reward, inputs.discount, bonus)
    output = _output(target_critic, inputs.next_critic_observation, action)
    return _values_of(target_critic).target(output, inputs.reward, inputs.discount, bonus)


def _next_field(target_critic: FlowCritic, inputs: Inputs, action: Tensor) -> Velocity:
    """The target's velocities at s' with each noise's own action (m, B, A)."""
    observation = inputs.next_critic_observation
    if not isinstance(target_critic.field, flashsac.VelocityField):
        return target_critic.field.given(observation, action)
    repeated = observation.repeat(len(action), 1)
    return target_critic.field.given(repeated, action.flatten(0, 1), False, noises=len(action))


def flow_noise(critic: FlowCritic, inputs: Inputs, number: int = 0) -> FlowNoise:
    """Everything random of a flow's loss on ``inputs``, the same in every call with the same ``number``."""
    rng = seeding.generator(inputs.reward.device, 0, "noise of measurements", number)
    return critic.noise(len(inputs.reward), inputs.action.shape[-1], rng)


def policy_loss(agent: Agent, inputs: Inputs) -> Tensor:
    """E[alpha log pi(a|s) - Q(s, a)] with the value that the actor climbs, differentiable by the actor's parameters."""
    action, log_prob = _actions(agent, inputs.observation)
    critic = agent.learner.critic
    assert isinstance(critic, FlowCritic | flashsac.Critic | sac.Critic)
    value = critic.value(inputs.critic_observation, action, *kind_of(critic).modes)
    loss: Tensor = (agent.learner.alpha() * log_prob - value).mean()
    return loss


def _actions(agent: Agent, observation: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Actions (..., B, A) of the policy and log-probabilities (..., B), with the same noise in every call."""
    mean, log_std = _policy(agent.learner.actor, observation)
    if noise is None:
        rng = seeding.generator(mean.device, 0, "noise of measurements", 0)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
    return squashed_sample(mean, log_std, noise)


@dataclass(frozen=True)
class TDError:
    """The critic's mean loss on transitions that it never trained on, and how much more that is than in training."""

    held_out: float
    gap: float
    """Held-out minus training; grows where a critic learns its replay by heart."""


@torch.no_grad()
def held_out_td_error(agent: Agent, held_out: Inputs, trained: Inputs) -> TDError:
    """The held-out TD error (arXiv 2304.10466: the passive signal with the best evidence in deep RL) and its gap.

    Args:
        agent: whose critic.
        held_out: a batch of held-out episodes.
        trained: a batch of what training samples.
    """
    outside, inside = (float(td_losses(agent, inputs).mean()) for inputs in (held_out, trained))
    return TDError(outside, outside - inside)

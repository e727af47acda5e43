"""What of an agent can be measured: its actor and critic as `rlplastic.plasticity.Subject`s, and its values and errors.

Everything here reads and changes nothing: batch norms use running statistics, and the noise of actions is the same in
every call, so that two readings differ only by what was learned in between. A batch is `rlplastic.agents.steps.Inputs`.

The TD target is the agent's own, y = r + discount (min Q'(s', a') - alpha log pi(a'|s')), and so is the loss: squared
error for scalar critics, cross-entropy with the projected target for categorical ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlplastic import seeding
from rlplastic.agents import steps
from rlplastic.agents.flashsac import networks as flashsac
from rlplastic.agents.heads import squashed_sample
from rlplastic.agents.sac import networks as sac
from rlplastic.agents.soft_actor_critic import SoftActorCritic
from rlplastic.agents.steps import Inputs
from rlplastic.kernels.categorical import categorical_target
from rlplastic.plasticity import BOUNDED, PLAIN, ModuleReader, Profile, Subject

if TYPE_CHECKING:
    from rlplastic.replay.sample import Batch

Agent = SoftActorCritic[Any]


@dataclass(frozen=True)
class _Kind:
    """How networks of one kind are read; each callable takes the network first."""

    profile: Profile
    policy: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    """Observations (B, D) to mean and log_std, (B, A) each."""
    output: Callable[[nn.Module, Tensor, Tensor], Tensor]
    """Observations and actions to what the critic's head gives, (members, B, …)."""
    value: Callable[[nn.Module, Tensor], Tensor]
    """That to values (members, B)."""
    layers: Callable[[nn.Module], dict[str, Any] | None]
    """Hidden layers of a network by name, the last one last; None: its activation modules."""
    units: int
    """Dimension of the units in activations."""


def _norms(network: nn.Module) -> dict[str, Any]:
    """FlashSAC's rectifiers are fused into its batch norms; the features that a head reads come last."""
    blocks = range(len(network.trunk.blocks))  # type: ignore[union-attr,arg-type]
    norms = [f"trunk.blocks.{block}.{norm}" for block in blocks for norm in ("expand_norm", "contract_norm")]
    return dict.fromkeys(norms, "rectifier") | {"trunk.post_norm": "linear"}


FLASHSAC = _Kind(
    profile=BOUNDED,
    policy=lambda actor, observation: actor(observation, False),
    output=lambda critic, observation, action: critic(observation, action, False),
    value=lambda critic, logits: critic.head.expected(logits),  # type: ignore[operator,union-attr]
    layers=_norms,
    units=-2,
)
SAC = _Kind(
    profile=PLAIN,
    policy=lambda actor, observation: actor(observation),
    output=lambda critic, observation, action: critic(observation, action),
    value=lambda critic, value: value,
    layers=lambda network: None,
    units=-1,
)
KINDS: dict[type[nn.Module], _Kind] = {
    flashsac.Actor: FLASHSAC,
    flashsac.Critic: FLASHSAC,
    sac.Actor: SAC,
    sac.Critic: SAC,
}
"""By the class of an actor or critic."""


def subjects(agent: Agent) -> dict[str, Subject]:
    """The actor and the critic of an agent, for `rlplastic.plasticity.measure` on `Inputs` with one row or more.

    Ranks are those of the last hidden layer, so a batch of twice its width is enough.
    """
    learner = agent.learner
    actor, critic = learner.actor, learner.critic
    of_actor, of_critic = KINDS[type(actor)], KINDS[type(critic)]
    actor_reader = ModuleReader(
        actor, lambda inputs: of_actor.policy(actor, inputs.observation), of_actor.layers(actor), units=of_actor.units
    )
    critic_reader = ModuleReader(
        critic,
        lambda inputs: of_critic.output(critic, inputs.critic_observation, inputs.action),
        of_critic.layers(critic),
        units=of_critic.units,
    )
    categorical = isinstance(critic, flashsac.Critic)
    return {
        "actor": Subject(
            "actor",
            actor,
            actor_reader,
            profile=of_actor.profile,
            loss=lambda inputs: policy_loss(agent, inputs),
            output=lambda inputs: of_actor.policy(actor, inputs.observation)[0][0, 0],
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
            logits=(lambda i: of_critic.output(critic, i.critic_observation, i.action)) if categorical else None,
            rank_layers=_last(critic_reader),
        ),
    }


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
    kind = KINDS[type(critic)]
    return kind.value(critic, kind.output(critic, observation, action))


def policy_mean(agent: Agent, observation: Tensor) -> Tensor:
    """Mean (B, A) of the policy before squashing, on policy observations (B, D)."""
    actor = agent.learner.actor
    return KINDS[type(actor)].policy(actor, observation)[0]


@torch.no_grad()
def td_targets(agent: Agent, inputs: Inputs) -> Tensor:
    """The TD target (B,) of every row, of the target critic and actor as they are now."""
    return _targets(agent, inputs)[1]


def td_losses(agent: Agent, inputs: Inputs) -> Tensor:
    """The critic's loss (B,) of every row, mean over members; differentiable by the critic's parameters."""
    learner = agent.learner
    target, mean = _targets(agent, inputs)
    output = KINDS[type(learner.critic)].output(learner.critic, inputs.critic_observation, inputs.action)
    losses = (output - mean).square() if target is None else -(target * F.log_softmax(output, -1)).sum(-1)
    return losses.mean(0)


@torch.no_grad()
def _targets(agent: Agent, inputs: Inputs) -> tuple[Tensor | None, Tensor]:
    """Probabilities (B, atoms) of the target where the critic is categorical, and its mean (B,)."""
    learner = agent.learner
    action, log_prob = _actions(agent, inputs.next_observation)
    bonus = -learner.alpha() * log_prob if learner.backup_entropy else torch.zeros_like(log_prob)
    target_critic = learner.target_critic
    output = KINDS[type(target_critic)].output(target_critic, inputs.next_critic_observation, action)
    if not isinstance(target_critic, flashsac.Critic):
        return None, inputs.reward + inputs.discount * (output.amin(0) + bonus)
    head = target_critic.head
    return categorical_target(output, inputs.reward, inputs.discount, bonus, head.atoms, head.support)


def policy_loss(agent: Agent, inputs: Inputs) -> Tensor:
    """E[alpha log pi(a|s) - min Q(s, a)], differentiable by the actor's parameters."""
    action, log_prob = _actions(agent, inputs.observation)
    value = values(agent, inputs.critic_observation, action).amin(0)
    loss: Tensor = (agent.learner.alpha() * log_prob - value).mean()
    return loss


def _actions(agent: Agent, observation: Tensor) -> tuple[Tensor, Tensor]:
    """Actions (B, A) of the policy and their log-probabilities (B,), with the same noise in every call."""
    actor = agent.learner.actor
    mean, log_std = KINDS[type(actor)].policy(actor, observation)
    rng = seeding.generator(mean.device, 0, "noise of measurements", 0)
    return squashed_sample(mean, log_std, torch.randn(mean.shape, generator=rng, device=mean.device))


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

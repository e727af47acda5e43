"""Actor and critic of an agent as `rlplastic.plasticity.patient.Patient`s: what probes and interventions work on.

Every kind of network is one function here. Batch norms see what they see in training: FlashSAC's networks read [s; s'].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from rlplastic import seeding
from rlplastic.agents import steps
from rlplastic.agents.flashsac import FlashSAC, networks, update
from rlplastic.agents.layers import NormBounds, Trunk, UnitLinear
from rlplastic.agents.sac import SAC
from rlplastic.agents.sac import networks as sac_networks
from rlplastic.agents.sac import update as sac_update
from rlplastic.agents.steps import Inputs
from rlplastic.agents.subjects import members_of
from rlplastic.plasticity.activations import Kind, ModuleReader, untouched
from rlplastic.plasticity.patient import Hidden, Patient, States, hidden_layers


def patients(agent: FlashSAC | SAC, inputs: Inputs | None = None) -> dict[str, Patient]:
    """The agent's ``actor`` and ``critic``, live.

    Args:
        agent: whose networks they are.
        inputs: rows of its replay, see `rlplastic.agents.subjects.inputs_of`: they re-estimate running statistics and
            score units, and ``patient.states`` is what a probe wants. Without them, what needs them refuses.
    """
    return _flashsac(agent, inputs) if isinstance(agent, FlashSAC) else _sac(agent, inputs)


def _flashsac(agent: FlashSAC, inputs: Inputs | None) -> dict[str, Patient]:
    learner = agent.learner
    actor, critic = learner.actor, learner.critic
    assert isinstance(actor, networks.Actor) and isinstance(critic, networks.Critic)

    def bound(module: nn.Module) -> Callable[[], None]:
        return NormBounds(module).project

    def fresh(name: str, make: Callable[[], nn.Module], key: int) -> nn.Module:
        network = _fresh(agent, name, make, key)
        bound(network)()
        return network

    def critic_output(module: nn.Module, states: States, training: bool) -> Tensor:
        assert isinstance(module, networks.Critic)
        return module.head.expected(module(*states, training))

    def policy_mean(module: nn.Module, states: States, training: bool) -> Tensor:
        mean: Tensor = module(*states, training)[0]
        return mean

    return {
        "actor": Patient(
            "actor",
            actor,
            learner.actor_optimizer,
            partial(fresh, "actor", lambda: networks.actor_like(actor.state_dict())),
            states=() if inputs is None else (torch.cat((inputs.observation, inputs.next_observation)),),
            hidden=_expansions(actor.trunk),
            head=_named(actor, "head"),
            unit_rows=_unit_rows(actor),
            output=policy_mean,
            bound=bound,
            reader=_bounded_reader,
            loss=None if inputs is None else _actor_loss(update.actor_loss, learner, inputs, 2),
            temperature=(learner.log_alpha, learner.temperature_optimizer),
        ),
        "critic": Patient(
            "critic",
            critic,
            learner.critic_optimizer,
            partial(fresh, "critic", partial(_bounded_critic_like, critic)),
            states=() if inputs is None else _critic_states(actor, inputs),
            target=learner.target_critic,
            members=members_of(agent),
            hidden=_expansions(critic.trunk),
            head=_named(critic, "head"),
            unit_rows=_unit_rows(critic),
            output=critic_output,
            bound=bound,
            reader=_bounded_reader,
            loss=None if inputs is None else _critic_loss(update.critic_loss, learner, inputs),
        ),
    }


def _sac(agent: SAC, inputs: Inputs | None) -> dict[str, Patient]:
    learner = agent.learner
    actor, critic = learner.actor, learner.critic
    assert isinstance(actor, sac_networks.Actor) and isinstance(critic, sac_networks.Critic)
    members = members_of(agent)

    def values(module: nn.Module, states: States, _training: bool) -> Tensor:
        found: Tensor = module(*states)
        return found

    def policy_mean(module: nn.Module, states: States, _training: bool) -> Tensor:
        mean: Tensor = module(*states)[0]
        return mean

    def reader(module: nn.Module) -> ModuleReader:
        return ModuleReader(module, lambda states: module(*states))

    return {
        "actor": Patient(
            "actor",
            actor,
            learner.actor_optimizer,
            partial(_fresh, agent, "actor", lambda: sac_networks.actor_like(actor.state_dict())),
            states=() if inputs is None else (inputs.observation,),
            hidden=hidden_layers(actor.trunk, "trunk.", ("mean.weight", "log_std.weight")),
            head=(*_named(actor, "mean"), *_named(actor, "log_std")),
            output=policy_mean,
            reader=reader,
            loss=None if inputs is None else _actor_loss(sac_update.actor_loss, learner, inputs, 1),
            temperature=(learner.log_alpha, learner.temperature_optimizer),
        ),
        "critic": Patient(
            "critic",
            critic,
            learner.critic_optimizer,
            partial(_fresh, agent, "critic", partial(_plain_critic_like, critic)),
            states=() if inputs is None else (inputs.critic_observation, inputs.action),
            target=learner.target_critic,
            members=members,
            hidden=hidden_layers(critic.trunk, "trunk.", ("head.weight",), members),
            head=_named(critic, "head"),
            output=values,
            reader=reader,
            loss=None if inputs is None else _critic_loss(sac_update.critic_loss, learner, inputs),
        ),
    }


def _fresh(agent: FlashSAC | SAC, name: str, make: Callable[[], nn.Module], key: int) -> nn.Module:
    """A network initialised as the agent's own was, from randomness of its own: the same on all ranks and devices."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeding.key("fresh", agent.seed, name, key))
        return make().to(agent.device)


def _bounded_critic_like(critic: networks.Critic) -> networks.Critic:
    members, width, inputs = critic.trunk.embed.weight.shape
    atoms = critic.head.bias.shape[-1]
    return networks.Critic(inputs, 0, width, len(critic.trunk.blocks), atoms, critic.head.support, members)


def _plain_critic_like(critic: sac_networks.Critic) -> sac_networks.Critic:
    weights = [part.weight for part in critic.trunk if isinstance(part, sac_networks.Linear)]
    members, width, inputs = weights[0].shape
    normed = any(isinstance(part, sac_networks.LayerNorm) for part in critic.trunk)
    return sac_networks.Critic(inputs, 0, width, len(weights), members, normed)


def _expansions(trunk: Trunk) -> tuple[Hidden, ...]:
    """The units of the inverted bottlenecks. Those that write to the residual stream share their outgoing weights."""
    blocks = [f"trunk.blocks.{index}" for index in range(len(trunk.blocks))]
    return tuple(
        Hidden(
            f"{block}.expand_norm",
            (f"{block}.expand.weight", f"{block}.expand_norm.gamma", f"{block}.expand_norm.beta"),
            (f"{block}.contract.weight",),
        )
        for block in blocks
    )


def _bounded_reader(module: nn.Module) -> ModuleReader:
    """Reads units as they are in training, after batch statistics."""
    assert isinstance(module, networks.Actor | networks.Critic)
    layers: dict[str, Kind] = {layer.name: "rectifier" for layer in _expansions(module.trunk)}
    return ModuleReader(module, lambda states: module(*states, True), layers, units=-2)


def _named(module: nn.Module, part: str) -> tuple[str, ...]:
    return tuple(f"{part}.{name}" for name, _ in module.get_submodule(part).named_parameters())


def _unit_rows(module: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}.weight" for name, part in module.named_modules() if isinstance(part, UnitLinear))


@torch.no_grad()
def _critic_states(actor: networks.Actor, inputs: Inputs) -> States:
    """[s; s'] and [a; a'], with the policy's mean for a'."""
    following = torch.tanh(actor(inputs.next_observation)[0])
    observations = torch.cat((inputs.critic_observation, inputs.next_critic_observation))
    return observations, torch.cat((inputs.action, following))


def _actor_loss(
    loss: Callable[..., tuple[Tensor, steps.Metrics]], learner: steps.Learner, inputs: Inputs, rows: int
) -> Callable[[nn.Module], Tensor]:
    """The actor's loss at the policy's mean actions; ``rows`` of noise for each of the batch."""
    noise = torch.zeros_like(inputs.action).repeat(rows, 1)
    return lambda module: loss(module, learner.critic, learner.alpha(), inputs, noise)[0]


def _critic_loss(
    loss: Callable[..., tuple[Tensor, steps.Metrics]], learner: steps.Learner, inputs: Inputs
) -> Callable[[nn.Module], Tensor]:
    """The critic's loss with the policy's mean next actions; the target's running statistics are put back."""

    def of(module: nn.Module) -> Tensor:
        with untouched(learner.target_critic):
            target, alpha = learner.target_critic, learner.alpha()
            noise = torch.zeros_like(inputs.action)
            return loss(learner.actor, module, target, alpha, inputs, noise, learner.backup_entropy)[0]

    return of

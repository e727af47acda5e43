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
from rlplastic.agents.base import Agent
from rlplastic.agents.flashsac import FlashSAC, networks, update
from rlplastic.agents.flow import FlowCritic
from rlplastic.agents.layers import NormBounds, ResidualBlock, RowNormBlock, UnitLinear
from rlplastic.agents.sac import SAC
from rlplastic.agents.sac import networks as sac_networks
from rlplastic.agents.sac import update as sac_update
from rlplastic.agents.steps import Inputs
from rlplastic.agents.subjects import flow_noise, members_of, one_step
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.activations import Kind, ModuleReader, untouched
from rlplastic.plasticity.patient import Hidden, Patient, States, Temperature, hidden_layers


def readable(agent: Agent, what: str) -> FlashSAC | SAC:
    """An agent whose networks are known here.

    Args:
        agent: any.
        what: the setting that wants to read it.

    Raises:
        ConfigurationError: its networks are not known, as those of agents from outside.
    """
    if not isinstance(agent, FlashSAC | SAC):
        raise ConfigurationError(
            f"{what} reads the networks of agent=flashsac and agent=sac, and {type(agent).__name__} is another agent; "
            "leave it out, or use rlplastic.plasticity on its networks yourself (docs/plasticity.md)"
        )
    return agent


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
    assert isinstance(actor, networks.Actor) and isinstance(critic, networks.Critic | FlowCritic)
    loss = update.flow_critic_loss if isinstance(critic, FlowCritic) else update.critic_loss

    def bound(module: nn.Module) -> Callable[[], None]:
        return NormBounds(module).project

    def fresh(name: str, make: Callable[[], nn.Module], key: int) -> nn.Module:
        network = _fresh(agent, name, make, key)
        bound(network)()
        return network

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
            hidden=_expansions(actor),
            head=_named(actor, "head"),
            unit_rows=_unit_rows(actor),
            output=policy_mean,
            bound=bound,
            reader=_bounded_reader,
            loss=None if inputs is None else _actor_loss(update.actor_loss, learner, inputs, 2),
            temperature=_temperature(agent),
        ),
        "critic": Patient(
            "critic",
            critic,
            learner.critic_optimizer,
            partial(fresh, "critic", partial(_bounded_critic_like, critic)),
            states=() if inputs is None else _critic_states(actor, inputs),
            target=learner.target_critic,
            members=members_of(agent),
            hidden=_expansions(critic),
            head=_heads(critic),
            unit_rows=_unit_rows(critic),
            output=_values,
            bound=bound,
            reader=_bounded_reader,
            loss=None if inputs is None else _critic_loss(loss, learner, inputs),
        ),
    }


def _sac(agent: SAC, inputs: Inputs | None) -> dict[str, Patient]:
    learner = agent.learner
    actor, critic = learner.actor, learner.critic
    assert isinstance(actor, sac_networks.Actor) and isinstance(critic, sac_networks.Critic | FlowCritic)
    loss = sac_update.flow_critic_loss if isinstance(critic, FlowCritic) else sac_update.critic_loss
    members = members_of(agent)

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
            temperature=_temperature(agent),
        ),
        "critic": Patient(
            "critic",
            critic,
            learner.critic_optimizer,
            partial(_fresh, agent, "critic", partial(_plain_critic_like, critic)),
            states=() if inputs is None else (inputs.critic_observation, inputs.action),
            target=learner.target_critic,
            members=members,
            hidden=_sequences(critic, members),
            head=_heads(critic),
            output=lambda module, states, _training: _values(module, states),
            reader=lambda module: ModuleReader(module, lambda states: _values(module, states)),
            loss=None if inputs is None else _critic_loss(loss, learner, inputs),
        ),
    }


def _temperature(agent: FlashSAC | SAC) -> Temperature:
    learner, initial = agent.learner, agent.config.initial_alpha
    assert initial is not None
    return Temperature(learner.log_alpha, learner.temperature_optimizer, initial)


def _fresh(agent: FlashSAC | SAC, name: str, make: Callable[[], nn.Module], key: int) -> nn.Module:
    """A network initialised as the agent's own was, from randomness of its own: the same on all ranks and devices."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seeding.key("fresh", agent.seed, name, key))
        return make().to(agent.device)


def _bounded_critic_like(critic: networks.Critic | FlowCritic) -> nn.Module:
    """One of the same sizes, newly initialised; actions count as observations, which sizes do not tell apart."""
    if isinstance(critic, FlowCritic):
        assert isinstance(critic.field, networks.VelocityField)
        width, inputs = critic.field.embed.weight.shape[-2:]
        return networks.make_critic(inputs, 0, width, len(critic.field.blocks), critic.settings)
    members, width, inputs = critic.trunk.embed.weight.shape
    return networks.Critic(inputs, 0, width, len(critic.trunk.blocks), critic.values, members)


def _plain_critic_like(critic: sac_networks.Critic | FlowCritic) -> nn.Module:
    """As above."""
    field = critic.field if isinstance(critic, FlowCritic) else critic
    assert isinstance(field, sac_networks.Critic | sac_networks.VelocityField)
    trunk = field.trunk
    weights = [part.weight for part in trunk if isinstance(part, sac_networks.Linear)]
    normed = any(isinstance(part, sac_networks.LayerNorm) for part in trunk)
    members, width, inputs = weights[0].shape
    if isinstance(critic, FlowCritic):
        assert isinstance(field, sac_networks.VelocityField)
        return sac_networks.make_critic(field.num_inputs, 0, width, len(weights), critic.settings, normed)
    return sac_networks.Critic(inputs, 0, width, len(weights), critic.values, members, normed)


def _values(critic: nn.Module, states: States, *modes: bool) -> Tensor:
    """Values (members, B); of a flow (members, B, 1 or 2), what its field says at t = 0 and what is distilled from it.

    So every layer runs once, and a probe does not pay for K Euler steps.
    """
    if isinstance(critic, FlowCritic):
        observation, action = states
        found = [one_step(critic, observation, action, *modes)]
        if critic.distilled is not None:
            found.append(critic.distilled(observation, action, *modes))
        return torch.stack(found, -1)
    assert isinstance(critic, networks.Critic | sac_networks.Critic)
    return critic.values.expected(critic(*states, *modes))


def _expansions(network: nn.Module) -> tuple[Hidden, ...]:
    """The units of the inverted bottlenecks. Those that write to the residual stream share their outgoing weights."""
    blocks = [name for name, part in network.named_modules() if isinstance(part, ResidualBlock | RowNormBlock)]
    found = []
    for block in blocks:
        norm = [
            f"{block}.expand_norm.{name}"
            for name, _ in network.get_submodule(f"{block}.expand_norm").named_parameters()
        ]
        found.append(Hidden(f"{block}.expand_norm", (f"{block}.expand.weight", *norm), (f"{block}.contract.weight",)))
    return tuple(found)


def _sequences(critic: sac_networks.Critic | FlowCritic, members: int) -> tuple[Hidden, ...]:
    """Hidden layers of a plain critic, or of a flow's field and its distilled critics."""
    found: tuple[Hidden, ...] = ()
    for name, part in critic.named_modules():
        if isinstance(part, sac_networks.Critic | sac_networks.VelocityField):
            prefix = f"{name}." if name else ""
            found += hidden_layers(part.trunk, f"{prefix}trunk.", (f"{prefix}head.weight",), members)
    return found


def _heads(critic: nn.Module) -> tuple[str, ...]:
    """Parameters of the last layers: a flow has that of its field and that of its distilled critics."""
    return tuple(name for name, _ in critic.named_parameters() if "head" in name.split("."))


def _bounded_reader(module: nn.Module) -> ModuleReader:
    """Reads units as they are in training, after batch statistics."""
    layers: dict[str, Kind] = {layer.name: "rectifier" for layer in _expansions(module)}
    if isinstance(module, networks.Actor):
        return ModuleReader(module, lambda states: module(*states, True), layers, units=-2)
    return ModuleReader(module, lambda states: _values(module, states, True), layers, units=-2)


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
            noise: steps.CriticNoise = torch.zeros_like(inputs.action)
            if isinstance(module, FlowCritic):
                of_flow = flow_noise(module, inputs)
                noise = of_flow._replace(action=torch.zeros_like(of_flow.action))
            return loss(learner.actor, module, target, alpha, inputs, noise, learner.backup_entropy)[0]

    return of

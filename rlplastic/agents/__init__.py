"""Agents: `base` is what the loop asks for; `make_agent` builds one from a configuration.

An agent may live in anybody's package: `adopt` makes it known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

from rlplastic.agents.base import Agent, AgentKind, Setting
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.flashsac import networks as flashsac_networks
from rlplastic.agents.flow import BINS, FREQUENCIES
from rlplastic.agents.graphs import Record
from rlplastic.agents.sac import SAC
from rlplastic.agents.sac import networks as sac_networks
from rlplastic.command_line import first_line
from rlplastic.config import (
    VARIANTS,
    AgentConfig,
    CategoricalCriticConfig,
    Config,
    FlashSACConfig,
    FlowCriticConfig,
    SACConfig,
)
from rlplastic.distributed import ALONE, Group
from rlplastic.errors import ConfigurationError


def _flashsac(config: Config, **common: Any) -> FlashSAC:  # noqa: ANN401 - what `make_agent` hands to all agents
    assert isinstance(config.agent, FlashSACConfig)
    bf16 = config.precision == "bf16"
    return FlashSAC(agent=config.agent, critic=config.critic, bf16=bf16, kernels=config.kernels, **common)


def _sac(config: Config, **common: Any) -> SAC:  # noqa: ANN401
    assert isinstance(config.agent, SACConfig)
    return SAC(agent=config.agent, critic=config.critic, **common)


SAC_SETTINGS: dict[str, tuple[Setting, str]] = {
    "precision": ("float32", "agent=sac has no bfloat16"),
    "env.num_envs": (4, "few, since every transition has an update"),
    "agent.critic_width": (256, "Stable-Baselines3's"),
    "agent.actor_width": (256, "Stable-Baselines3's"),
    "replay.batch_size": (256, "Stable-Baselines3's"),
    "replay_ratio": (1.0, "Stable-Baselines3's"),
}

AGENTS: dict[str, AgentKind] = {
    "flashsac": AgentKind(FlashSACConfig, _flashsac, flashsac_networks.actor_like, FlashSAC.COLUMNS),
    "sac": AgentKind(SACConfig, _sac, sac_networks.actor_like, SAC.COLUMNS, SAC_SETTINGS),
}
"""By `agent.name`."""


def adopt(name: str, package: str) -> None:
    """Make an agent of another package known as ``agent=<name>``; doing it again changes nothing.

    Args:
        name: its `agent.name`.
        package: import path of a module whose ``AGENT`` is the `AgentKind`.

    Raises:
        ConfigurationError: the module cannot be imported or has no ``AGENT``, or the name is taken.
    """
    expected = "expected a module on Python's path (PYTHONPATH=…) with AGENT, an rlplastic.agents.base.AgentKind"
    try:
        kind = import_module(package).AGENT
    except (ImportError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigurationError(
            f"agent={name} names package={package!r}, which failed ({reason}); {expected}"
        ) from error
    if not isinstance(kind, AgentKind) or not issubclass(kind.config, AgentConfig):
        raise ConfigurationError(f"AGENT of {package} is a {type(kind).__name__}; {expected}")
    if AGENTS.setdefault(name, kind) is not kind:
        raise ConfigurationError(f"agent.name={name} of {package} is taken; expected a name of its own")
    VARIANTS["agent"][name] = kind.config


class _Sizes(NamedTuple):
    """What memory follows from; norms and biases are left out."""

    critic: int
    """Parameters of one member."""
    actor: int
    """Parameters of the actor."""
    of_critic: int
    """Activations of a row in one member, that are kept for the gradient."""
    of_actor: int
    """Activations of a row in the actor."""


def _sizes(config: Config, observation_dims: Mapping[str, int], action_dim: int) -> _Sizes:
    agent = config.agent
    assert agent.critic_width and agent.actor_width, "resolve the configuration first"
    width, narrow = agent.critic_width, agent.actor_width
    policy = observation_dims["policy"]
    if isinstance(agent, SACConfig):
        deep, shallow = agent.critic_depth, agent.actor_depth
        kept = 3 if agent.layer_norm else 2  # before and after the ReLU, and the norm between
        hidden, of_hidden = (deep - 1) * width**2, kept * deep * width
        actor = policy * narrow + (shallow - 1) * narrow**2 + 2 * narrow * action_dim
        of_actor = policy + kept * shallow * narrow
    elif isinstance(agent, FlashSACConfig):
        blocks = agent.num_blocks
        hidden, of_hidden = blocks * 8 * width**2, width * (1 + 5 * blocks)
        actor = policy * narrow + blocks * 8 * narrow**2 + 2 * narrow * action_dim
        of_actor = policy + narrow * (1 + 5 * blocks)
    else:
        return _Sizes(0, 0, 0, 0)  # nobody told what an agent from outside is made of
    critic, of_critic = _critic_sizes(config, observation_dims.get("critic", policy) + action_dim, hidden, of_hidden)
    return _Sizes(critic, actor, of_critic, of_actor)


def _critic_sizes(config: Config, inputs: int, hidden: int, of_hidden: int) -> tuple[int, int]:
    """Parameters of a member and activations of a row; a trunk has ``hidden`` and ``of_hidden`` between its ends."""
    critic, width = config.critic, config.agent.critic_width
    assert width
    if isinstance(critic, FlowCriticConfig):
        encoded = BINS + len(FREQUENCIES[critic.time_embedding])
        networks = 2 if critic.reading == "distilled" else 1
        of_field = inputs + critic.noises * (encoded + of_hidden + 1)
        of_distilled = (networks - 1) * (inputs + of_hidden + 1)
        return networks * (inputs * width + hidden + width) + encoded * width, of_field + of_distilled
    outputs = critic.num_atoms if isinstance(critic, CategoricalCriticConfig) else 1
    return inputs * width + hidden + width * outputs, inputs + of_hidden + outputs


def parameter_bytes(config: Config, observation_dims: Mapping[str, int], action_dim: int) -> int:
    """Bytes of parameters, their gradients, Adam's moments and the target critic; float32, norms left out."""
    sizes = _sizes(config, observation_dims, action_dim)
    return 4 * (5 * config.critic.num_members * sizes.critic + 4 * sizes.actor)


def working_bytes(config: Config, observation_dims: Mapping[str, int], action_dim: int) -> int:
    """Bytes that the first updates add on a CPU: gradients, Adam's moments, and activations, kept and in passing.

    An estimate. Of every activation there are about six: before and after its norm, for prediction and target, and
    their gradients.
    """
    assert config.replay.batch_size, "resolve the configuration first"
    sizes = _sizes(config, observation_dims, action_dim)
    row = config.critic.num_members * sizes.of_critic + sizes.of_actor
    moments = parameter_bytes(config, observation_dims, action_dim) * 3 // 5
    return moments + 6 * 4 * row * 2 * config.replay.batch_size


def make_agent(
    config: Config,
    observation_dims: Mapping[str, int],
    action_dim: int,
    compile: Callable[[Any], Any] = lambda function: function,
    group: Group = ALONE,
    record: Record | None = None,
) -> Agent:
    """The agent that a resolved configuration names; ``compile`` is applied to the gradients of its losses.

    ``record`` makes graphs of its updates, see `rlplastic.agents.graphs`. Over several ranks the configuration is one
    rank's share.
    """
    assert config.env.num_envs is not None, "resolve the configuration first"
    return AGENTS[config.agent.name].make(
        config,
        observation_dims=dict(observation_dims),
        action_dim=action_dim,
        num_envs=config.env.num_envs,
        seed=config.seed,
        planned_updates=config.schedule.horizon if config.schedule.kind == "horizon" else None,
        device=config.device,
        compile=compile,
        group=group,
        bn_sync=config.distributed.bn_sync,
        record=record,
    )

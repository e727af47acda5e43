"""Agents: `base` is what the loop asks for; `make_agent` builds one from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlplastic.agents.base import Agent
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.config import Config


def _flashsac(
    config: Config, observation_dims: Mapping[str, int], action_dim: int, compile: Callable[[Any], Any]
) -> FlashSAC:
    assert config.env.num_envs is not None, "resolve the configuration first"
    return FlashSAC(
        dict(observation_dims),
        action_dim,
        config.env.num_envs,
        config.agent,
        config.critic,
        seed=config.seed,
        planned_updates=config.schedule.horizon if config.schedule.kind == "horizon" else None,
        device=config.device,
        bf16=config.precision == "bf16",
        kernels=config.kernels,
        compile=compile,
    )


FACTORIES: dict[str, Callable[..., Agent]] = {"flashsac": _flashsac}
"""Agent by `agent.name`."""


def parameter_bytes(config: Config, observation_dims: Mapping[str, int], action_dim: int) -> int:
    """Bytes of parameters, their gradients, Adam's moments and the target critic; float32, norms left out."""
    agent, members = config.agent, config.critic.num_members
    assert agent.critic_width and agent.actor_width, "resolve the configuration first"

    def trunk(inputs: int, width: int) -> int:
        return inputs * width + agent.num_blocks * 8 * width**2

    critic = trunk(observation_dims.get("critic", observation_dims["policy"]) + action_dim, agent.critic_width)
    critic += agent.critic_width * config.critic.num_atoms
    actor = trunk(observation_dims["policy"], agent.actor_width) + 2 * agent.actor_width * action_dim
    return 4 * (5 * members * critic + 4 * actor)


def working_bytes(config: Config, observation_dims: Mapping[str, int], action_dim: int) -> int:
    """Bytes that the first updates add on a CPU: gradients, Adam's moments, and activations, kept and in passing.

    An estimate. Of every activation there are about six: before and after its norm, for prediction and target, and
    their gradients.
    """
    agent, members = config.agent, config.critic.num_members
    assert agent.critic_width and agent.actor_width and config.replay.batch_size, "resolve the configuration first"
    of_critic = observation_dims.get("critic", observation_dims["policy"]) + action_dim
    row = members * (of_critic + agent.critic_width * (1 + 5 * agent.num_blocks) + config.critic.num_atoms)
    row += observation_dims["policy"] + agent.actor_width * (1 + 5 * agent.num_blocks)
    moments = parameter_bytes(config, observation_dims, action_dim) * 3 // 5
    return moments + 6 * 4 * row * 2 * config.replay.batch_size


def make_agent(
    config: Config,
    observation_dims: Mapping[str, int],
    action_dim: int,
    compile: Callable[[Any], Any] = lambda function: function,
) -> Agent:
    """The agent that a resolved configuration names; ``compile`` is applied to its loss functions."""
    return FACTORIES[config.agent.name](config, observation_dims, action_dim, compile)

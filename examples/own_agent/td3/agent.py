"""TD3 as rlplastic's loop sees it: every method that `rlplastic.agents.base.Agent` asks for, in its order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlplastic import seeding
from rlplastic.agents import steps
from rlplastic.agents.adam import Adam
from rlplastic.agents.exploration import gaussian_noise, uniform_actions
from rlplastic.agents.graphs import Record
from rlplastic.agents.heads import Scalar
from rlplastic.agents.pooling import reduction
from rlplastic.agents.sac.networks import Critic
from rlplastic.config import AgentConfig, Config
from rlplastic.distributed import Group
from rlplastic.envs.base import Observation, Step
from rlplastic.errors import ConfigurationError
from rlplastic.replay.sample import Batch
from td3 import update
from td3.networks import Actor


@dataclass
class TD3Config(AgentConfig):
    """What TD3 adds; defaults are the published values."""

    name: str = "td3"
    target_rate: float = 0.005
    actor_every: int = 2
    exploration_std: float = 0.1
    """Deviation of the noise on actions while exploring."""
    smoothing_std: float = 0.2
    """Deviation of the noise on the target's actions."""
    smoothing_clip: float = 0.5
    """Where that noise is cut off."""


def make(
    config: Config,
    num_envs: int,
    planned_updates: int | None,
    record: Record | None,
    **common: Any,  # noqa: ANN401
) -> TD3:
    """What `agent=td3` builds from a resolved configuration and what `rlplastic.agents.make_agent` hands to all."""
    assert isinstance(config.agent, TD3Config)
    if config.critic.kind != "scalar" or config.agent.reward_scaling:
        raise ConfigurationError("agent=td3 learns plain values; leave critic=… and agent.reward_scaling out")
    if record is not None:
        raise ConfigurationError("agent=td3 records no graphs; expected cuda_graphs=false")
    return TD3(config.agent, config.critic.num_members, **common)


class TD3:
    """Twin delayed deep deterministic policy gradient; noise is a function of (seed, rank, step) alone."""

    COLUMNS: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        agent: TD3Config,
        members: int,
        *,
        observation_dims: dict[str, int],
        action_dim: int,
        seed: int,
        device: str,
        compile: Callable[[Any], Any],
        group: Group,
        bn_sync: str,
    ) -> None:
        assert agent.actor_width and agent.critic_width, "resolve the configuration first"
        self.config, self.seed, self.group = agent, seed, group
        self.device, self.action_dim = torch.device(device), action_dim
        self.updates = 0
        self.td_error: Tensor | None = None
        self.critic_group = "critic" if "critic" in observation_dims else "policy"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.key("networks", seed))
            actor = Actor(observation_dims["policy"], action_dim, agent.actor_width)
            inputs = observation_dims[self.critic_group], action_dim
            critic = Critic(*inputs, agent.critic_width, 2, Scalar(), members)
        self.actor, self.critic = actor.to(self.device), critic.to(self.device)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.optimizers = {
            name: Adam(module.parameters(), reduce=reduction(group, bn_sync, module))
            for name, module in (("actor", self.actor), ("critic", self.critic))
        }
        self.gradients = [compile(steps.gradient_of(loss)) for loss in (update.critic_loss, update.actor_loss)]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The networks by name."""
        return {name: getattr(self, name) for name in ("actor", "critic", "target_actor", "target_critic")}

    @property
    def reward_scale(self) -> Tensor:
        """Rewards stay what they are."""
        return torch.ones((), device=self.device)

    def explore(
        self, observation: Observation, step: int, active: NDArray[np.bool_], uniform: bool
    ) -> NDArray[np.float32]:
        """pi(s) + noise, cut off to [-1, 1], or uniform random actions."""
        rows = len(active), self.action_dim, self.seed, step, self.group.rank
        if uniform:
            return uniform_actions(*rows)
        return np.clip(self.act(observation) + np.float32(self.config.exploration_std) * gaussian_noise(*rows), -1, 1)

    @torch.no_grad()
    def act(self, observation: Observation) -> NDArray[np.float32]:
        """pi(s), (N, A)."""
        mean, _ = self.actor(torch.from_numpy(observation["policy"]).to(self.device))
        return torch.tanh(mean).cpu().numpy()

    def observe(self, step: Step, valid: NDArray[np.bool_]) -> None:
        """Nothing is learned from rewards before they are sampled."""

    def update(self, batch: Batch, budget_used: float) -> dict[str, Tensor]:
        """Critics; on every `actor_every`-th update the actor and the targets too."""
        inputs, rate = steps.inputs_of(batch, self.critic_group), self.config.learning_rate
        rng = seeding.generator(self.device, seeding.key("td3", self.seed, self.group.rank), "update", self.updates)
        noise = torch.randn(inputs.action.shape, generator=rng, device=self.device) * self.config.smoothing_std
        noise = noise.clamp(-self.config.smoothing_clip, self.config.smoothing_clip)
        critic_gradient, actor_gradient = self.gradients
        critic, actor = self.optimizers["critic"], self.optimizers["actor"]
        found = critic_gradient(critic.parameters, self.target_actor, self.critic, self.target_critic, inputs, noise)
        metrics = steps.descend(critic, *found, rate)
        if self.updates % self.config.actor_every == 0:
            metrics |= steps.descend(actor, *actor_gradient(actor.parameters, self.actor, self.critic, inputs), rate)
            for target, optimizer in ((self.target_critic, critic), (self.target_actor, actor)):
                steps.follow(list(target.parameters()), optimizer.parameters, self.config.target_rate)
        self.td_error = metrics.pop("td_error")
        self.updates += 1
        return metrics

    def norms(self) -> dict[str, Tensor]:
        """No norm is bounded."""
        return {}

    def initialise(self, state: dict[str, Tensor], parts: Sequence[str]) -> None:
        """Take networks and their targets; optimizers start anew."""
        for name in parts:
            for network in (name, f"target_{name}"):
                self.modules[network].load_state_dict(steps.part(state, f"{network}."))

    def state_dict(self) -> dict[str, Tensor]:
        """Networks, optimizers and the counter."""
        state = {
            f"{name}.{key}": value for name, net in self.modules.items() for key, value in net.state_dict().items()
        }
        for name, optimizer in self.optimizers.items():
            for index in range(len(optimizer.parameters)):
                slots = optimizer.state_of(index).items()
                state |= {f"optimizer.{name}.{index}.{slot}": value for slot, value in slots}
        state["updates"] = torch.tensor(self.updates)
        return {name: value.detach().cpu() for name, value in state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue, bit for bit."""
        for name, network in self.modules.items():
            network.load_state_dict(steps.part(state, f"{name}."))
        for name, optimizer in self.optimizers.items():
            for index in range(len(optimizer.parameters)):
                optimizer.load(index, steps.part(state, f"optimizer.{name}.{index}."))
        self.updates = int(state["updates"])

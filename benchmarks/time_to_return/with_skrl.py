"""SAC of skrl as a contender of the time_to_return grid.

    python benchmarks/time_to_return/with_skrl.py task=Hopper-v5 minutes=3,6 seed=0 threads=2 runs=runs name=try

skrl publishes no settings for these tasks, and its networks are the user's to write. So both are the SAC paper's (arXiv
1812.05905, appendix D): two hidden layers of 256 units, Adam with 3e-4, batches of 256, discount 0.99, a target rate of
0.005, one update per transition, and 10,000 random transitions before learning. The policy's form is that of skrl's own
SAC example for gymnasium: a Gaussian around a tanh mean with one free deviation per action, clipped to the actions'
range. skrl trains it with its own trainer; its logs are off.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from rlplastic.benchmarking.time_to_return import Race, contend, unit_actions

OWN: dict[str, tuple[str, ...]] = {}
STARTS, CAPACITY = 10_000, 1_000_000


class Over(Exception):
    """skrl's trainer has no other end than a number of steps."""


def models(space: Any, actions: Any) -> dict[str, Any]:
    """The five networks of skrl's SAC for an observation and an action space."""
    import torch
    from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
    from torch import nn

    def layers(width_in: int, width_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(width_in, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, width_out)
        )

    class Policy(GaussianMixin, Model):
        def __init__(self) -> None:
            Model.__init__(self, observation_space=space, action_space=actions, device="cpu")
            GaussianMixin.__init__(self, clip_actions=True)
            self.net = layers(self.num_observations, self.num_actions)
            self.log_std = nn.Parameter(torch.zeros(self.num_actions))
            self.scale = torch.as_tensor(actions.high)

        def compute(self, inputs: dict[str, Any], role: str) -> tuple[Any, dict[str, Any]]:
            return self.scale * torch.tanh(self.net(inputs["observations"])), {"log_std": self.log_std}

    class Critic(DeterministicMixin, Model):
        def __init__(self) -> None:
            Model.__init__(self, observation_space=space, action_space=actions, device="cpu")
            DeterministicMixin.__init__(self)
            self.net = layers(self.num_observations + self.num_actions, 1)

        def compute(self, inputs: dict[str, Any], role: str) -> tuple[Any, dict[str, Any]]:
            return self.net(torch.cat([inputs["observations"], inputs["taken_actions"]], dim=1)), {}

    critics = ("critic_1", "critic_2", "target_critic_1", "target_critic_2")
    return {"policy": Policy()} | {name: Critic() for name in critics}


def train(race: Race) -> None:
    """Until the race is over."""
    import gymnasium
    import torch
    from skrl.agents.torch.sac import SAC, SAC_CFG
    from skrl.envs.wrappers.torch import wrap_env
    from skrl.memories.torch import RandomMemory
    from skrl.trainers.torch import SequentialTrainer, SequentialTrainerCfg
    from skrl.utils import set_seed

    entry = race.entry
    torch.set_num_threads(entry.threads)
    set_seed(entry.seed)
    raw = gymnasium.make(entry.task)
    raw.reset(seed=entry.seed)  # the trainer's own resets go on from here
    env = wrap_env(raw, wrapper="gymnasium")

    class Contender(SAC):
        def post_interaction(self, *, timestep: int, timesteps: int) -> None:
            super().post_interaction(timestep=timestep, timesteps=timesteps)
            updates = max(timestep + 1 - self.cfg.learning_starts, 0)
            if race.over(timestep + 1, updates, self.deterministic):
                raise Over

        @torch.no_grad()
        def deterministic(self, observations: Any) -> Any:
            mean, _ = self.policy.compute({"observations": torch.from_numpy(observations)}, "policy")
            return unit_actions(mean.numpy(), self.action_space.low, self.action_space.high)

    agent = Contender(
        models=models(env.observation_space, env.action_space),
        memory=RandomMemory(memory_size=CAPACITY, num_envs=1, device="cpu"),
        observation_space=env.observation_space,
        action_space=env.action_space,
        device="cpu",
        cfg=SAC_CFG(
            batch_size=256,
            learning_rate=3e-4,
            random_timesteps=STARTS,
            learning_starts=STARTS,
            experiment={"write_interval": 0, "checkpoint_interval": 0, "directory": str(entry.folder)},
        ),
    )
    settings = SequentialTrainerCfg(timesteps=sys.maxsize, headless=True, disable_progressbar=True)
    trainer = SequentialTrainer(cfg=settings, env=env, agents=agent)
    with contextlib.suppress(Over):
        trainer.train()


if __name__ == "__main__":
    sys.exit(contend(train, OWN))

"""Stable-Baselines3's SAC as an arm of the sac grid: takes the overrides that `rlplastic.train` takes, and obeys them.

    python benchmarks/sac/with_stable_baselines.py agent=sac env=hopper env_steps=20000 seed=0 runs=runs name=try

The configuration is composed and resolved as for rlplastic, and every setting that both have is handed over, so that
the two differ in nothing but the code. Training steps one gymnasium environment; the evaluation is rlplastic's own.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from rlplastic.command_line import leave, run_verb
from rlplastic.composition import compose
from rlplastic.config import Config, SACConfig
from rlplastic.errors import ConfigurationError
from rlplastic.evaluation import evaluate
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve

COLUMNS = ("step", "updates", "episodes", "return_mean", "return_std", "return_ci95_low", "return_ci95_high")


def make(config: Config) -> Any:
    """Stable-Baselines3's agent with the settings of ``config``."""
    from stable_baselines3 import SAC

    agent = config.agent
    assert isinstance(agent, SACConfig) and config.env_steps and config.replay.capacity
    same = {"env.num_envs": config.env.num_envs == 1, "replay_ratio": config.replay_ratio == 1}
    same |= {"agent.layer_norm": not agent.layer_norm, "agent.weight_decay": not agent.weight_decay}
    same |= {"agent.n_step": agent.n_step == 1, "agent.reward_scaling": not agent.reward_scaling}
    same |= {"agent.actor_every": agent.actor_every == 1, "agent.backup_entropy": agent.backup_entropy}
    if others := [key for key, kept in same.items() if not kept]:
        raise ConfigurationError(f"{', '.join(others)} cannot be set here; expected what Stable-Baselines3's SAC does")
    return SAC(
        "MlpPolicy",
        config.env.task,
        learning_rate=agent.learning_rate,
        buffer_size=config.replay.capacity,
        learning_starts=config.replay.minimum,
        batch_size=config.replay.batch_size,
        tau=agent.target_rate,
        gamma=agent.gamma,
        train_freq=1,
        gradient_steps=1,
        ent_coef=f"auto_{agent.initial_alpha}",
        policy_kwargs={
            "net_arch": {
                "pi": [agent.actor_width] * agent.actor_depth,
                "qf": [agent.critic_width] * agent.critic_depth,
            },
            "n_critics": config.critic.num_members,
        },
        seed=config.seed,
        device="cpu",
    )


class Table:
    """Writes ``eval.csv`` and ``timing.csv``; evaluations are no part of the training time."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.started, self.paused = perf_counter(), 0.0
        self._write("eval.csv", "w", COLUMNS)
        self._write("timing.csv", "w", ("attempt", "step", "updates", "wall_seconds", "train_seconds"))

    def evaluate(self, agent: Any, step: int, episodes: int) -> None:
        """A row of each table for the deterministic policy."""
        before = perf_counter()

        def act(observation: dict[str, Any]) -> Any:
            actions, _ = agent.predict(observation["policy"], deterministic=True)
            return np.clip(agent.policy.scale_action(actions), -1, 1).astype(np.float32)

        result = evaluate(act, self.config.env, seed=self.config.seed, episodes=episodes, index=step)
        self._write("eval.csv", "a", (step, agent._n_updates, episodes, result.mean, result.std, *result.ci95))
        now = perf_counter()
        self.paused += now - before
        times = (now - self.started, now - self.started - self.paused)
        self._write("timing.csv", "a", (1, step, agent._n_updates, *times))
        print(f"step {step}: return {result.mean:.5g} after {agent._n_updates} updates", flush=True)

    def _write(self, name: str, mode: str, cells: Sequence[object]) -> None:
        with (self.folder / name).open(mode, encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(cells)


def train(words: Sequence[str]) -> None:
    """Train for ``env_steps`` and evaluate every ``evaluation.every`` steps, and at the end."""
    config, _ = resolve(compose(words), probe_machine("cpu"))
    assert config.env_steps and config.evaluation.every and config.threads
    torch.set_num_threads(config.threads)
    agent = make(config)
    table = Table(config, Path(config.runs) / (config.name or "stable_baselines3"))
    from stable_baselines3.common.callbacks import BaseCallback

    class Steward(BaseCallback):
        """Asked after every step of the environment, and before the update that follows it."""

        def _on_step(self) -> bool:
            step = self.num_timesteps
            if step % config.evaluation.every == 0 and step < config.env_steps:
                table.evaluate(agent, step, config.evaluation.episodes)
            return True

    agent.learn(config.env_steps, callback=Steward())
    table.evaluate(agent, config.env_steps, config.evaluation.final_episodes)


if __name__ == "__main__":
    leave(run_verb(train, sys.argv[1:]))

"""Learning code is only right when it learns: a short real training, as part of every gate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlplastic import compose, make_envs, train_agent
from rlplastic.envs.base import Observation
from rlplastic.evaluation import evaluate

SETTINGS = [
    "env=inverted_pendulum",
    "env.num_envs=2",
    "env.threads=1",
    "threads=1",
    "agent.critic_width=32",
    "agent.actor_width=16",
    "replay.batch_size=64",
    "replay.minimum=500",
    "replay_ratio=1",
    "precision=float32",
    "compile=off",
    "env_steps=3000",
    "evaluation.every=0",
]


def test_a_minute_of_training_balances_the_pole_far_longer_than_chance(tmp_path: Path) -> None:
    config = compose(SETTINGS).env
    probe = make_envs(config, seed=0, role="eval", num_envs=1)
    probe.close()
    rng = np.random.default_rng(0)

    def random_act(observation: Observation) -> np.ndarray:
        return rng.uniform(-1, 1, (len(observation["policy"]), probe.action_dim)).astype(np.float32)

    chance = evaluate(random_act, config, seed=0, episodes=20)
    result = train_agent([*SETTINGS, f"runs={tmp_path}"], quiet=True)
    assert result.evaluation is not None
    assert chance.mean < 15
    assert result.evaluation.mean > 60, result.evaluation


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pendulum_is_solved(tmp_path: Path, seed: int) -> None:
    overrides = ["env=pendulum", "env_steps=20000", "threads=1", "env.threads=1", "compile=on", f"seed={seed}"]
    result = train_agent([*overrides, f"runs={tmp_path}"], quiet=True)
    assert result.evaluation is not None and result.evaluation.mean > -200

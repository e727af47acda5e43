"""Returns of uniform random actions, the floor that a trained policy must clear.

python benchmarks/random_policy.py --episodes 20 --out benchmarks/learning/random_policy.csv humanoid hopper go1
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlplastic import compose, make_envs
from rlplastic.envs.base import Observation
from rlplastic.evaluation import Evaluation, evaluate


def random_returns(task: str, episodes: int, seed: int) -> Evaluation:
    """An evaluation of actions drawn uniformly from [-1, 1]."""
    config = compose([f"env={task}", "env.threads=1"]).env
    probe = make_envs(config, seed=seed, role="eval", num_envs=1)
    probe.close()
    rng = np.random.default_rng(seed)

    def act(observation: Observation) -> NDArray[np.float32]:
        return rng.uniform(-1, 1, (len(observation["policy"]), probe.action_dim)).astype(np.float32)

    return evaluate(act, config, seed=seed, episodes=episodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", help="short names, as in env=<name>")
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with open(arguments.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "episodes", "return_mean", "return_ci95_low", "return_ci95_high", "length_mean"])
        for task in arguments.tasks:
            result = random_returns(task, arguments.episodes, arguments.seed)
            low, high = result.ci95
            writer.writerow([task, arguments.episodes, result.mean, low, high, float(result.lengths.mean())])
            print(f"{task}: {result.mean:.4g}, 95 % interval [{low:.4g}, {high:.4g}]")


if __name__ == "__main__":
    main()

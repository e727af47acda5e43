"""SAC, TQC and CrossQ of Stable-Baselines3, its contrib package and SBX, as contenders of the time_to_return grid.

    python benchmarks/time_to_return/with_stable_baselines.py algorithm=sbx_sac critic=default task=Hopper-v5 \
        minutes=3,6 seed=0 threads=2 runs=runs name=try

Settings are those of the RL Baselines3 Zoo for MuJoCo (hyperparams/sac.yml and the model cards sb3/tqc-* that it made),
which SBX's README refers to as well: the libraries' defaults with 10,000 transitions before learning, and for TQC on
Hopper 5 dropped quantiles per net. One environment and one update per transition, as all of these libraries default to.

CrossQ is the exception. The Zoo's critic for MuJoCo is the paper's, two layers of 2048 (arXiv 1902.05605), of which two
cores would do few updates in minutes. ``critic=default`` leaves what both libraries default to "for faster
computation", two layers of 1024, and 100 transitions before learning; ``critic=256`` is the size of SAC's, with which
CrossQ "already works", as SBX says.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from rlplastic.benchmarking.time_to_return import Race, contend

OWN = {"algorithm": ("sb3_sac", "sb3_tqc", "sb3_crossq", "sbx_sac", "sbx_crossq"), "critic": ("default", "256")}
STARTS = 10_000
"""Transitions before learning in the Zoo's MuJoCo settings of SAC and TQC."""


def make(race: Race) -> Any:
    """The agent, with its environment, before its first step."""
    entry = race.entry
    library, algorithm = entry.own["algorithm"].split("_")
    if library == "sbx":
        # XLA sizes its thread pool when JAX is imported; these are the variables it asks.
        os.environ |= dict.fromkeys(("NPROC", "PJRT_NPROC"), str(entry.threads))
        import sbx as agents
    elif algorithm == "sac":
        import stable_baselines3 as agents
    else:
        import sb3_contrib as agents
    import torch

    torch.set_num_threads(entry.threads)
    settings: dict[str, Any] = {"seed": entry.seed}
    if library == "sb3":
        settings["device"] = "cpu"
    if algorithm == "crossq":
        maker = agents.CrossQ
        if entry.own["critic"] != "default":
            width = int(entry.own["critic"])
            settings["policy_kwargs"] = {"net_arch": {"pi": [256, 256], "qf": [width, width]}}
    else:
        maker = agents.SAC if algorithm == "sac" else agents.TQC
        settings["learning_starts"] = STARTS
        if algorithm == "tqc" and entry.task.startswith("Hopper-"):
            settings["top_quantiles_to_drop_per_net"] = 5
    return maker("MlpPolicy", entry.task, **settings)


def train(race: Race) -> None:
    """Until the race is over."""
    agent = make(race)
    from stable_baselines3.common.callbacks import BaseCallback

    def act(observations: Any) -> Any:
        actions, _ = agent.predict(observations, deterministic=True)
        return agent.policy.scale_action(actions)

    class Steward(BaseCallback):
        """Asked after every step of the environment, and before the updates that follow it."""

        def _on_step(self) -> bool:
            return not race.over(self.num_timesteps, agent._n_updates, act)

    agent.learn(sys.maxsize, callback=Steward())


if __name__ == "__main__":
    sys.exit(contend(train, OWN))

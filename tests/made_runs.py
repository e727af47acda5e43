"""Run directories made by hand, as a training run would leave them, with curves that a test chooses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from rlplastic.tracking import SECTIONS, EvaluationRow, TimingRow, Tracker

STEPS = (1000, 2000, 3000, 4000)


def made_run(
    path: Path,
    *,
    task: str = "Hopper-v5",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    returns: Sequence[float] = (0.0, 10.0, 20.0, 40.0),
    records: Sequence[Mapping[str, Any]] = (),
    finished: bool = True,
) -> Path:
    """A run evaluated at the first of `STEPS`: half an update and 10 ms for each transition."""
    path.mkdir(parents=True)
    config = {"env.task": task, "agent.name": "sac", "seed": seed, "name": path.name, **(settings or {})}
    OmegaConf.save(OmegaConf.from_dotlist([f"{key}={value}" for key, value in config.items()]), path / "config.yaml")
    with Tracker(path) as tracker:
        for step, value in zip(STEPS, returns, strict=False):
            fractions = [1 / len(SECTIONS)] * len(SECTIONS)
            tracker.scalars(step, {"loss/critic": 1 / step, "train/replay_ratio": 0.5, "norm/actor_linear_rows": 1e-7})
            tracker.timing(TimingRow(step, step // 2, step / 90, step / 100, *fractions))
            tracker.evaluation(EvaluationRow(step, step // 2, 5, value, 1.0, value - 1, value + 1, 100.0))
    if records:
        (path / "plasticity.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    checkpoint = path / "checkpoints" / f"step_{STEPS[len(returns) - 1]:012d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "finished.json").write_text(json.dumps(finished))
    return path


def made_sweep(folder: Path, seeds: int = 5) -> Path:
    """Two agents on two tasks, SAC better by 100 on both, with what a monitor would say."""
    chance = np.random.default_rng(0)
    for task in ("Hopper-v5", "Pendulum-v1"):
        for agent, better in (("sac", 100.0), ("flashsac", 0.0)):
            for seed in range(seeds):
                made_run(
                    folder / f"{task}_{agent}_{seed}",
                    task=task,
                    seed=seed,
                    settings={"agent.name": agent, "env.num_envs": 4 if task == "Hopper-v5" else 8},
                    returns=better + np.array([0.0, 20.0, 60.0, 80.0]) + chance.normal(0, 5, 4),
                    records=[*measurements(), *decisions()],
                )
    return folder


def measurements() -> list[dict[str, Any]]:
    names = ("critic/all/effective_rank", "critic/all/dormant", "actor/all/weight_norm", "critic/trunk/dormant")
    return [
        {
            "event": "measurement",
            "step": step,
            "updates": step // 2,
            "values": {f"plasticity/{name}": step / 100 + place for place, name in enumerate(names)},
            "fresh": {"plasticity/critic/all/effective_rank": 40.0},
        }
        for step in STEPS
    ]


def decisions() -> list[dict[str, Any]]:
    lines = [
        {"event": "alarm", "step": 2000, "sentence": "the rank of the critic fell"},
        {"event": "probe", "step": 2000, "patient": "critic", "ratio": 1.8, "sentence": "80 % more slowly"},
        {"event": "probe", "step": 3000, "patient": "critic", "ratio": None, "sentence": "not finite"},
        {"event": "committed", "step": 2500, "sentence": "reset <kept> & verified"},
    ]
    return [{**line, "updates": 1000} for line in lines]

"""The loop without learning against raw envpool: random actions, storing, counting, same task and threads.

Both are driven in turn, chunk by chunk, in one process, with actions of the same distribution.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from typing import Any

import numpy as np

from rlplastic.agents import make_agent
from rlplastic.checkpoint import CheckpointStore
from rlplastic.composition import compose
from rlplastic.envs import catalogue
from rlplastic.loop import advance
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.run_directory import RunDirectory
from rlplastic.session import build

CHUNK_SECONDS, QUICK_SECONDS = 0.5, 0.05
CAPTION = "Transitions per second, median over chunks; the loop draws actions, steps, checks, stores and counts."


def measure(options: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - the verb's arguments
    """A row for every task and number of environments."""
    tasks = ["hopper"] if options.quick else ["humanoid", "halfcheetah", "hopper"]
    sizes = [64] if options.quick else [64, 256]
    chunks, seconds = (2, QUICK_SECONDS) if options.quick else (options.repeats, CHUNK_SECONDS)
    threads = options.threads or probe_machine("cpu").cores
    return [row(task, envs, threads, chunks, seconds) for task in tasks for envs in sizes]


def row(task: str, num_envs: int, threads: int, chunks: int, seconds: float) -> dict[str, Any]:
    """One task with so many environments: transitions per second of raw envpool and of the loop, and their ratio.

    Args:
        task: short name.
        num_envs: environments of each.
        threads: of the simulators.
        chunks: measured, after one that warms up; the median counts.
        seconds: of a chunk.
    """
    import envpool

    overrides = [f"env={task}", f"env.num_envs={num_envs}", f"env.threads={threads}", "replay.minimum=900000"]
    config, _ = resolve(
        compose([*overrides, "replay.capacity=1000000", "compile=off", "threads=1"]), probe_machine("cpu")
    )
    rates: dict[str, list[float]] = {"raw": [], "loop": []}
    with tempfile.TemporaryDirectory() as folder, RunDirectory.open(folder, "run", {}) as directory:
        session = build(config, directory, partial(make_agent), CheckpointStore(directory.path / "checkpoints", 1))
        raw = envpool.make(
            catalogue.resolve(config.env.family, config.env.task),
            env_type="gymnasium",
            num_envs=num_envs,
            batch_size=num_envs,
            num_threads=threads,
            seed=list(range(num_envs)),
        )
        raw.reset()
        rng = np.random.default_rng(0)
        low, high = raw.action_space.low, raw.action_space.high
        actions = rng.uniform(low, high, (256, num_envs, len(low))).astype(raw.action_space.dtype)
        session.watch.start()
        for index in range(2 * chunks + 2):
            name = "raw" if index % 2 == 0 else "loop"
            started, steps = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                if name == "raw":
                    raw.step(actions[steps % len(actions)])
                else:
                    advance(session)
                steps += 1
            if index >= 2:  # the first of each warms up
                rates[name].append(steps * num_envs / (time.perf_counter() - started))
        session.envs.close()
        raw.close()
    fastest, ours = statistics.median(rates["raw"]), statistics.median(rates["loop"])
    return {
        "task": task,
        "envs": num_envs,
        "threads": threads,
        "raw envpool": fastest,
        "loop": ours,
        "ratio": ours / fastest,
    }

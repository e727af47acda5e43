"""The loop without learning against raw envpool: random actions, storing, counting, same task and threads.

    python benchmarks/throughput.py --out benchmarks/throughput.csv

Both are driven in turn, chunk by chunk, in one process; the table holds medians over chunks and their ratio. Run
it on an idle machine.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import envpool
import numpy as np

from rlplastic.agents import make_agent
from rlplastic.checkpoint import CheckpointStore
from rlplastic.composition import compose
from rlplastic.envs import catalogue
from rlplastic.loop import advance
from rlplastic.presets import probe_machine, resolve
from rlplastic.run_directory import RunDirectory
from rlplastic.session import build

CHUNK_SECONDS = 0.5


def measure(task: str, num_envs: int, threads: int, chunks: int) -> tuple[float, float]:
    """Median transitions per second of raw envpool and of the loop, with actions of the same distribution."""
    overrides = [f"env={task}", f"env.num_envs={num_envs}", f"env.threads={threads}", "replay.minimum=900000"]
    config, _ = resolve(
        compose([*overrides, "replay.capacity=1000000", "compile=off", "threads=1"]), probe_machine("cpu")
    )
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
        rates: dict[str, list[float]] = {"raw": [], "loop": []}
        for index in range(2 * chunks + 2):
            name = "raw" if index % 2 == 0 else "loop"
            started, steps = time.perf_counter(), 0
            while time.perf_counter() - started < CHUNK_SECONDS:
                if name == "raw":
                    raw.step(actions[steps % len(actions)])
                else:
                    advance(session)
                steps += 1
            if index >= 2:  # the first of each warms up
                rates[name].append(steps * num_envs / (time.perf_counter() - started))
        session.envs.close()
    return statistics.median(rates["raw"]), statistics.median(rates["loop"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["humanoid", "halfcheetah", "hopper"])
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    machine = probe_machine("cpu")
    with open(arguments.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = ["task", "num_envs", "threads", "chunks", "raw_per_s", "loop_per_s", "ratio", "processor", "cores"]
        writer.writerow(columns)
        for task in arguments.tasks:
            raw, loop = measure(task, arguments.num_envs, arguments.threads, arguments.chunks)
            sizes = [arguments.num_envs, arguments.threads, arguments.chunks]
            row = [task, *sizes, round(raw), round(loop), round(loop / raw, 3), machine.processor, machine.cores]
            writer.writerow(row)
            print(f"{task}: raw {raw:,.0f}/s, loop {loop:,.0f}/s, ratio {loop / raw:.3f}")


if __name__ == "__main__":
    main()

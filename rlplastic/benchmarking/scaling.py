"""How the loop scales with the number of environments, and sampling and insertion with the replay's capacity.

The loop has no learning in it and stands beside raw envpool, as in `rlplastic.benchmarking.loop`. Rings are full, of
HalfCheetah's sizes, and filled and sampled in turn, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rlplastic.benchmarking import loop
from rlplastic.benchmarking.timing import interleaved
from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.machine import probe_machine
from rlplastic.replay import ReplayRing, Sampler

OBSERVATIONS, ACTIONS, ENVS, BATCH, GAMMA = 17, 6, 64, 512, 0.99
CAPTION = (
    "Microseconds, median: per transition of HalfCheetah-v5 without learning; per batch of 512; per vector step of 64 "
    "environments. relative: to the first row of its kind; of raw: rate of the loop by that of raw envpool."
)


def measure(options: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - the verb's arguments
    """A row for every number of environments, and two for every capacity."""
    threads = options.threads or probe_machine("cpu").cores
    counts = (1, 16) if options.quick else (1, 16, 64, 256, 1024)
    capacities = (10_000, 20_000) if options.quick else (100_000, 1_000_000, 10_000_000)
    chunks, seconds = (2, loop.QUICK_SECONDS) if options.quick else (options.repeats, loop.CHUNK_SECONDS)
    rows = []
    for count in counts:
        found = loop.row("halfcheetah", count, threads, chunks, seconds)
        rows.append(_row("loop", f"{count:,} environments", 1e6 / found["loop"], f"{found['ratio']:.3f}"))
    times = _replay(capacities, options.repeats)
    for kind in ("sample", "insert"):
        rows += [_row(kind, f"{capacity:,} transitions", times[kind, capacity], "") for capacity in capacities]
    first: dict[str, float] = {}
    for row in rows:
        row["relative"] = row["us"] / first.setdefault(row["part"], row["us"])
    return rows


def _row(part: str, size: str, microseconds: float, of_raw: str) -> dict[str, Any]:
    return {"part": part, "size": size, "us": microseconds, "relative": 1.0, "of raw": of_raw}


def _replay(capacities: tuple[int, ...], repeats: int) -> dict[tuple[str, int], float]:
    """Median microseconds of a batch and of a vector step, by kind and capacity."""
    rng = np.random.default_rng(0)
    never, always = np.zeros(ENVS, np.bool_), np.ones(ENVS, np.bool_)
    actions = rng.uniform(-1, 1, (ENVS, ACTIONS)).astype(np.float32)
    observation = {"policy": rng.standard_normal((ENVS, OBSERVATIONS), np.float32)}
    step = Step(observation, rng.standard_normal(ENVS, np.float32), never, never, {})
    scale = torch.tensor(0.5)
    works: dict[tuple[str, int], Callable[[], object]] = {}

    def works_of(ring: ReplayRing) -> dict[str, Callable[[], object]]:
        sampler, number = Sampler(ring, BATCH, 1, GAMMA, seed=0), iter(range(10**9))
        return {
            "sample": lambda: sampler.sample(next(number), scale),
            "insert": lambda: ring.add(actions, step, always),
        }

    for capacity in capacities:
        ring = ReplayRing(capacity, ENVS, {"policy": OBSERVATIONS}, ACTIONS, AutoresetMode.NEXT_STEP)
        ring.begin(observation)
        for _ in range(ring.num_slots):
            ring.add(actions, step, always)
        works |= {(kind, capacity): work for kind, work in works_of(ring).items()}
    return interleaved(works, repeats, burst=20)

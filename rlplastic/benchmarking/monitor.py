"""What watching plasticity costs: the readings of `monitor=watch` beside the updates between them, taken in turn.

A reading is all that a run does for it: draw, measure, compare with fresh networks, write to plasticity.jsonl and
TensorBoard. At their default cadences they may cost 3 % of the updates' time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from rlplastic.acceleration import barrier
from rlplastic.agents import make_agent
from rlplastic.benchmarking.timing import interleaved
from rlplastic.checkpoint import CheckpointStore
from rlplastic.composition import compose
from rlplastic.loop import advance
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.run_directory import RunDirectory
from rlplastic.session import build
from rlplastic.tracking import Tracker

TRANSITIONS = 2_000
CAPTION = "Milliseconds, median; share: of both readings at their default cadences in the time of the updates between."


def measure(options: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - the verb's arguments
    """A row for each agent and size, on Hopper."""
    sizes = [("sac", 32, 64)] if options.quick else [("flashsac", 64, 256), ("flashsac", 256, 512), ("sac", 256, 256)]
    return [row(agent, width, batch, options.repeats) for agent, width, batch in sizes]


def row(name: str, width: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """One agent: times of an update and of the readings, and what watching costs.

    Args:
        name: of the agent.
        width: of its critics; the actor's is half of it.
        batch_size: of an update.
        repeats: of every figure, of which the median counts.
    """
    overrides = [f"agent={name}", "env=hopper", "compile=off", "replay.capacity=100000"]
    overrides += [f"agent.critic_width={width}", f"agent.actor_width={width // 2}", f"replay.batch_size={batch_size}"]
    machine = probe_machine("auto")
    config, _ = resolve(compose([*overrides, f"replay.minimum={TRANSITIONS}"]), machine)
    with tempfile.TemporaryDirectory() as folder, RunDirectory.open(folder, "run", {}) as directory:
        session = build(config, directory, partial(make_agent), CheckpointStore(directory.path / "checkpoints", 1))
        agent, watcher = session.agent, session.watcher
        assert watcher is not None, "the default is to watch"
        while session.progress.transitions < TRANSITIONS:
            advance(session)
        with Tracker(directory.path) as tracker:

            def update() -> None:
                for drawn in session.sampler.batches(agent.updates, 2, agent.reward_scale):
                    agent.update(drawn, 0.5)

            def read(tier: Literal["forward", "ranks"]) -> None:
                watcher.measure(tier, agent.updates)
                for event in watcher.pop_events():
                    tracker.finding(0, event.record, event.scalars, event.sentence)

            works: dict[str, Callable[[], object]] = {"update": update}
            works |= {"forward": partial(read, "forward"), "ranks": partial(read, "ranks")}
            times = interleaved(works, repeats, wait=barrier(machine.device))
        session.envs.close()
    one, forward, ranks = times["update"] / 2e3, times["forward"] / 1e3, times["ranks"] / 1e3
    settings = config.monitor
    return {
        "agent": name,
        "width": width,
        "batch": batch_size,
        "update ms": one,
        "forward ms": forward,
        "ranks ms": ranks,
        "share": (forward / settings.forward_every + ranks / settings.ranks_every) / one,
    }

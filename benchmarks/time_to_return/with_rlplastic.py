"""rlplastic as a contender of the time_to_return grid: `rlplastic.train` with the clock of the race.

    python benchmarks/time_to_return/with_rlplastic.py task=Hopper-v5 minutes=3,6 seed=0 threads=2 runs=runs name=try

Any other word is an override of `rlplastic.train`. The run is the one that the command makes, its logs and checkpoints
included, in ``<runs>/<name>/run``; only its budget and its evaluations follow the race: the learning rates' schedule
ends with the last mark, and the loop stands still while it is evaluated.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial

import numpy as np
from numpy.typing import NDArray

from rlplastic.benchmarking.time_to_return import Race, contend

OWN = None
"""Any word of `rlplastic.train`."""


def train(race: Race) -> None:
    """Until the race is over."""
    from rlplastic import acceleration
    from rlplastic.agents import make_agent
    from rlplastic.checkpoint import CheckpointStore
    from rlplastic.composition import compose
    from rlplastic.loop import advance, after
    from rlplastic.presets import probe_machine, resolve
    from rlplastic.progress import Budget
    from rlplastic.reporting import Reporter
    from rlplastic.run_directory import RunDirectory
    from rlplastic.session import build
    from rlplastic.terminal import View
    from rlplastic.tracking import Tracker

    entry = race.entry
    overrides = ["env=mujoco", f"env.task={entry.task}", f"seed={entry.seed}", f"threads={entry.threads}"]
    overrides += [f"max_minutes={entry.minutes[-1]}", "evaluation.every=0", "device=cpu"]
    overrides += [f"{key}={value}" for key, value in entry.own.items()]
    asked = compose(overrides)
    config, choices = resolve(asked, probe_machine(asked.device))
    view = View(live=False, quiet=True)
    for choice in choices:
        print(f"{choice.what}: {choice.value} ({choice.reason})")
    with RunDirectory.open(str(entry.folder), "run", asdict(config), fresh=True) as directory:
        transform = acceleration.apply(config)
        store = CheckpointStore(directory.path / "checkpoints", config.checkpoint.keep, warn=view.warn)
        session = build(config, directory, partial(make_agent, compile=transform), store)

        def act(observations: NDArray[np.float32]) -> NDArray[np.float32]:
            return session.agent.act({"policy": observations})

        try:
            with Tracker(directory.path) as tracker, view:
                reporter = Reporter(session, tracker, view)
                # What starting took is gone from the clock, but not from the budget, which only the loop counts.
                session.budget = Budget(config.env_steps, race.seconds_left / 60)
                session.watch.start()
                while not race.over(session.progress.transitions, session.agent.updates, act):
                    session.watch.lap("evaluate")
                    after(session, reporter, advance(session))
        finally:
            session.envs.close()


if __name__ == "__main__":
    sys.exit(contend(train, OWN))

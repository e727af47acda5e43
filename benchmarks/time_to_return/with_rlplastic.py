"""rlplastic as a contender of the time_to_return grid: `rlplastic.train` with the clock of the race.

    python benchmarks/time_to_return/with_rlplastic.py task=Hopper-v5 minutes=3,6 seed=0 threads=2 runs=runs name=try

Any other word is an override of `rlplastic.train`. The run is the one that the command makes, its logs and checkpoints
included, in ``<runs>/<name>/run``. Only its evaluations and its end are the race's: the budget, and with it the
schedule of the learning rates, ends with the last mark, and nothing is evaluated or saved after that.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rlplastic.benchmarking.time_to_return import Race, contend

if TYPE_CHECKING:
    from rlplastic.reporting import Reporter
    from rlplastic.session import Session

OWN = None
"""Any word of `rlplastic.train`."""


def loop(race: Race, session: Session, reporter: Reporter) -> None:
    """`rlplastic.loop.train` until the race is over."""
    from rlplastic.loop import advance, after
    from rlplastic.progress import Budget

    def act(observations: NDArray[np.float32]) -> NDArray[np.float32]:
        return session.agent.act({"policy": observations})

    # The race has counted what starting took; the budget is of training alone.
    session.budget = Budget(session.config.env_steps, race.seconds_left / 60)
    session.watch.start()
    while not race.over(session.progress.transitions, session.agent.updates, act):
        session.watch.lap("evaluate")
        after(session, reporter, advance(session))


def train(race: Race) -> None:
    """Until the race is over."""
    from rlplastic import training

    entry = race.entry
    overrides = ["env=mujoco", f"env.task={entry.task}", f"seed={entry.seed}", f"threads={entry.threads}"]
    overrides += [f"max_minutes={entry.minutes[-1]}", "evaluation.every=0", "device=cpu", "tracking.live=false"]
    overrides += [f"runs={entry.folder}", "name=run", "fresh=true"]
    overrides += [f"{key}={value}" for key, value in entry.own.items()]
    # All that leads to the loop stays the command's own.
    training.train = lambda session, reporter: loop(race, session, reporter)
    training.train_agent(overrides)


if __name__ == "__main__":
    sys.exit(contend(train, OWN))

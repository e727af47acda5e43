"""One episode of a policy at its own rate, and how long the policy and the whole cycle took.

A cycle is: observe, decide, step the simulator. Its deadline is the end of the control period that it began in. In real
time the next cycle waits for that moment; a cycle that is late begins the schedule anew, so that one late cycle counts
once. Otherwise cycles follow each other at once, and a cycle is late if it took longer than a period.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlplastic.envs import Observation, VectorEnv
from rlplastic.envs.perturbation import Perturbation, Signals
from rlplastic.errors import NonFiniteError
from rlplastic.evaluation import Evaluation, first_episodes
from rlplastic.seeding import key

if TYPE_CHECKING:
    from rich.table import Table

    from rlplastic.deploy import OnnxPolicy

Act = Callable[[Observation], NDArray[np.float32]]
EDGES_US = (0, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
"""Lower edges of the histogram's bins in microseconds."""
BAR = 40
"""Characters of the histogram's longest bar."""


@dataclass
class Timings:
    """What the clock said: seconds per decision of the policy, and how many cycles missed their deadline."""

    period: float
    decisions: list[float] = field(default_factory=list)
    missed: int = 0

    def summary(self) -> dict[str, Any]:
        """For JSON: milliseconds and counts."""
        milliseconds = np.array(self.decisions) * 1e3
        p50, p99 = np.percentile(milliseconds, [50, 99])
        return {
            "control_period_ms": self.period * 1e3,
            "cycles": len(self.decisions),
            "missed_deadlines": self.missed,
            "latency_ms": {"p50": float(p50), "p99": float(p99), "max": float(milliseconds.max())},
            "latency_histogram": {"lower_edges_us": list(EDGES_US), "counts": self.histogram().tolist()},
        }

    def histogram(self) -> NDArray[np.int64]:
        """Decisions in each bin of `EDGES_US`; the last is open."""
        bins = np.digitize(np.array(self.decisions) * 1e6, EDGES_US) - 1
        return np.bincount(bins, minlength=len(EDGES_US)).astype(np.int64)

    def table(self) -> Table:
        """The histogram for a terminal, without the empty bins around it."""
        from rich.table import Table

        counts = self.histogram()
        table = Table("latency", "decisions", "", box=None, pad_edge=False, header_style="bold")
        for index in range(int(counts.nonzero()[0].min()), int(counts.nonzero()[0].max()) + 1):
            upper = f" to {EDGES_US[index + 1]:,}" if index + 1 < len(EDGES_US) else " and more"
            bar = "#" * int(np.ceil(BAR * counts[index] / counts.max()))
            table.add_row(f"{EDGES_US[index]:,}{upper} us", f"{counts[index]:,}", bar)
        return table


class Pace:
    """Keeps the rate of a loop and the time of its cycles from within the policy: a cycle ends as the next one decides.

    The last cycle of an episode is followed by none, and so has no deadline.

    Args:
        timings: filled in.
        realtime: wait for the end of every control period.
        now: a clock, in seconds.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        timings: Timings,
        realtime: bool,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._timings, self._realtime, self._now, self._sleep = timings, realtime, now, sleep
        self._began = -1.0

    def around(self, act: Act) -> Act:
        """The policy of a new episode, paced."""
        first = True

        def paced(observation: Observation) -> NDArray[np.float32]:
            nonlocal first
            if first:
                self._began, first = self._now(), False
            else:
                self._end_cycle()
            started = self._now()
            action = act(observation)
            self._timings.decisions.append(self._now() - started)
            return action

        return paced

    def _end_cycle(self) -> None:
        deadline, now = self._began + self._timings.period, self._now()
        late = now > deadline
        self._timings.missed += late
        if self._realtime and not late:
            self._sleep(deadline - now)
        self._began = deadline if self._realtime and not late else now


def perturbed(policy: OnnxPolicy, perturbation: Perturbation, seed: int) -> Act:
    """The policy of one episode behind noisy and late signals: groups (1, dim) to actions (1, A) in [-1, 1].

    Raises (when called):
        NonFiniteError: an observation is not finite.
    """
    signals = Signals(perturbation, np.zeros((1, policy.action_dim), np.float32), key("noise", seed))

    def act(observation: Observation) -> NDArray[np.float32]:
        raw: NDArray[np.float32] = policy.run(signals.observe(observation["policy"])).raw_actions
        if not np.isfinite(raw).all():
            raise NonFiniteError("an observation is not finite; expected numbers: look for a simulation that blew up")
        return signals.act(np.clip(raw, -1, 1))  # a runtime's tanh may exceed 1 by a rounding

    return act


def play(make: Callable[[int], VectorEnv], act: Callable[[int], Act], episodes: int) -> Evaluation:
    """Play whole episodes, one after the other.

    Args:
        make: the one environment of an episode, by its number; closed afterwards.
        act: the policy of an episode, by its number.
        episodes: how many.

    Raises:
        ConfigurationError: an episode did not end; see `first_episodes`.
        NonFiniteError: an observation is not finite.
    """
    played = []
    for index in range(episodes):
        envs = make(index)
        try:
            played.append(first_episodes(act(index), envs))
        finally:
            envs.close()
    return Evaluation(
        np.concatenate([one.returns for one in played]),
        np.concatenate([one.lengths for one in played]),
        np.concatenate([one.terminated for one in played]),
    )

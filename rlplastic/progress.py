"""Where a run stands: counters, the budget that ends it, the replay ratio that paces it, and where the time went."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Progress:
    """Counters of a run; all of them are part of a checkpoint."""

    vector_steps: int = 0
    """Steps of the whole vector of environments."""
    transitions: int = 0
    """Environment transitions: rows that are one, over all environments. The axis of every plot and cadence."""
    credit: float = 0.0
    """Updates owed by the replay ratio, with its fraction."""
    builds: int = 0
    """How often the environments were built anew."""
    built_at: int = 0
    """The vector step at which they were built last."""
    primed: int = 0
    """Updates of `Config.priming_updates` that are done."""
    built_after: int = 0
    """The transitions by then."""
    train_seconds: float = 0.0
    """Wall time of all attempts that led here, evaluation excluded."""

    def crossed(self, every: int, added: int) -> bool:
        """Whether the last ``added`` transitions reached or passed a multiple of ``every``; never with 0."""
        return every > 0 and self.transitions // every > (self.transitions - added) // every


@dataclass(frozen=True)
class Budget:
    """What ends a run: environment transitions or minutes of training, whichever comes first."""

    env_steps: int | None
    max_minutes: float | None

    def used(self, progress: Progress) -> float:
        """The fraction used, at most 1."""
        steps = progress.transitions / self.env_steps if self.env_steps is not None else 0.0
        minutes = progress.train_seconds / (60 * self.max_minutes) if self.max_minutes is not None else 0.0
        return min(max(steps, minutes), 1.0)

    def spent(self, progress: Progress) -> bool:
        """Whether the run is over."""
        return self.used(progress) >= 1.0


class ReplayRatio:
    """Gradient updates per environment transition, with the fraction carried over.

    Credit accrues only from transitions that come after learning may start, so reaching the minimum causes no burst.
    """

    def __init__(self, ratio: float, minimum: int) -> None:
        self.ratio, self.minimum = ratio, minimum

    def due(self, progress: Progress) -> int:
        """Whole updates owed now; they are taken off the credit."""
        count = int(progress.credit)
        progress.credit -= count
        return count

    def accrue(self, progress: Progress, added: int) -> None:
        """Count ``added`` transitions, of which those beyond the minimum earn credit."""
        before = max(progress.transitions, self.minimum)
        progress.transitions += added
        progress.credit += self.ratio * max(progress.transitions - before, 0)


class Stopwatch:
    """Sections that add up to all of the wall time: every lap charges what passed since the previous one.

    Args:
        began: when the time that counts began, a reading of ``time.perf_counter``; None: now.
        wait: called before every reading, to wait for a device whose work is to be charged where it was asked for.
    """

    def __init__(self, began: float | None = None, wait: Callable[[], None] | None = None) -> None:
        self._wait = wait
        self._started = self._last = time.perf_counter() if began is None else began
        self._sections: dict[str, float] = {}
        self._totals: dict[str, float] = {}

    def start(self, before: str = "start") -> None:
        """Begin the sections anew: what passed so far (setting up, replaying actions) is only in the totals."""
        self.lap(before)
        self.pop()
        self._started = self._last

    def lap(self, section: str) -> float:
        """Charge the time since the last lap to ``section``; returns the seconds."""
        if self._wait is not None:
            self._wait()
        now = time.perf_counter()
        passed, self._last = now - self._last, now
        self._sections[section] = self._sections.get(section, 0.0) + passed
        return passed

    @property
    def elapsed(self) -> float:
        """Seconds from the start to the last lap."""
        return self._last - self._started

    def pop(self) -> dict[str, float]:
        """Seconds by section since the last pop."""
        sections, self._sections = self._sections, {}
        for section, seconds in sections.items():
            self._totals[section] = self._totals.get(section, 0.0) + seconds
        return sections

    @property
    def totals(self) -> dict[str, float]:
        """Seconds by section from the very beginning to the last lap."""
        names = (*self._totals, *(name for name in self._sections if name not in self._totals))
        return {name: self._totals.get(name, 0.0) + self._sections.get(name, 0.0) for name in names}


class MetricMeans:
    """Means of the updates' metrics between two logs, kept on the device until asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one update's scalars; nothing waits for the device."""
        for name, value in metrics.items():
            total = self._sums.get(name)
            self._sums[name] = value.detach().reshape(()).clone() if total is None else total.add_(value.reshape(()))
            self._counts[name] = self._counts.get(name, 0) + 1

    def __bool__(self) -> bool:
        return bool(self._sums)

    def pop(self) -> dict[str, float]:
        """The means since the last pop, in one transfer."""
        if not self._sums:
            return {}
        values = torch.stack(list(self._sums.values())).tolist()
        means = {name: value / self._counts[name] for name, value in zip(self._sums, values, strict=True)}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and counts by name."""
        counts = {f"count.{name}": torch.tensor(count) for name, count in self._counts.items()}
        return {f"sum.{name}": total.cpu().clone() for name, total in self._sums.items()} | counts

    def load_state_dict(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Continue from `state_dict`."""
        self._sums = {n.removeprefix("sum."): v.to(device) for n, v in state.items() if n.startswith("sum.")}
        self._counts = {n.removeprefix("count."): int(v) for n, v in state.items() if n.startswith("count.")}

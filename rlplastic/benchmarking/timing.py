"""Timing several pieces of work against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

K = TypeVar("K")
WARM_UP = 2
"""Rounds that do not count: the first may compile."""


def interleaved(
    works: Mapping[K, Callable[[], object]], repeats: int, burst: int = 1, wait: Callable[[], None] | None = None
) -> dict[K, float]:
    """Median microseconds of each, asked in turn, so that whatever else the machine does falls on all of them.

    Args:
        works: what to time, by name.
        repeats: rounds that count.
        burst: calls of each in a round.
        wait: called at the end of every piece of work, for a device to have done it.
    """
    seen: dict[K, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + WARM_UP):
        for name, work in works.items():
            for _ in range(burst):
                started = time.perf_counter()
                work()
                if wait is not None:
                    wait()
                if repeat >= WARM_UP:
                    seen[name].append((time.perf_counter() - started) * 1e6)
    return {name: statistics.median(values) for name, values in seen.items()}


def percentiles(works: Mapping[K, Callable[[], object]], calls: int) -> dict[K, tuple[float, float]]:
    """Median and 99th percentile of microseconds of each, asked in turn ``calls`` times, after some to warm up."""
    seen: dict[K, list[float]] = {name: [] for name in works}
    warm_up = calls // 20 + 1
    for call in range(calls + warm_up):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if call >= warm_up:
                seen[name].append((time.perf_counter() - started) * 1e6)
    return {name: (statistics.median(values), float(np.percentile(values, 99))) for name, values in seen.items()}

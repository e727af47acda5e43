"""How returns fare when something changes: dips around switches and interventions, and transfer between tasks.

Stability gap (De Lange et al., arXiv 2205.13452): what counts is the worst moment after a change, not the end of the
task, when what was lost has been learnt again. With returns for accuracies, b the level before the change at x_0, and
the window up to the next change:

    depth = max(b - min y, 0)     area = integral of max(b - y, 0) dx     recovery = first x - x_0 with y(x) >= b

Lifelong-learning measures (New et al., "Lifelong learning metrics", arXiv 2201.08278; Wołczyk et al., "Continual
World", arXiv 2105.10919) are of a matrix of performances: ``performance[b, t]`` is that on task t after block b of
training, row 0 that before any, and ``order[b]`` the task that block b + 1 trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlplastic.analysis.statistics import Curve, Floats
from rlplastic.errors import ConfigurationError

BEFORE = 3
"""Points whose mean is the level before a change; fewer where there are not so many since the change before."""


class Dip(NamedTuple):
    """What a change cost."""

    at: float
    before: float
    """Level before it."""
    depth: float
    """How far the curve fell below that at its worst; 0 where it never did."""
    area: float
    """What was missing, summed over the horizontal axis."""
    recovery: float
    """From the change to the first point that is as good as before; NaN: not before the next change."""


def dips(curve: Curve, changes: Sequence[float]) -> list[Dip]:
    """The dip after every change that has a point before it and one from it on until the next.

    Args:
        curve: x (n,), rising, and y (n,). A point at the moment of a change already shows its effect.
        changes: their places on the horizontal axis, in any order.
    """
    x, y = curve
    moments = sorted(set(changes))
    found = []
    for last, at, following in zip([-math.inf, *moments], moments, [*moments[1:], math.inf], strict=False):
        earlier = y[x < at]
        since = y[(x >= last) & (x < at)]
        window = (x >= at) & (x < following)
        if not len(earlier) or not window.any():
            continue
        before = float((since if len(since) else earlier)[-BEFORE:].mean())
        found.append(_dip(at, before, x[window], y[window]))
    return found


def _dip(at: float, before: float, x: Floats, y: Floats) -> Dip:
    """Of the points from the change on; until the first of them the curve is taken to be as it is there."""
    back = x[y >= before]
    area = shortfall(np.append(at, x), np.append(y[0], y), before)
    return Dip(at, before, max(before - float(y.min()), 0.0), area, float(back[0] - at) if len(back) else math.nan)


def shortfall(x: Floats, y: Floats, level: float) -> float:
    """Integral of max(level - y, 0) over x, of the line through the points (n,); exact also where it crosses."""
    missing = level - y
    start, end, width = missing[:-1], missing[1:], np.diff(x)
    high, low = np.maximum(start, end), np.minimum(start, end)
    whole = np.where(low >= 0, width * (start + end) / 2, 0.0)
    steep = np.where(high > low, high - low, 1.0)
    crossing = np.where((low < 0) & (high > 0), width * high**2 / (2 * steep), 0.0)
    return float((whole + crossing).sum())


# Several tasks


def forgetting(performance: Floats, order: Sequence[int]) -> Floats:
    """Performance at the end of a task's last block minus that at the end of all (Continual World), (tasks,).

    NaN for tasks that were never trained on.
    """
    blocks, tasks = _checked(performance, order)
    last = {task: block + 1 for block, task in enumerate(order)}
    lost = [performance[last[t], t] - performance[blocks, t] if t in last else math.nan for t in range(tasks)]
    return np.array(lost, np.float64)


def performance_maintenance(performance: Floats, order: Sequence[int]) -> float:
    """Mean change of a task's performance while others are trained, from the end of its own last block (New et al.).

    0: kept; negative: forgotten; positive: later tasks helped. NaN where no task was ever left.
    """
    blocks, tasks = _checked(performance, order)
    changes = []
    for task in range(tasks):
        learnt = None
        for block in range(1, blocks + 1):
            if order[block - 1] == task:
                learnt = block
            elif learnt is not None:
                changes.append(performance[block, task] - performance[learnt, task])
    return float(np.mean(changes)) if changes else math.nan


def transfer(performance: Floats, order: Sequence[int]) -> tuple[float, float]:
    """Mean forward and backward transfer by contrast, (after - before) / (after + before) (New et al.).

    A block transfers forward to tasks that were not trained on yet, and backward to those that were. Performances must
    not be negative: normalise returns first.

    Returns:
        Each in [-1, 1], 0 without an effect; NaN where no pair of tasks tells it.

    Raises:
        ConfigurationError: a performance is negative, or shapes do not fit.
    """
    blocks, tasks = _checked(performance, order)
    if performance.min() < 0:
        raise ConfigurationError(
            f"transfer got a performance of {performance.min():g}; expected none below 0, so normalise returns first"
        )
    forward: list[float] = []
    backward: list[float] = []
    for block in range(1, blocks + 1):
        for task in range(tasks):
            before, after = performance[block - 1, task], performance[block, task]
            if task == order[block - 1] or before + after == 0:
                continue
            learnt = task in order[: block - 1]
            (backward if learnt else forward).append((after - before) / (after + before))
    return tuple(float(np.mean(pairs)) if pairs else math.nan for pairs in (forward, backward))  # type: ignore[return-value]


def forward_transfer_area(area: Floats, alone: Floats) -> Floats:
    """(AUC - AUC alone) / (1 - AUC alone): what earlier tasks gave to learning each (Continual World), (tasks,).

    Args:
        area: of each task's own curve in the sequence, normalised to [0, 1], divided by its length.
        alone: the same of an agent that learns only this task.
    """
    return (area - alone) / (1 - alone)


def performance_recovery(times: Sequence[float]) -> float:
    """Minus the Theil-Sen slope of the times to recover from one change after another (New et al.).

    Positive: recovery becomes faster with every change; negative: slower, as it does where plasticity is lost.

    Args:
        times: of recovery in the order of changes; NaN, where it never came back, is left out: see `Dip`.

    Returns:
        In units of time for each change; NaN for fewer than two times.
    """
    known = [(index, time) for index, time in enumerate(times) if math.isfinite(time)]
    slopes = [(b - a) / (j - i) for n, (i, a) in enumerate(known) for j, b in known[n + 1 :]]
    return -float(np.median(slopes)) if slopes else math.nan


def _checked(performance: Floats, order: Sequence[int]) -> tuple[int, int]:
    """Blocks and tasks of a matrix of performances."""
    rows, tasks = performance.shape
    if rows != len(order) + 1 or not all(0 <= task < tasks for task in order):
        raise ConfigurationError(
            f"performances of shape {performance.shape} do not go with an order of {len(order)} blocks; expected one "
            "row before any and one after each, and a column for every task"
        )
    return len(order), tasks

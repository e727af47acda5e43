"""What several runs say together: interquartile means, stratified-bootstrap intervals, performance profiles.

Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", arXiv 2108.13264. A stratum
holds the runs of one task. A resample draws, within every stratum, as many runs as it has, with replacement; the
interval lies between percentiles of the statistic over resamples. With few runs it is narrower than it should be: three
seeds give 10 different resamples, and none can leave the range of what was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from rlplastic.seeding import key

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]
"""Values of the horizontal axis (n,), not falling, and of the vertical one (n,)."""
Statistic = Callable[[Floats, int], Floats]
"""Reduces an axis, that of runs."""

RESAMPLES = 2000
CONFIDENCE = 0.95


def mean(scores: Floats, axis: int = 0) -> Floats:
    """Mean over ``axis``."""
    return np.asarray(scores.mean(axis), np.float64)


def interquartile_mean(scores: Floats, axis: int = 0) -> Floats:
    """Mean of the middle half along ``axis``: a quarter of the runs, rounded down, is cut off at either end."""
    count = scores.shape[axis]
    cut = count // 4
    middle = np.take(np.sort(scores, axis), np.arange(cut, count - cut), axis)
    return np.asarray(middle.mean(axis), np.float64)


def above(thresholds: Floats) -> Statistic:
    """The performance profile as a statistic: the fraction of runs whose score exceeds each threshold, (..., T)."""

    def profile(scores: Floats, axis: int = 0) -> Floats:
        return np.asarray((scores[..., None] > thresholds).mean(axis), np.float64)

    return profile


def bootstrap_interval(strata: Sequence[Floats], statistic: Statistic) -> tuple[Floats, Floats]:
    """The 95 % percentile interval of a statistic of all runs; equal numbers of runs are resampled equally.

    Args:
        strata: the runs of each task, (runs, ...), all of the same trailing shape.
        statistic: of the runs of all strata together.

    Returns:
        Lower and upper ends, in the statistic's shape; NaN where no stratum has two runs, which say nothing of spread.
    """
    if max(len(stratum) for stratum in strata) < 2:
        nothing = np.full_like(statistic(np.concatenate(strata), 0), np.nan)
        return nothing, nothing
    draws = np.random.default_rng(key("bootstrap"))
    chosen = [stratum[draws.integers(len(stratum), size=(RESAMPLES, len(stratum)))] for stratum in strata]
    values = statistic(np.concatenate(chosen, axis=1), 1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, (tail, 1 - tail), axis=0)
    return np.asarray(low), np.asarray(high)


def curve_area(x: Floats, y: Floats) -> float:
    """Trapezoidal area under a curve (n,) divided by its length: the mean height; the value itself for one point."""
    if len(x) < 2 or x[-1] == x[0]:
        return float(y[-1])
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def as_curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Points (x, y) as columns."""
    columns = np.array(points, np.float64).reshape(-1, 2).T
    return columns[0], columns[1]


def common_grid(curves: Sequence[Curve], most: int = 200) -> Floats:
    """Where all curves have begun and none has ended: their own points, or ``most`` even ones if there are more."""
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    points = np.unique(np.concatenate([x for x, _ in curves]))
    points = points[(points >= low) & (points <= high)]
    return points if len(points) <= most else np.linspace(low, high, most)


def stacked(curves: Iterable[Curve], grid: Floats) -> Floats:
    """Curves interpolated linearly at a grid, (curves, points)."""
    return np.stack([np.interp(grid, *curve) for curve in curves])

"""Statistics over runs, against scipy, exhaustive resampling, closed forms and counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rlplastic.analysis.statistics import (
    above,
    bootstrap_interval,
    common_grid,
    curve_area,
    interquartile_mean,
    mean,
    stacked,
)

CHANCE = np.random.default_rng(7)


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_interquartile_mean_is_the_mean_trimmed_by_a_quarter_at_either_end(count: int, axis: int) -> None:
    shape = [3, 4, 5]
    shape[axis] = count
    scores = CHANCE.normal(size=shape)
    np.testing.assert_allclose(interquartile_mean(scores, axis), stats.trim_mean(scores, 0.25, axis), rtol=1e-12)


def test_an_outlier_moves_the_mean_and_not_the_interquartile_mean() -> None:
    scores = np.array([1.0, 2.0, 3.0, 4.0])
    assert interquartile_mean(scores) == interquartile_mean(np.array([1.0, 2.0, 3.0, 1e9])) == 2.5


@pytest.mark.parametrize("statistic", [mean, interquartile_mean])
@pytest.mark.parametrize("sizes", [(4,), (2, 3), (3, 1)])
def test_interval_lies_between_percentiles_of_all_possible_resamples(statistic, sizes) -> None:  # type: ignore[no-untyped-def]
    strata = [10 * place + CHANCE.normal(size=size) for place, size in enumerate(sizes)]
    resamples = itertools.product(*(itertools.product(stratum, repeat=len(stratum)) for stratum in strata))
    values = np.array([statistic(np.array(list(itertools.chain(*each))), 0) for each in resamples])
    low, high = bootstrap_interval(strata, statistic)
    for end, share in ((low, 0.025), (high, 0.975)):
        assert (values < end - 1e-9).mean() - 0.012 <= share <= (values <= end + 1e-9).mean() + 0.012


def test_interval_agrees_with_scipys_percentile_bootstrap() -> None:
    scores = CHANCE.gamma(2.0, size=40)
    ours = bootstrap_interval([scores], mean)
    theirs = stats.bootstrap((scores,), np.mean, n_resamples=20000, method="percentile", rng=0).confidence_interval
    np.testing.assert_allclose(ours, theirs, rtol=0.02)


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    intervals = [bootstrap_interval([CHANCE.normal(3, 2, 30)], mean) for _ in range(300)]
    covered = [low <= 3.0 <= high for low, high in intervals]
    assert 0.89 <= np.mean(covered) <= 0.98


def test_differences_between_tasks_are_not_spread_within_them() -> None:
    low, high = bootstrap_interval([np.zeros(5), np.full(5, 100.0)], mean)
    assert low == high == 50.0


def test_interval_of_curves_is_the_interval_of_every_point() -> None:
    curves = CHANCE.normal(size=(6, 9))
    low, high = bootstrap_interval([curves], interquartile_mean)
    assert low.shape == high.shape == (9,)
    for point in range(9):
        assert (low[point], high[point]) == bootstrap_interval([curves[:, point]], interquartile_mean)


def test_single_runs_have_no_interval() -> None:
    low, high = bootstrap_interval([np.ones((1, 4)), np.zeros((1, 4))], mean)
    assert np.isnan(low).all() and np.isnan(high).all() and low.shape == (4,)


def test_profile_counts_the_runs_above_every_threshold() -> None:
    scores, thresholds = CHANCE.integers(0, 9, 12).astype(float), np.arange(10.0)
    counted = [sum(score > threshold for score in scores) / 12 for threshold in thresholds]
    np.testing.assert_allclose(above(thresholds)(scores, 0), counted)
    low, high = bootstrap_interval([scores], above(thresholds))
    assert (low <= counted).all() and (counted <= high).all()
    assert low[-1] == high[-1] == 0.0


def test_area_is_the_mean_height_whatever_the_spacing() -> None:
    x = np.array([0.0, 1.0, 5.0, 10.0])
    assert curve_area(x, 3 * x + 1) == pytest.approx(16.0)
    assert curve_area(np.array([0.0, 1.0, 4.0]), np.array([0.0, 2.0, 2.0])) == pytest.approx(7 / 4)
    assert curve_area(np.array([7.0]), np.array([2.0])) == 2.0
    assert curve_area(np.array([7.0, 7.0]), np.array([2.0, 3.0])) == 3.0


def test_curves_meet_where_all_have_begun_and_none_has_ended() -> None:
    first = (np.array([1.0, 3.0, 5.0]), np.array([10.0, 30.0, 50.0]))
    second = (np.array([2.0, 4.0, 9.0]), np.array([-2.0, -4.0, -9.0]))
    grid = common_grid([first, second])
    assert grid.tolist() == [2.0, 3.0, 4.0, 5.0]
    np.testing.assert_allclose(stacked([first, second], grid), [[20, 30, 40, 50], [-2, -3, -4, -5]])
    assert not len(common_grid([first, (first[0] + 9, first[1])]))
    assert len(common_grid([(np.arange(999.0), np.arange(999.0))])) == 200
    assert math.isclose(common_grid([(np.arange(999.0), np.arange(999.0))])[-1], 998.0)

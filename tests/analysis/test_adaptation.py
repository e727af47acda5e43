"""Dips and transfer, against sums done by hand, numerical integration, scipy, and the papers' definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlplastic.analysis import adaptation
from rlplastic.analysis.adaptation import Dip, dips, performance_recovery, shortfall
from rlplastic.errors import ConfigurationError

X = np.arange(10, 110, 10, dtype=np.float64)


def test_depth_area_and_recovery_of_a_dip_are_those_of_its_sums() -> None:
    y = np.array([80.0, 90.0, 100.0, 110.0, 40.0, 60.0, 100.0, 120.0, 120.0, 120.0])
    # before: mean of 90, 100, 110; missing: 60 from 45 to 50, falling to 40 by 60 and to 0 by 70
    (dip,) = dips((X, y), [45])
    assert dip == Dip(45, 100.0, 60.0, pytest.approx(5 * 60 + 10 * 50 + 10 * 20), 25.0)


def test_a_window_ends_with_the_next_change_and_the_level_before_is_that_since_the_last() -> None:
    y = np.array([100.0, 100.0, 100.0, 50.0, 60.0, 20.0, 30.0, 70.0, 90.0, 90.0])
    first, second = dips((X, y), [60, 40])
    assert (first.before, first.depth, math.isnan(first.recovery)) == (100.0, 50.0, True)
    assert (second.before, second.depth, second.recovery) == (55.0, 35.0, 20.0)


def test_a_point_at_the_moment_of_a_change_shows_its_effect() -> None:
    (dip,) = dips((X, np.where(X >= 50, 0.0, 1.0)), [50])
    assert (dip.before, dip.depth, dip.area) == (1.0, 1.0, 50.0)


def test_a_change_without_a_dip_costs_nothing_and_is_recovered_from_at_once() -> None:
    (dip,) = dips((X, X), [35])
    assert (dip.depth, dip.area, dip.recovery) == (0.0, 0.0, 5.0)


def test_changes_before_the_first_point_after_the_last_and_between_two_points_are_left_out() -> None:
    assert dips((X, X), [5, 101]) == []
    assert [dip.at for dip in dips((X, X), [41, 43, 47])] == [47]


def test_a_negative_return_dips_downwards_too() -> None:
    (dip,) = dips((X, np.where(X == 50, -300.0, -100.0)), [45])
    assert (dip.before, dip.depth, dip.recovery) == (-100.0, 200.0, 15.0)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(-5, 5))
def test_the_shortfall_is_the_integral_of_the_clipped_line(heights: list[float], level: float) -> None:
    y = np.array(heights)
    x = np.arange(len(y), dtype=np.float64) ** 1.5
    grid = np.linspace(x[0], x[-1], 20_001)
    wanted = np.trapezoid(np.maximum(level - np.interp(grid, x, y), 0), grid)
    assert shortfall(x, y, level) == pytest.approx(wanted, abs=1e-3)


# Several tasks: two tasks, learnt in turn twice; rows are (before any, after each block).

ORDER = [0, 1, 0, 1]
SCORES = np.array([[0.1, 0.2], [0.8, 0.4], [0.6, 0.9], [0.9, 0.3], [0.5, 1.0]])


def test_forgetting_is_what_a_task_lost_since_its_last_block() -> None:
    np.testing.assert_allclose(adaptation.forgetting(SCORES, ORDER), [0.9 - 0.5, 0.0])
    assert math.isnan(adaptation.forgetting(SCORES[:2], [0])[1])


def test_maintenance_compares_with_the_end_of_the_newest_block_of_the_task() -> None:
    # task 0: 0.6 after 0.8, 0.5 after 0.9; task 1: 0.3 after 0.9
    assert adaptation.performance_maintenance(SCORES, ORDER) == pytest.approx((-0.2 - 0.4 - 0.6) / 3)
    assert math.isnan(adaptation.performance_maintenance(SCORES[:2], [0]))


def test_transfer_is_forward_to_what_is_new_and_backward_to_what_was_learnt() -> None:
    forward, backward = adaptation.transfer(SCORES, ORDER)
    assert forward == pytest.approx((0.4 - 0.2) / 0.6), "block 1 on task 1"
    contrasts = [(0.6 - 0.8) / 1.4, (0.3 - 0.9) / 1.2, (0.5 - 0.9) / 1.4]
    assert backward == pytest.approx(np.mean(contrasts))
    constant = np.ones((3, 2))
    assert adaptation.transfer(constant, [0, 1]) == (0.0, 0.0)
    with pytest.raises(ConfigurationError, match="normalise"):
        adaptation.transfer(SCORES - 1, ORDER)


def test_forward_transfer_of_areas_is_zero_where_nothing_was_gained_and_one_where_all_was() -> None:
    area, alone = np.array([0.5, 1.0, 0.25]), np.array([0.5, 0.6, 0.5])
    np.testing.assert_allclose(adaptation.forward_transfer_area(area, alone), [0.0, 1.0, -0.5])


@given(st.lists(st.one_of(st.floats(0, 100), st.just(math.nan)), max_size=9))
def test_performance_recovery_is_minus_the_theil_sen_slope(times: list[float]) -> None:
    known = [(i, t) for i, t in enumerate(times) if math.isfinite(t)]
    found = performance_recovery(times)
    if len(known) < 2:
        assert math.isnan(found)
    else:
        places, values = zip(*known, strict=True)
        assert found == pytest.approx(-stats.theilslopes(values, places).slope)


@pytest.mark.parametrize(("order", "rows"), [([0, 1], 5), ([0, 2], 3), ([-1, 0], 3)])
def test_performances_that_do_not_go_with_the_order_are_refused(order: list[int], rows: int) -> None:
    with pytest.raises(ConfigurationError, match="do not go with an order of 2 blocks"):
        adaptation.forgetting(SCORES[:rows], order)

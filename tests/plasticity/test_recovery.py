"""What a recovery window reports, against sums done by hand, and when it calls a return lost."""

from __future__ import annotations

import pytest

from rlplastic.plasticity.recovery import Recovery


def window(before: float | None, returns: list[float], every: int = 10, margin: float = 0.2) -> Recovery:
    recovery = Recovery(1000, 100, before, margin)
    for index, value in enumerate(returns):
        recovery.episode(1000 + every * (index + 1), value)
    return recovery


def test_depth_area_and_time_of_a_dip_are_those_of_its_sums() -> None:
    returns = [100.0, 40.0, 40.0, 40.0, 40.0, 90.0, 110.0, 120.0, 130.0, 130.0]
    report = window(100.0, returns).report()
    # smallest mean of five: 50 of [40, 40, 40, 40, 90]
    assert report["dip_depth"] == pytest.approx(50.0)
    assert report["dip_area"] == pytest.approx(10 * (4 * 60 + 10))
    assert report["updates_to_recover"] == 10, "the first episode was as good as before"
    assert report["return_after"] == pytest.approx((90 + 110 + 120 + 130 + 130) / 5)


def test_a_return_that_never_comes_back_has_no_time_of_recovery() -> None:
    recovery = window(100.0, [50.0] * 10)
    assert recovery.report()["updates_to_recover"] is None
    assert not recovery.recovered


@pytest.mark.parametrize(
    ("before", "after", "recovered"), [(100, 81, True), (100, 79, False), (-100, -119, True), (-100, -121, False)]
)
def test_a_fifth_may_be_missing_also_of_negative_returns(before: float, after: float, recovered: bool) -> None:
    assert window(before, [after] * 6).recovered is recovered


def test_where_no_return_was_seen_there_is_nothing_to_go_back_to() -> None:
    assert window(None, [1.0] * 6).recovered
    assert window(100.0, []).recovered
    assert window(100.0, []).report()["dip_depth"] is None


def test_a_window_waits_for_episodes_but_not_for_ever() -> None:
    recovery = window(100.0, [90.0] * 4)
    assert not recovery.is_over(1100)
    assert recovery.is_over(1200)
    assert window(100.0, [90.0] * 5).is_over(1100)
    assert not window(100.0, [90.0] * 5).is_over(1099)


def test_a_window_continues_from_its_state() -> None:
    recovery = window(100.0, [1.0, 2.0, 3.0])
    assert Recovery.load(recovery.state_dict()) == recovery

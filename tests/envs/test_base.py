"""The action map and the refusals that every adapter shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlplastic.envs.base import ActionMap, check_actions
from rlplastic.errors import EnvironmentContractError, NonFiniteError

bounds = st.tuples(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))


@given(st.lists(bounds, min_size=1, max_size=4), st.floats(-1, 1, width=32))
def test_every_action_lands_inside_the_box_and_the_extremes_on_its_bounds(
    pairs: list[tuple[float, float]], value: float
) -> None:
    low = np.array([start for start, _ in pairs])
    high = low + np.array([width for _, width in pairs])
    mapped = ActionMap(low, high)
    inside = mapped(np.full((2, len(low)), value, np.float32))
    assert (inside >= low).all() and (inside <= high).all()
    np.testing.assert_allclose(inside[0], low + (high - low) * (value + 1) / 2, atol=1e-9)
    for end, bound in ((-1, low), (1, high)):
        extreme = mapped(np.full((1, len(low)), end, np.float32))[0]
        assert (extreme >= low).all() and (extreme <= high).all()  # not one unit in the last place outside
        np.testing.assert_allclose(extreme, bound, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [([-np.inf], [1]), ([0], [np.nan]), ([1], [1]), ([2], [1])])
def test_a_box_without_finite_increasing_bounds_is_refused(low: list[float], high: list[float]) -> None:
    with pytest.raises(EnvironmentContractError, match="bounded Box"):
        ActionMap(np.array(low), np.array(high))


def test_actions_a_simulator_would_swallow_are_refused() -> None:
    good = np.zeros((3, 2), np.float32)
    check_actions(good, 3, 2)
    check_actions(np.ones((3, 2), np.float32), 3, 2)
    for bad in (good[:2], good[:, :1], good.astype(np.float64), good.tolist(), np.full((3, 2), 1.001, np.float32)):
        with pytest.raises(EnvironmentContractError):
            check_actions(bad, 3, 2)  # type: ignore[arg-type]
    for poison in (np.nan, np.inf):
        bad = good.copy()
        bad[1, 0] = poison
        with pytest.raises(NonFiniteError, match=r"\[1\]"):
            check_actions(bad, 3, 2)

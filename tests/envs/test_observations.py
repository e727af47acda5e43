"""Flattening named terms into the groups of the contract."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from rlplastic.envs.observations import ObservationLayout, action_box, layout_of
from rlplastic.errors import EnvironmentContractError


def test_terms_are_concatenated_in_declared_order_with_scalars_of_width_one() -> None:
    layout = ObservationLayout([("b", (2,)), ("height", ()), ("a", (2, 2))])
    assert layout.dims == {"policy": 7}
    assert layout.terms == {"policy": [("b", slice(0, 2)), ("height", slice(2, 3)), ("a", slice(3, 7))]}
    rng = np.random.default_rng(0)
    raw = {"a": rng.normal(size=(5, 2, 2)), "height": rng.normal(size=5), "b": rng.normal(size=(5, 2)), "unused": None}
    flat = layout(raw)["policy"]  # type: ignore[arg-type]
    assert flat.dtype == np.float32 and flat.shape == (5, 7)
    for row in range(5):
        expected = [*raw["b"][row], raw["height"][row], *raw["a"][row].ravel()]
        np.testing.assert_array_equal(flat[row], np.array(expected, np.float32))


def test_privileged_state_is_the_critics_group_and_policy_comes_first() -> None:
    layout = ObservationLayout([("privileged_state", (4,)), ("state", (2,))])
    assert list(layout.dims.items()) == [("policy", 2), ("critic", 4)]
    groups = layout({"state": np.ones((3, 2)), "privileged_state": np.full((3, 4), 2.0)})
    assert (groups["policy"] == 1).all() and (groups["critic"] == 2).all()


def test_groups_never_share_memory_with_the_simulator() -> None:
    raw = np.zeros((2, 3), np.float32)
    flat = ObservationLayout([("observation", (3,))])(raw)["policy"]
    raw[:] = 7
    assert (flat == 0).all()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3),
        spaces.Box(0, 255, (8, 8, 3), np.uint8),
        spaces.Box(0, 9, (3,), np.int64),
        spaces.Box(-1, 1, (2, 3, 4)),
        spaces.Box(-1, 1, (0,)),
        spaces.Dict({"inner": spaces.Dict({"x": spaces.Box(-1, 1, (2,))})}),
        spaces.Dict({"privileged_state": spaces.Box(-1, 1, (2,))}),
        spaces.Tuple([spaces.Box(-1, 1, (2,))]),
    ],
)
def test_observations_that_are_no_flat_float_boxes_are_refused(space: spaces.Space) -> None:  # type: ignore[type-arg]
    with pytest.raises(EnvironmentContractError):
        layout_of(space, "task")


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.Box(0, 5, (2,), np.int64), spaces.Box(-1, 1, (2, 2))])
def test_actions_that_are_no_flat_float_box_are_refused_by_name(space: spaces.Space) -> None:  # type: ignore[type-arg]
    with pytest.raises(EnvironmentContractError, match=type(space).__name__):
        action_box(space, "task")

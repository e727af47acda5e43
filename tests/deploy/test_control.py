"""The runtime: assembled rows against brute force, limits in closed form, a watchdog that lets nothing pass."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from deploy_document import DOCUMENT

from rlplastic.deploy.control import Controller, Limits, ObservationAssembler, command_bounds, decode
from rlplastic.deploy.document import Document, Observation, ObservationTerm, Order
from rlplastic.errors import ConfigurationError

STILL = {"gyro": [0.0, 0.0, 0.0], "joint_positions": [0.0, 0.0]}


class Scripted:
    """A policy that says what it is told, whatever it sees, and keeps what it saw."""

    def __init__(self, document: Document, *actions: object) -> None:
        self.document, self.actions, self.rows = document, list(actions), list[np.ndarray]()
        self.action_dim = document.action.width

    def run(self, row: np.ndarray) -> Any:
        self.rows.append(row)
        return SimpleNamespace(actions=np.array([self.actions.pop(0)], np.float32))


def controller(*actions: object, document: Document = DOCUMENT, **limits: object) -> Controller:
    settings: dict[str, Any] = {"safe_command": [0.7, -0.2], "max_age": 0.1, **limits}
    return Controller(Scripted(document, *actions), Limits(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["oldest_first", "newest_first"])
@pytest.mark.parametrize(("history", "delay"), [(1, 0), (3, 0), (1, 2), (2, 1)])
def test_assembled_rows_equal_brute_force(order: Order, history: int, delay: int) -> None:
    rng = np.random.default_rng(0)
    scale, offset = (2.0, -1.0), (0.5, 0.0)
    term = ObservationTerm(
        "a", 0, 2 * history, scale, offset, clip=(-2.0, 2.0), history=history, order=order, delay=delay
    )
    plain = ObservationTerm("b", 2 * history, 2 * history + 1, (1.0,), (0.0,))
    assembler = ObservationAssembler(Observation(2 * history + 1, (term, plain)))
    seen: list[np.ndarray] = []
    for step in range(8):
        value = rng.normal(size=2) * 2
        seen.append(value)
        row = assembler({"b": [float(step)], "a": value})
        times = [max(step - delay - age, 0) for age in range(history)]  # newest first; the first value stands in
        frames = [np.clip(np.array(scale) * seen[time] + offset, -2, 2) for time in times]
        expected = np.concatenate([*(frames if order == "newest_first" else frames[::-1]), [step]])
        assert row.dtype == np.float32 and row.shape == (1, len(expected))
        np.testing.assert_array_equal(row[0], expected.astype(np.float32))


def test_frames_are_stacked_whole_and_forgotten_at_a_reset() -> None:
    terms = (ObservationTerm("a", 0, 1, (1.0,), (0.0,)), ObservationTerm("b", 1, 2, (1.0,), (0.0,)))
    assembler = ObservationAssembler(Observation(6, terms, frames=3))
    rows = [assembler({"a": t, "b": 10 * t})[0].tolist() for t in (1, 2, 3, 4)]
    assert rows[0] == [1, 10] * 3 and rows[1] == [1, 10, 1, 10, 2, 20] and rows[3] == [2, 20, 3, 30, 4, 40]
    assembler.reset()
    assert assembler({"a": 9, "b": 90})[0].tolist() == [9, 90] * 3


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"gyro": [0.0] * 3}, "the observation term 'joint_positions' is missing"),
        (
            {**STILL, "gyroscope": [0.0] * 3, "last_action": [0, 0]},
            "no observation term 'gyroscope'; did you mean 'gyro'",
        ),
        ({**STILL, "gyro": [0.0] * 4, "last_action": [0, 0]}, "'gyro' has 4 elements; expected 3"),
    ],
)
def test_wrong_terms_are_refused_with_their_name(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ObservationAssembler(DOCUMENT.observation)(values)  # type: ignore[arg-type]
    assert sentence in str(caught.value)


def test_actions_are_decoded_by_the_tasks_map_and_kept_within_joint_limits() -> None:
    np.testing.assert_allclose(decode(DOCUMENT, np.array([0.4, -0.4])), [0.8, -1 / 3 - 0.1])
    tight = replace(DOCUMENT, joints=(replace(DOCUMENT.joints[0], lower=-0.4), DOCUMENT.joints[1]))
    low, high = command_bounds(tight)
    assert low.tolist() == [-1.0, -0.4] and high.tolist() == [1.0, 1.0]
    command = controller([0.4, -0.4], document=tight).step(STILL, age=0.0)
    np.testing.assert_allclose(command.command, [0.8, -0.4])
    assert command.fault is None


def test_a_torque_is_not_limited_by_the_positions_of_its_joint() -> None:
    torque = replace(DOCUMENT, action=replace(DOCUMENT.action, kind=("torque", "torque"), target=None))
    assert command_bounds(torque)[0].tolist() == [-0.4, -0.4]


def test_a_command_changes_by_the_rate_and_period_at_most() -> None:
    loop = controller([0.4, -0.4], [0.4, -0.4], max_rate=[1.0, 100.0])
    loop.reset(command=[0.0, 0.0])
    np.testing.assert_allclose(loop.step(STILL, 0.0).command, [0.02, -1 / 3 - 0.1])  # 1 per second, 0.02 s
    np.testing.assert_allclose(loop.step(STILL, 0.0).command, [0.04, -1 / 3 - 0.1])


@pytest.mark.parametrize(
    ("values", "age", "fault"),
    [
        (STILL, 0.2, "the measurements are 0.2 s old, more than 0.1 s"),
        (STILL, float("nan"), "nan s old"),
        ({**STILL, "gyro": [0.0, float("nan"), 0.0]}, 0.0, "gyro: not finite"),
        ({**STILL, "gyro": [0.0, float("inf"), 0.0]}, 0.0, "gyro: not finite"),
        ({"gyro": [0.0] * 3}, 0.0, "'joint_positions' is missing"),
        ({**STILL, "gyro": None}, 0.0, "'gyro' has 1 elements"),
        ({**STILL, "gyro": "loose cable"}, 0.0, "could not convert"),
    ],
)
def test_bad_input_gives_the_safe_command_and_says_why(values: dict[str, object], age: float, fault: str) -> None:
    loop = controller()  # which would break off if the policy were asked
    command = loop.step(values, age)  # type: ignore[arg-type]
    assert command.command.tolist() == [0.7, -0.2]
    assert command.fault is not None and fault in command.fault


def test_an_output_that_is_not_finite_gives_the_safe_command() -> None:
    command = controller([float("nan"), 0.0]).step(STILL, 0.0)
    assert command.command.tolist() == [0.7, -0.2] and command.fault == "the policy's output is not finite"


def test_the_way_to_the_safe_command_and_back_is_limited_in_rate_too() -> None:
    loop = controller([0.4, 0.4], max_rate=1.0)
    loop.reset(command=[0.0, 0.0])
    assert loop.step(STILL, 1.0).command.tolist() == [0.02, -0.02]
    np.testing.assert_allclose(loop.step(STILL, 0.0).command, [0.04, -0.04], atol=1e-12)


def test_the_last_action_is_the_policys_own_with_the_tasks_delay() -> None:
    document = DOCUMENT
    policy = Scripted(document, [0.1, -0.1], [0.2, -0.2], [0.3, -0.3])
    loop = Controller(policy, Limits([0.0, 0.0], 1.0))  # type: ignore[arg-type]
    for _ in range(3):
        loop.step(STILL, 0.0)
    np.testing.assert_allclose([row[0, 8:] for row in policy.rows], [[0, 0], [0, 0], [0.1, -0.1]], rtol=1e-6)


def test_a_history_is_begun_anew_after_a_fault() -> None:
    policy = Scripted(DOCUMENT, *[[0.0, 0.0]] * 3)
    loop = Controller(policy, Limits([0.0, 0.0], 1.0))  # type: ignore[arg-type]
    for value, age in ((3.0, 0.0), (6.0, 2.0), (9.0, 0.0)):
        loop.step({**STILL, "gyro": [value] * 3}, age)
    np.testing.assert_allclose(policy.rows[1][0, :6], 9 / 3 + 0.1, rtol=1e-6)


@pytest.mark.parametrize("limits", [{"safe_command": [0.0]}, {"safe_command": float("nan")}, {"max_rate": [1.0] * 3}])
def test_limits_of_the_wrong_size_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="expected a finite number, or 2 of them"):
        controller(**limits)


def test_a_policy_without_timing_needs_a_period() -> None:
    with pytest.raises(ConfigurationError, match="give the period"):
        controller(document=replace(DOCUMENT, timing=None))

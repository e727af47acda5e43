"""Rate, latencies and deadlines against a clock that the test moves; noise and delays around a policy."""

from __future__ import annotations

import numpy as np
import pytest
from policies import document_of, write_policy

from rlplastic.config import EnvConfig
from rlplastic.deploy import OnnxPolicy
from rlplastic.envs.perturbation import Perturbation
from rlplastic.errors import NonFiniteError
from rlplastic.playing.rollout import EDGES_US, Pace, Timings, perturbed


class Clock:
    """Time passes where the test says so, and in ``sleep``."""

    def __init__(self) -> None:
        self.time, self.slept = 100.0, []  # type: ignore[var-annotated]

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


def cycles(realtime: bool, work: list[tuple[float, float]]) -> tuple[Timings, Clock, list[float]]:
    """Cycles of (seconds to decide, seconds to simulate) at a period of 1 s; also returns when each began."""
    clock, timings, began = Clock(), Timings(1.0), []
    pace = Pace(timings, realtime, clock.now, clock.sleep)
    remaining = iter(work)

    def act(observation: dict[str, np.ndarray]) -> np.ndarray:
        began.append(clock.time)
        clock.time += next(remaining)[0]
        return np.zeros((1, 1), np.float32)

    paced = pace.around(act)
    for _, simulate in work:
        paced({})
        clock.time += simulate
    return timings, clock, began


def test_realtime_cycles_begin_every_period() -> None:
    timings, clock, began = cycles(True, [(0.1, 0.2), (0.3, 0.3), (0.5, 0.25), (0.1, 0.1)])
    np.testing.assert_allclose(began, [100, 101, 102, 103])
    np.testing.assert_allclose(clock.slept, [0.7, 0.4, 0.25])
    assert timings.missed == 0
    np.testing.assert_allclose(timings.decisions, [0.1, 0.3, 0.5, 0.1])


def test_one_late_cycle_is_counted_once_and_the_schedule_goes_on_from_there() -> None:
    timings, _, began = cycles(True, [(0.1, 0.1), (0.1, 2.4), (0.1, 0.1), (0.1, 0.1)])
    np.testing.assert_allclose(began, [100, 101, 103.5, 104.5])
    assert timings.missed == 1


def test_without_realtime_nothing_waits_and_long_cycles_are_counted() -> None:
    timings, clock, began = cycles(False, [(0.1, 0.2), (0.8, 0.9), (0.1, 0.1), (1.5, 0.0), (9.0, 9.0)])
    np.testing.assert_allclose(began, [100, 100.3, 102.0, 102.2, 103.7])
    assert clock.slept == []
    assert timings.missed == 2, "the last cycle has no next one, and so no deadline"


def test_time_between_episodes_belongs_to_no_cycle() -> None:
    clock, timings = Clock(), Timings(1.0)
    pace = Pace(timings, False, clock.now, clock.sleep)
    for _ in range(3):
        pace.around(lambda observation: np.zeros((1, 1), np.float32))({})
        clock.time += 50.0
    assert timings.missed == 0


def test_summary_is_that_of_the_decisions() -> None:
    rng = np.random.default_rng(0)
    seconds = rng.lognormal(np.log(1e-4), 2.0, 500)
    timings = Timings(0.02, list(seconds), 7)
    found = timings.summary()
    assert found["latency_ms"] == pytest.approx(
        {"p50": np.median(seconds) * 1e3, "p99": np.quantile(seconds, 0.99) * 1e3, "max": seconds.max() * 1e3}
    )
    assert (found["control_period_ms"], found["cycles"], found["missed_deadlines"]) == (20.0, 500, 7)
    expected, _ = np.histogram(seconds * 1e6, [*EDGES_US, np.inf])
    assert found["latency_histogram"]["counts"] == expected.tolist()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxPolicy, np.ndarray]:
    path = tmp_path_factory.mktemp("policy") / "policy.onnx"
    weights = write_policy(path, document_of(EnvConfig(family="classic", task="Pendulum-v1")))
    return OnnxPolicy.load(path), weights


def test_perturbed_policy_sees_late_and_acts_late(policy: tuple[OnnxPolicy, np.ndarray]) -> None:
    loaded, weights = policy
    act = perturbed(loaded, Perturbation(observation_delay=2, action_delay=1), seed=0)
    rows = np.random.default_rng(0).normal(size=(8, 1, 3)).astype(np.float32)
    decided = [np.tanh(rows[max(t - 2, 0)] @ weights) for t in range(8)]
    for t in range(8):
        expected = decided[t - 1] if t else np.zeros((1, 1))
        np.testing.assert_allclose(act({"policy": rows[t]}), expected, atol=1e-6)


def test_observation_that_is_not_finite_is_refused(policy: tuple[OnnxPolicy, np.ndarray]) -> None:
    act = perturbed(policy[0], Perturbation(), seed=0)
    with pytest.raises(NonFiniteError, match="not finite"):
        act({"policy": np.full((1, 3), np.nan, np.float32)})

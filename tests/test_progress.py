"""Counting, pacing, budgets and the profile."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlplastic.progress import Budget, MetricMeans, Progress, ReplayRatio, Stopwatch


@given(
    ratio=st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.5, 2 / 1024]),
    minimum=st.integers(0, 300),
    steps=st.lists(st.integers(0, 64), max_size=100),
)
def test_updates_equal_the_ratio_times_transitions_after_the_minimum(
    ratio: float, minimum: int, steps: list[int]
) -> None:
    progress, pace, updates = Progress(), ReplayRatio(ratio, minimum), 0
    for added in steps:
        pace.accrue(progress, added)
        updates += pace.due(progress)
    owed = ratio * max(sum(steps) - minimum, 0)
    assert owed - 1 - 1e-6 <= updates <= owed + 1e-6
    assert progress.transitions == sum(steps)


def test_reaching_the_minimum_causes_no_burst() -> None:
    progress, pace = Progress(), ReplayRatio(1.0, 1000)
    for _ in range(125):
        pace.accrue(progress, 8)
        assert pace.due(progress) == 0
    pace.accrue(progress, 8)
    assert pace.due(progress) == 8


@given(every=st.integers(1, 50), steps=st.lists(st.integers(0, 20), max_size=60))
def test_a_cadence_fires_once_for_each_step_that_passes_a_multiple(every: int, steps: list[int]) -> None:
    progress, fired = Progress(), 0
    for added in steps:
        progress.transitions += added
        fired += progress.crossed(every, added)
    assert fired <= sum(steps) // every
    if all(added <= every for added in steps):
        assert fired == sum(steps) // every
    assert not progress.crossed(0, 5)


def test_whichever_budget_is_spent_first_ends_the_run() -> None:
    budget = Budget(env_steps=100, max_minutes=1.0)
    assert budget.used(Progress(transitions=50, train_seconds=6)) == 0.5
    assert budget.spent(Progress(transitions=100))
    assert budget.spent(Progress(transitions=3, train_seconds=60))
    assert not Budget(None, 2.0).spent(Progress(transitions=10**9, train_seconds=119))


def test_sections_add_up_to_all_of_the_wall_time() -> None:
    watch = Stopwatch()
    started = time.perf_counter()
    for section in ("act", "learn", "env") * 5:
        time.sleep(0.002)
        watch.lap(section)
    wall = time.perf_counter() - started
    sections = watch.pop()
    assert sum(sections.values()) == pytest.approx(watch.elapsed)
    assert watch.elapsed == pytest.approx(wall, rel=0.05)
    assert watch.pop() == {}


def test_what_passed_before_the_start_is_only_in_the_totals() -> None:
    began = time.perf_counter()
    watch = Stopwatch(began)
    time.sleep(0.05)
    watch.start()
    assert watch.lap("act") < 0.04
    assert watch.elapsed < 0.04
    assert list(watch.pop()) == ["act"]
    watch.lap("env")
    assert list(watch.totals) == ["start", "act", "env"]
    assert watch.totals["start"] >= 0.05
    assert sum(watch.totals.values()) == pytest.approx(time.perf_counter() - began, abs=0.01)


def test_a_device_is_waited_for_before_every_reading() -> None:
    watch = Stopwatch(wait=lambda: time.sleep(0.01))
    assert watch.lap("update") >= 0.01


def test_metric_means_are_those_since_the_last_pop_and_survive_a_checkpoint() -> None:
    means = MetricMeans()
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value), "shape_one": torch.tensor([value])})
    means.add({"loss": torch.tensor(3.0)})
    copy = MetricMeans()
    copy.load_state_dict(means.state_dict(), torch.device("cpu"))
    expected = {"loss": 3.0, "shape_one": 3.0}
    assert means.pop() == expected == copy.pop()
    assert means.pop() == {}

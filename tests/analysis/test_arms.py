"""Arms: which runs are one, how they are called, and their row of results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import STEPS, made_run, made_sweep
from scipy import stats

from rlplastic.analysis.arms import Arm, Row, arms_of, differences, normalised, row_of
from rlplastic.analysis.runs import find_runs, read_run


def refuse(sentence: str) -> None:
    raise AssertionError(sentence)


def arms_in(folder: Path) -> list[Arm]:
    runs = [run for path in find_runs(str(folder), refuse) if (run := read_run(path, refuse))]
    return arms_of(runs, refuse)


def labels(folder: Path, *settings: dict[str, Any], task: str = "Hopper-v5") -> list[str]:
    for number, each in enumerate(settings):
        made_run(folder / f"{task}{number}", task=task, settings=each)
    return [arm.label for arm in arms_in(folder)]


def test_seeds_and_how_a_run_is_watched_make_no_other_arm(tmp_path: Path) -> None:
    for seed in range(3):
        watched = {"tracking.every": seed, "evaluation.episodes": seed, "threads": seed, "runs": f"r{seed}"}
        made_run(tmp_path / f"run{seed}", seed=2 - seed, settings=watched)
    (arm,) = arms_in(tmp_path)
    assert [run.seed for run in arm.runs] == [0, 1, 2] and arm.label == "sac"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{"agent.name": "sac"}, {"agent.name": "flashsac", "agent.num_blocks": 2}], ["flashsac", "sac"]),
        ([{"replay_ratio": 1}, {"replay_ratio": 2}], ["replay_ratio=1", "replay_ratio=2"]),
        ([{"env_steps": 10}, {"env_steps": 20}], ["env_steps=10", "env_steps=20"]),
        (
            [{"agent.name": "sac"}, {"agent.name": "flashsac"}, {"agent.name": "flashsac", "critic.kind": "flow"}],
            ["flashsac, critic.kind unset", "flashsac, flow", "sac"],
        ),
        (
            [{"agent.name": "flashsac", "b": 1}, {"b": 1}, {"b": 2, "c": 1}, {"b": 2, "c": 2}],
            ["flashsac", "sac, b=1", "sac, b=2, c=1", "sac, b=2, c=2"],
        ),
        ([{"a": 1, "b": 1}, {"a": 2, "b": 2}], ["a=1", "a=2"]),
    ],
)
def test_a_label_holds_what_tells_arms_apart_and_no_more(tmp_path: Path, settings, expected) -> None:  # type: ignore[no-untyped-def]
    assert labels(tmp_path, *settings) == expected


def test_what_differs_only_between_tasks_is_in_no_label(tmp_path: Path) -> None:
    arms = arms_in(made_sweep(tmp_path, seeds=1))
    assert [(arm.task, arm.label) for arm in arms] == [
        ("Hopper-v5", "flashsac"),
        ("Hopper-v5", "sac"),
        ("Pendulum-v1", "flashsac"),
        ("Pendulum-v1", "sac"),
    ]
    assert differences(arms[:2]) == {"agent.name": ["flashsac", "sac"]}
    assert set(differences(arms)) == {"agent.name", "env.task", "env.num_envs"}


def test_a_setting_that_an_arm_does_not_have_is_a_difference(tmp_path: Path) -> None:
    made_run(tmp_path / "a", settings={"agent.name": "flashsac", "agent.num_blocks": 2})
    made_run(tmp_path / "b")
    assert differences(arms_in(tmp_path)) == {"agent.name": ["flashsac", "sac"], "agent.num_blocks": ["2", "–"]}


def test_the_longer_of_two_runs_of_one_seed_counts(tmp_path: Path) -> None:
    made_run(tmp_path / "long")
    made_run(tmp_path / "again", returns=[1.0])
    warnings: list[str] = []
    runs = [run for path in find_runs(str(tmp_path), refuse) if (run := read_run(path, refuse))]
    (arm,) = arms_of(runs, warnings.append)
    assert [run.path.name for run in arm.runs] == ["long"]
    assert len(warnings) == 1 and "again is the same configuration and seed as" in warnings[0]


def test_results_are_what_numpy_and_scipy_make_of_the_runs(tmp_path: Path) -> None:
    curves = np.random.default_rng(3).normal(size=(8, 4))
    for seed, returns in enumerate(curves):
        made_run(tmp_path / f"{seed}", seed=seed, returns=returns, finished=seed > 1)
    (arm,) = arms_in(tmp_path)
    row = row_of(arm)
    assert (row.task, row.arm, row.seeds, row.finished) == ("Hopper-v5", "sac", 8, 6)
    assert row.return_mean == pytest.approx(curves[:, -1].mean())
    assert row.return_iqm == pytest.approx(stats.trim_mean(curves[:, -1], 0.25))
    areas = np.trapezoid(curves, np.array(STEPS) / 3000, axis=1)
    assert row.area_mean == pytest.approx(areas.mean())
    for values, low, high in ((curves[:, -1], row.return_low, row.return_high), (areas, row.area_low, row.area_high)):
        wanted = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=1).confidence_interval
        assert (low, high) == pytest.approx(tuple(wanted), abs=0.06)
    assert (row.changes, math.isnan(row.dip_depth)) == (0, True)
    assert (row.steps, row.updates, row.train_seconds, row.wall_seconds) == (4000, 2000, 40, pytest.approx(4000 / 90))


def test_switches_and_interventions_cost_what_evaluations_lost_after_them(tmp_path: Path) -> None:
    """Evaluated at 1000, 2000, 3000 and 4000: a switch at 3000, and in the first run a commit at 1500."""
    committed = [{"event": "committed", "step": 1500, "updates": 750, "sentence": "done"}]
    switched = {"env.switch_every": 3000}
    made_run(tmp_path / "0", seed=0, settings=switched, returns=(10.0, 4.0, 1.0, 9.0), records=committed)
    made_run(tmp_path / "1", seed=1, settings=switched, returns=(10.0, 20.0, 30.0, 40.0))
    row = row_of(arms_in(tmp_path)[0])
    # run 0: 10 to 4 (not recovered before 3000), then 4 to 1 (recovered at 4000); run 1: no dip, recovered at once
    assert (row.changes, row.dip_depth, row.recovered) == (1.5, pytest.approx((6 + 3 + 0) / 3), pytest.approx(2 / 3))
    assert row.dip_area == pytest.approx((500 * 6 + 3 * 1000 * 3 / 8 / 2) / 3)
    assert row.recovery_steps == 500


def test_a_single_run_has_results_and_no_interval(tmp_path: Path) -> None:
    made_run(tmp_path / "run", returns=[5.0], finished=False)
    row = row_of(arms_in(tmp_path)[0])
    assert (row.seeds, row.finished, row.return_mean, row.return_iqm, row.area_mean) == (1, 0, 5.0, 5.0, 5.0)
    assert math.isnan(row.return_low) and math.isnan(row.iqm_high) and math.isnan(row.area_low)


def test_a_run_that_was_never_evaluated_counts_as_a_seed_only(tmp_path: Path) -> None:
    made_run(tmp_path / "run", returns=[])
    row = row_of(arms_in(tmp_path)[0])
    assert row.seeds == 1 and all(math.isnan(getattr(row, name)) for name in Row._fields if name.startswith("return"))


def test_scores_are_normalised_by_the_extremes_of_each_task(tmp_path: Path) -> None:
    for name, task, agent, returns in (
        ("a", "Hopper-v5", "sac", (0.0, 100.0)),
        ("b", "Hopper-v5", "flashsac", (20.0, 50.0)),
        ("c", "Pendulum-v1", "sac", (-1000.0, -200.0)),
        ("d", "Pendulum-v1", "flashsac", (-900.0, -600.0)),
    ):
        made_run(tmp_path / name, task=task, settings={"agent.name": agent}, returns=returns)
    arms = arms_in(tmp_path)
    scores = {label: [stratum.tolist() for stratum in strata] for label, strata in normalised(arms).items()}
    assert scores == {"flashsac": [[0.5], [0.5]], "sac": [[1.0], [1.0]]}
    assert normalised(arms[:2]) == {}
    assert set(normalised(arms[:3])) == {"flashsac"}, "SAC has no run on Pendulum here"

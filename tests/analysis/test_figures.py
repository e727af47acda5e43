"""Figures: what is drawn is what the runs hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_runs import STEPS, decisions, made_run, measurements
from matplotlib.axes import Axes
from scipy import stats

from rlplastic.analysis import figures, style
from rlplastic.analysis.arms import Arm, arms_of
from rlplastic.analysis.runs import read_run
from rlplastic.analysis.statistics import Floats, bootstrap_interval, interquartile_mean

RETURNS = np.array([[0.0, 1.0, 2.0, 3.0], [5.0, 4.0, 8.0, 9.0], [1.0, 0.0, 7.0, 2.0], [9.0, 9.0, 9.0, 100.0]])


def refuse(sentence: str) -> None:
    raise AssertionError(sentence)


def arms_with(folder: Path, **options: Any) -> list[Arm]:
    paths = [made_run(folder / f"{seed}", seed=seed, returns=row, **options) for seed, row in enumerate(RETURNS)]
    return arms_of([run for path in paths if (run := read_run(path, refuse))], refuse)


def colours_of(arms: list[Arm]) -> Mapping[str, Mapping[str, Any]]:
    return {arm.label: style.colour(index) for index, arm in enumerate(arms)}


def lines(panel: Axes) -> list[tuple[Floats, Floats]]:
    return [(np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)) for line in panel.lines]


def diagnosed(seed: int, kind: str) -> dict[str, Any]:
    """A document as `rlplastic.diagnose` writes it, with numbers that tell the seeds apart."""
    flow = {"recovery": [1.0 + seed, 2.0, 3.0], "curvature": [0.0, 0.5]} if kind == "flow" else None
    learning = {"head": [3.0, 2.0 + seed, None], "all layers": [3.0, 1.0, 0.5]}
    critic = {"kind": kind, "value_error": [4.0, 1.0 + seed] if flow else [2.0], "learning": learning, "every": 10}
    return {"critic": critic | {"magnitudes": [0.0, 2.0], "noise": [1.0, 5.0], "flow": flow}}


def test_diagnosed_critics_have_panels_of_what_was_measured(tmp_path: Path) -> None:
    for seed, kind in ((0, "flow"), (1, "flow"), (2, "scalar"), (3, "scalar")):
        path = made_run(tmp_path / f"{kind}{seed}", seed=seed, settings={"critic.kind": kind})
        if seed < 3:  # one run was not diagnosed
            (path / "diagnosis.json").write_text(json.dumps(diagnosed(seed, kind)))
    arms = arms_of([run for path in tmp_path.iterdir() if (run := read_run(path, refuse))], refuse)
    figure = figures.critics(arms, colours_of(arms))
    assert figure is not None
    panels = {panel.get_title(): panel for panel in figure.axes}
    assert list(panels) == list(figures.CRITICS)
    mean = lines(panels["recovery"])[-1]
    np.testing.assert_allclose(mean, ([0, 0.5, 1], [1.5, 2, 3]))
    np.testing.assert_allclose(lines(panels["curvature of the path"])[-1][0], [0, 0.5])
    learning = lines(panels["error while the head alone learns"])
    assert any(np.array_equal(x, [0, 10, 20]) and np.isnan(y[2]) for x, y in learning)
    assert any(np.array_equal(y, [2.0]) for _, y in lines(panels["error of the value"])), "the scalar critic's"


def test_runs_that_nobody_diagnosed_have_no_panel_of_critics(tmp_path: Path) -> None:
    arms = arms_with(tmp_path)
    assert figures.critics(arms, colours_of(arms)) is None


def test_curves_are_the_interquartile_mean_its_interval_and_every_seed(tmp_path: Path) -> None:
    arms = arms_with(tmp_path)
    figure = figures.learning(arms, colours_of(arms))
    assert figure is not None
    for panel, x in zip(figure.axes, (STEPS, np.array(STEPS) / 2, np.array(STEPS) / 100), strict=True):
        *seeds, middle = lines(panel)
        for seed, row in zip(seeds, RETURNS, strict=True):
            assert seed[0].tolist() == list(x) and seed[1].tolist() == row.tolist()
        np.testing.assert_allclose(middle, (x, stats.trim_mean(RETURNS, 0.25)))
        (band,) = panel.collections
        low, high = bootstrap_interval([RETURNS], interquartile_mean)
        corners = band.get_paths()[0].vertices
        assert corners[:, 1].min() == low.min() and corners[:, 1].max() == high.max()


def test_the_mean_of_seeds_ends_with_the_first_of_them(tmp_path: Path) -> None:
    for seed, count in enumerate((4, 2)):
        made_run(tmp_path / f"{seed}", seed=seed, returns=RETURNS[seed][:count], finished=False)
    runs = [run for seed in (0, 1) if (run := read_run(tmp_path / f"{seed}", refuse))]
    arms = arms_of(runs, refuse)
    figure = figures.learning(arms, colours_of(arms))
    assert figure is not None
    *seeds, middle = lines(figure.axes[0])
    assert [len(seed[0]) for seed in seeds] == [4, 2]
    assert middle[0].tolist() == [1000, 2000] and middle[1].tolist() == [2.5, 2.5]


def test_profile_starts_with_all_runs_and_ends_with_none(tmp_path: Path) -> None:
    arms = arms_with(tmp_path)
    figure = figures.outcome(arms, colours_of(arms))
    assert figure is not None
    thresholds, fractions = lines(figure.axes[1])[0]
    assert fractions[0] == 1.0 and fractions[-1] == 0.0
    assert fractions.tolist() == [(RETURNS[:, -1] > threshold).mean() for threshold in thresholds]


def test_metrics_stand_over_updates_beside_fresh_networks_with_the_events_marked(tmp_path: Path) -> None:
    arms = arms_with(tmp_path, records=[*measurements(), *decisions()])
    figure = figures.plasticity(arms, colours_of(arms))
    assert figure is not None
    panels = {panel.get_title(): panel for panel in figure.axes}
    assert list(panels) == ["critic probe ratio", "critic effective rank", "critic dormant", "actor weight norm"]
    drawn = [(x.tolist(), y.tolist()) for x, y in lines(panels["critic effective rank"])]
    updates = [step / 2 for step in STEPS]
    assert drawn.count((updates, [step / 100 for step in STEPS])) == len(RETURNS) + 1  # every seed, and their mean
    assert drawn.count((updates, [40.0] * 4)) == 1
    assert drawn.count(([1000.0, 1000.0], [0.0, 1.0])) == len(RETURNS), "a line where the network was changed"
    assert ([1000.0], [1.8]) in [(x.tolist(), y.tolist()) for x, y in lines(panels["critic probe ratio"])]


def test_layers_count_with_their_mean_only_where_the_whole_network_was_not_measured() -> None:
    values = {"critic/a/rank": 1.0, "critic/b/rank": 3.0, "critic/a/dead": 9.0, "critic/all/dead": 0.5}
    values |= {"critic/all/dead_worst": 7.0, "frozen/critic/all/dead": 8.0}
    assert figures._of_modules(values) == {"critic rank": 2.0, "critic dead": 0.5}


def test_time_is_told_by_the_profile_and_else_by_the_fractions_of_the_rows(tmp_path: Path) -> None:
    (arm,) = arms_with(tmp_path)
    assert figures._spent(arm.runs) == pytest.approx(
        dict.fromkeys(("env", "act", "learn", "store", "log", "evaluate", "checkpoint"), 1 / 7)
    )
    for seed in range(4):
        text = '{"sections": {"update": {"seconds": 3.0}, "env": {"seconds": 0.5}, "new": {"seconds": 0.5}}}'
        (tmp_path / f"{seed}" / "profile.json").write_text(text)
    runs = [run for seed in range(4) if (run := read_run(tmp_path / f"{seed}", refuse))]
    assert figures._spent(runs) == {"update": 0.75, "env": 0.125, "other": 0.125}


def test_arms_are_told_apart_by_colour_and_then_by_dashes() -> None:
    looks = [tuple(style.colour(index).values()) for index in range(32)]
    assert len(set(looks)) == 32 and {dashes for _, dashes in looks[:8]} == {"-"}

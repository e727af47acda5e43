"""The bench of illnesses: what is judged, how well it is told, how thresholds are chosen; by counting and scipy."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlplastic.plasticity.monitor import Rules

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def detection(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("detection")


def probe(
    updates: int, area: float, fresh: float, alarms: tuple[str, ...] = (), patient: str = "critic"
) -> dict[str, Any]:
    """Of two members, of whom the first learns faster."""
    areas = {"members": [0.5 * area / fresh, area / fresh], "areas": [0.5 * area, area], "fresh_areas": [fresh, fresh]}
    return {"event": "probe", "updates": updates, "patient": patient, "alarms": list(alarms), **areas}


def reading(updates: int, weight: float | None, rank: float | None) -> dict[str, Any]:
    values = {"plasticity/critic/all/weight_norm": weight, "plasticity/critic/trunk.3/effective_rank": rank}
    values |= {"plasticity/critic/all/dormant": 0.25, "plasticity/actor/all/weight_norm": 1e6}
    values |= {"plasticity/critic/trunk.3/effective_rank_worst": 1e6, "plasticity/critic/trunk.1/weight_norm": 1e6}
    fresh = {"plasticity/critic/all/weight_norm": 10.0, "plasticity/critic/trunk.3/effective_rank": 40.0}
    return {"event": "measurement", "updates": updates, "values": values, "fresh": fresh}


def write_run(directory: Path, name: str, lines: list[dict[str, Any]]) -> None:
    folder = directory / "runs" / name
    folder.mkdir(parents=True)
    (folder / "plasticity.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_curve(directory: Path, name: str, returns: list[float]) -> None:
    (directory / "curves").mkdir(exist_ok=True)
    rows = [f"{100 * (step + 1)},{value}\n" for step, value in enumerate(returns)]
    (directory / "curves" / f"{name}.csv").write_text("step,return_mean\n" + "".join(rows))


def moment(detection: ModuleType, **given: Any) -> Any:
    blank = {
        "case": "case",
        "seed": 0,
        "updates": 100,
        "ratio": 1.0,
        "gap": 0.0,
        "weight_factor": 1.0,
        "rank_factor": 1.0,
    }
    return detection.Moment(**(blank | {"dormant": 0.0, "alarm": 0, "truth": ""} | given))


def test_a_moment_holds_the_worst_member_and_the_newest_readings(detection: ModuleType, tmp_path: Path) -> None:
    lines = [reading(100, 20.0, 10.0), probe(100, 0.6, 0.2), probe(100, 9.0, 0.1, patient="actor")]
    lines += [reading(200, 30.0, None), probe(200, 0.3, 0.3, alarms=("plasticity/critic/all/weight_norm",))]
    write_run(tmp_path, "case__probed__3", lines)
    one, two = detection.moments_of(tmp_path / "runs" / "case__probed__3" / "plasticity.jsonl", "case", 3)
    assert (one.run, one.updates, one.alarm) == (("case", 3), 100, 0)
    assert (one.ratio, one.gap) == (pytest.approx(3.0), pytest.approx(0.4))
    assert (one.weight_factor, one.rank_factor, one.dormant) == (2.0, 0.25, 0.25)
    assert (two.weight_factor, two.rank_factor, two.alarm) == (3.0, 0.0, 1), "a rank that is no number is none"


def test_moments_stay_when_their_runs_are_gone_and_are_renewed_while_they_are_there(
    detection: ModuleType, tmp_path: Path
) -> None:
    write_run(tmp_path, "a__probed__0", [probe(100, 0.6, 0.2)])
    write_run(tmp_path, "b__probed__0", [probe(100, 0.6, 0.2)])
    first = detection.update_moments(tmp_path, ["a", "b"])
    (tmp_path / "runs" / "a__probed__0" / "plasticity.jsonl").unlink()
    (tmp_path / "runs" / "b__probed__0" / "plasticity.jsonl").write_text(json.dumps(probe(100, 0.2, 0.2)))
    again = detection.update_moments(tmp_path, ["a", "b"])
    assert [m.run for m in again] == [("a", 0), ("b", 0)]
    assert [m.ratio for m in first] == pytest.approx([3.0, 3.0])
    assert [m.ratio for m in again] == pytest.approx([3.0, 1.0])
    assert math.isnan(again[0].rank_factor)


@pytest.mark.parametrize(
    ("case", "updates", "oracle", "expected"),
    [
        ({"truth": "healthy"}, 5, "better", False),
        ({"truth": "ill", "sure": 100}, 99, "open", None),
        ({"truth": "ill", "sure": 100}, 100, "not better", True),
        ({"truth": "unknown", "sure": 100}, 100, "better", True),
        ({"truth": "unknown", "sure": 100}, 99, "better", None),
        ({"truth": "unknown", "sure": 100}, 100, "not better", False),
        ({"truth": "unknown", "sure": 100}, 100, "open", None),
    ],
)
def test_what_lies_between_the_cause_and_the_certain_illness_is_not_judged(
    detection: ModuleType, case: Mapping[str, Any], updates: int, oracle: str, expected: bool | None
) -> None:
    found = detection.truth_of(moment(detection, updates=updates), detection.Case(why="", **case), oracle)
    assert found is expected


def test_a_run_that_tells_the_truth_itself_is_judged_moment_by_moment(detection: ModuleType, tmp_path: Path) -> None:
    lines = [probe(100, 0.2, 0.2), {"event": "truth", "updates": 100, "ill": False}]
    lines += [probe(200, 0.2, 0.2), {"event": "truth", "updates": 200, "ill": None}]
    lines += [probe(300, 0.6, 0.2), {"event": "truth", "updates": 300, "ill": True}]
    write_run(tmp_path, "case__probed__0", lines)
    case = detection.Case("moments", "")
    found = detection.update_moments(tmp_path, ["case"])
    assert [detection.truth_of(each, case, "open") for each in found] == [False, None, True]


def test_the_oracle_pairs_late_returns_by_seed_and_needs_more_than_one(detection: ModuleType, tmp_path: Path) -> None:
    for seed, gain in enumerate((10.0, 12.0, 11.0)):
        write_curve(tmp_path, f"case__probed__{seed}", [0.0, 0.0, 50.0 * seed, 50.0 * seed])
        write_curve(tmp_path, f"case__reset__{seed}", [0.0, -9.0, 50.0 * seed + gain, 50.0 * seed + gain])
    write_curve(tmp_path, "case__reset__7", [1e9])
    gains = detection.reset_gains(tmp_path, "case")
    assert gains == [10.0, 12.0, 11.0]
    assert [detection.oracle_of(each) for each in (gains, gains[:1], [-3.0, 3.0, 1.0])] == [
        "better",
        "open",
        "not better",
    ]


def test_the_area_under_the_curve_is_that_of_mann_and_whitney(detection: ModuleType) -> None:
    chance = np.random.default_rng(1)
    ill, healthy = chance.integers(0, 6, 40).tolist(), chance.integers(0, 5, 30).tolist()
    expected = stats.mannwhitneyu(ill, healthy).statistic / (40 * 30)
    assert detection.area_under_roc(ill, healthy) == pytest.approx(expected)
    assert math.isnan(detection.area_under_roc([], healthy))


def test_precision_and_recall_by_counting(detection: ModuleType) -> None:
    said, truth = [True, True, True, False, False], [True, False, True, True, False]
    assert detection.precision_and_recall(said, truth) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert math.isnan(detection.precision_and_recall([False], [True])[0])


def test_a_threshold_lies_in_the_middle_of_those_that_separate_best(detection: ModuleType) -> None:
    rule, candidates = (lambda m, at: m.ratio > at[0]), [(value / 10,) for value in range(10, 31)]
    judged = [(moment(detection, case="a", ratio=1.3), False), (moment(detection, case="b", ratio=2.5), True)]
    assert detection.calibrate(rule, candidates, judged) == (1.9,) == ((1.4 + 2.4) / 2,)


def test_a_case_with_many_moments_does_not_drown_the_others(detection: ModuleType) -> None:
    rule, candidates = (lambda m, at: m.ratio > at[0]), [(1.5,), (2.5,)]
    judged = [(moment(detection, case="few", ratio=1.0), False)]
    judged += [(moment(detection, case="many", ratio=2.0), False)] * 500
    judged += [
        (moment(detection, case=case, ratio=ratio), True) for case, ratio in (("a", 1.8), ("b", 1.8), ("c", 3.0))
    ]
    # by cases 1.5 has 1/2 of the healthy and all of the ill, 2.5 all and 1/3; by moments 1.5 has 1/501 of the healthy
    assert detection.calibrate(rule, candidates, judged) == (1.5,)


def test_no_case_is_judged_by_thresholds_that_were_chosen_on_it(detection: ModuleType) -> None:
    rule, candidates = (lambda m, at: m.ratio > at[0]), [(value / 10,) for value in range(10, 61)]
    judged = [(moment(detection, case=case, ratio=ratio), ill) for case, ratio, ill in (
        ("well", 1.0, False), ("odd", 3.5, False), ("ill", 4.0, True), ("worse", 5.0, True))]  # fmt: skip
    said, folds = detection.left_out(rule, candidates, judged)
    # without `odd` the middle between 1.0 and 4.0 is chosen, without `ill` that between 3.5 and 5.0: both are mistaken
    assert said == [False, True, False, True]
    assert len(folds) == 4
    assert rule(judged[1][0], detection.calibrate(rule, candidates, judged)) is False


def test_the_page_tells_cases_delays_and_rules(
    detection: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "truth.yaml").write_text(
        "sick: {truth: ill, begins: 100, sure: 300, why: primed}\nwell: {truth: healthy, why: ordinary}\n"
    )
    alarm = ("plasticity/critic/all/weight_norm",)
    for seed in (0, 1):
        lines = [reading(200, 20.0, 10.0), probe(200, 0.2, 0.2), probe(250 + 50 * seed, 0.5, 0.2, alarm)]
        write_run(tmp_path, f"sick__probed__{seed}", [*lines, probe(400, 0.6, 0.2, alarm)])
        write_run(
            tmp_path, f"well__probed__{seed}", [reading(200, 11.0, 30.0), probe(200, 0.2, 0.2), probe(400, 0.21, 0.2)]
        )
    monkeypatch.setattr(sys, "argv", ["detection.py", str(tmp_path)])
    detection.main()
    text = (tmp_path / "detection.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| sick | ill |  | 2 | 2 | 2 | 175 | 175 | 4 of 6 | primed |" in text
    assert "| well | healthy |  | 2 | 0 | 0 |  |  | 0 of 4 | ordinary |" in text
    assert "10 probes of critics, of which 7 are judged: 3 ill, 4 healthy" in text
    assert "| alarms as they were raised |  | 1.00 | 1.00 | 0 of 4 |" in text
    assert (tmp_path / "detection.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_network_that_memorises_at_a_high_rate_falls_ill_and_a_new_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "illnesses"))
    regression = importlib.import_module("regression")
    monkeypatch.setattr(regression, "STEPS", 100)
    monkeypatch.setattr(regression, "ROWS", 128)
    monkeypatch.setattr(regression, "Rules", lambda: Rules(probe_steps=1, probe_functions=1))
    losses: dict[bool, list[float]] = {True: [], False: []}
    for renewed, ratios in losses.items():

        def tell(event: str, updates: int, ratios: list[float] = ratios, **evidence: Any) -> None:
            if event == "truth":
                ratios.append(evidence["loss"] / evidence["fresh_loss"])
                assert evidence["ill"] is (True if ratios[-1] >= 1.25 else False if ratios[-1] <= 1.1 else None)

        regression.run(3e-2, renewed, 0, 8, tell)
    assert len(losses[False]) == 8 and min(losses[False][-3:]) > 2
    assert np.mean(losses[True]) < 1.25

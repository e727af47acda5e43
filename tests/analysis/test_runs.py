"""Run directories read back: which are found, what they hold, and what becomes of damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_runs import STEPS, decisions, made_run, measurements
from small_runs import SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlplastic import train_agent
from rlplastic.analysis.runs import find_runs, read_run
from rlplastic.errors import ConfigurationError
from rlplastic.tracking import SECTIONS, TimingRow, Tracker


def refuse(sentence: str) -> None:
    raise AssertionError(sentence)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("hopper-0", "hopper-1", "deep/er/ant-0", "hopper-0.old-1"):
        made_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / ".hydra" / "0").mkdir(parents=True)
    (tmp_path / "runs" / ".hydra" / "0" / "config.yaml").write_text("")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("{}", "deep/er/ant-0 hopper-0 hopper-1"),
        ("{}/*", "deep/er/ant-0 hopper-0 hopper-1"),
        ("{}/hopper-?", "hopper-0 hopper-1"),
        ("{}/hopper-1", "hopper-1"),
        ("{}/hopper-1, {}/deep", "hopper-1 deep/er/ant-0"),
        ("{}/hopper-1,{}/*", "hopper-1 deep/er/ant-0 hopper-0"),
        ("{}/hopper-0.old-1", "hopper-0.old-1"),
    ],
)
def test_runs_are_found_by_name_folder_glob_and_list(folder: Path, pattern: str, names: str) -> None:
    warnings: list[str] = []
    found = find_runs(pattern.replace("{}", str(folder)), warnings.append)
    assert [str(path.relative_to(folder)) for path in found] == names.split()
    assert all("hopper-0.old-1 was moved aside" in warning for warning in warnings)
    assert len(warnings) == (1 if pattern.endswith(("{}", "/*")) else 0)


def test_a_comma_in_a_name_is_no_list(tmp_path: Path) -> None:
    assert find_runs(str(made_run(tmp_path / "init_what=actor,critic")), refuse) == [
        tmp_path / "init_what=actor,critic"
    ]


@pytest.mark.parametrize("pattern", ["nothing", "nothing/*", "hopper-0/checkpoints"])
def test_finding_nothing_says_where_it_looked(folder: Path, pattern: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{pattern.rstrip('*')}.* matches no run: looked for config.yaml"):
        find_runs(str(folder / pattern), refuse)


def test_a_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    records = [*measurements(), *decisions()]
    run = read_run(made_run(tmp_path / "run", seed=3, records=records), refuse)
    assert run is not None
    assert (run.task, run.seed, run.final_return, run.steps, run.updates) == ("Hopper-v5", 3, 40.0, 4000, 2000)
    assert (run.train_seconds, run.wall_seconds, run.finished) == (40.0, 4000 / 90, True)
    assert run.curve("step")[0].tolist() == list(STEPS) and run.curve("step")[1].tolist() == [0, 10, 20, 40]
    assert run.curve("updates")[0].tolist() == [step / 2 for step in STEPS]
    assert run.curve("seconds")[0].tolist() == [step / 100 for step in STEPS]
    assert [record.event for record in run.records[4:]] == ["alarm", "probe", "probe", "committed"]
    assert run.records[-1].sentence == "reset <kept> & verified" and run.records[-1].values == {}
    assert run.records[0].values["critic/all/dormant"] == 11.0
    assert run.records[0].fresh == {"critic/all/effective_rank": 40.0}
    assert run.records[5].values == {"critic/all/probe_ratio": 1.8}
    assert np.isnan(run.records[6].values["critic/all/probe_ratio"])


def test_scalars_are_those_that_tensorboard_reads(tmp_path: Path) -> None:
    made_run(tmp_path / "run")
    with Tracker(tmp_path / "run") as tracker:  # another attempt, with a file of its own
        tracker.scalars(5000, {"loss/critic": 0.25, "loss/actor": -1.5})
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    run = read_run(tmp_path / "run", refuse)
    assert run is not None and set(run.scalars) == set(events.Tags()["scalars"])
    for tag, (steps, values) in run.scalars.items():
        assert [(event.step, event.value) for event in events.Scalars(tag)] == list(zip(steps, values, strict=True))


def test_time_is_that_of_the_attempts_that_led_here(tmp_path: Path) -> None:
    """The first attempt lost its steps 300 and 400; the second took less time for them, and the third went on."""
    path = made_run(tmp_path / "run", returns=[])
    rows = [[(100, 1.0), (200, 2.0), (300, 30.0), (400, 40.0)], [(300, 3.0), (400, 4.0)], [(500, 5.0)]]
    for attempt in rows:
        with Tracker(path) as tracker:
            for step, seconds in attempt:
                tracker.timing(TimingRow(step, step, seconds + 0.5, seconds, *[0.0] * len(SECTIONS)))
    run = read_run(path, refuse)
    assert run is not None
    assert run.clock[0].tolist() == [0, 100, 200, 300, 400, 500]
    assert run.clock[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert run.wall_seconds == 40.5 + 4.5 + 5.5 and run.train_seconds == 5.0


def test_rows_that_are_still_being_written_are_left_out(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run", records=measurements(), finished=False)
    for name, half in (("eval.csv", "5000,25"), ("timing.csv", "1,50"), ("plasticity.jsonl", '{"event": "mea')):
        with open(path / name, "a") as file:
            file.write(half)
    run = read_run(path, refuse)
    assert run is not None and run.steps == 4000 and len(run.records) == 4 and not run.finished


def test_a_run_without_logs_has_nothing_to_show(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run", returns=[])
    for log in (*path.glob("*.csv"), *path.glob("*tfevents*")):
        log.unlink()
    shutil.rmtree(path / "checkpoints")
    run = read_run(path, refuse)
    assert run is not None and not run.evaluations and not run.scalars and run.steps == 0 and not run.finished
    assert run.train_seconds == run.wall_seconds == 0.0


@pytest.mark.parametrize("name", ["eval.csv", "timing.csv", "plasticity.jsonl", "profile.json"])
@pytest.mark.parametrize("text", ["a,b\n1,two\n", "step,score\n1,2\n", "\0\n"])
def test_damaged_files_are_named_and_left_out(tmp_path: Path, name: str, text: str) -> None:
    path = made_run(tmp_path / "run", records=measurements())
    (path / name).write_text(text)
    warnings: list[str] = []
    run = read_run(path, warnings.append)
    assert run is not None and run.scalars
    assert len(warnings) == 1 and f"{path / name} is damaged and left out" in warnings[0]


@pytest.mark.parametrize("place", [0.95, 0.999])
def test_damaged_events_are_named_and_what_came_before_is_shown(tmp_path: Path, place: float) -> None:
    path = made_run(tmp_path / "run")
    (events,) = path.glob("*tfevents*")
    content = bytearray(events.read_bytes())
    content[int(place * len(content))] ^= 0xFF
    events.write_bytes(content)
    warnings: list[str] = []
    run = read_run(path, warnings.append)
    whole = EventAccumulator(str(path)).Reload()  # which ends at a damaged record, too, and says nothing
    assert run is not None and len(run.scalars["loss/critic"][0]) == len(whole.Scalars("loss/critic"))
    assert len(warnings) == 1 and f"{events} is damaged" in warnings[0]


def test_an_event_that_is_still_being_written_is_no_damage(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    (events,) = path.glob("*tfevents*")
    whole = read_run(path, refuse)
    size = events.stat().st_size
    with open(events, "r+b") as file:
        file.truncate(size - 3)
    cut = read_run(path, refuse)
    assert whole is not None and cut is not None
    lengths = [sum(len(curve[0]) for curve in run.scalars.values()) for run in (whole, cut)]
    assert lengths[1] == lengths[0] - 2  # the last record holds the two scalars of an evaluation


@pytest.mark.parametrize("text", ["", "a: [", "seed: 1\n", "[1, 2]\n"])
def test_a_run_with_a_damaged_configuration_is_left_out(tmp_path: Path, text: str) -> None:
    path = made_run(tmp_path / "run")
    (path / "config.yaml").write_text(text)
    warnings: list[str] = []
    assert read_run(path, warnings.append) is None
    assert len(warnings) == 1 and str(path / "config.yaml") in warnings[0]


@pytest.mark.slow
def test_a_real_run_is_read_back(tmp_path: Path) -> None:
    result = train_agent([*SMALL, "profile=true", f"runs={tmp_path}", "name=run"], quiet=True)
    run = read_run(tmp_path / "run", refuse)
    assert run is not None and result.evaluation is not None
    assert (run.final_return, run.updates, run.finished) == (result.evaluation.mean, result.updates, True)
    assert sum(run.profile.values()) == pytest.approx(
        json.loads((run.path / "profile.json").read_text())["wall_seconds"]
    )
    assert run.steps == 600 and run.wall_seconds > 0 and run.task == "Pendulum-v1"

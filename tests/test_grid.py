"""The grid runner, driven from outside with a trainer that only writes evaluations."""

from __future__ import annotations

import csv
import fcntl
import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import t as student_t

ROOT = Path(__file__).resolve().parents[1]

TRAINER = """
import os, pathlib, signal, sys, time
options = dict(word.split("=", 1) for word in sys.argv[1:])
folder = pathlib.Path(options["runs"]) / options["name"]
folder.mkdir(parents=True, exist_ok=True)
with open(folder / "attempts", "a") as file:
    file.write(f"{time.time()} {os.environ['OMP_NUM_THREADS']}\\n")
if options.get("fail"):
    print("a reason for the log"), sys.exit(int(options["fail"]))
stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(130))
signal.signal(signal.SIGTERM, lambda *_: stop.append(130))
evaluations, timing = folder / "eval.csv", folder / "timing.csv"
if not evaluations.exists():
    evaluations.write_text("step,updates,episodes,return_mean,return_std,return_ci95_low,return_ci95_high,length_mean\\n")
    timing.write_text("attempt,step,updates,wall_seconds,train_seconds\\n")
start = time.time()
attempt = len((folder / "attempts").read_text().splitlines())
for step in range(len(evaluations.read_text().splitlines()) - 1, int(options.get("evaluations", 3))):
    time.sleep(float(options.get("pause", 0)))
    if stop:
        sys.exit(stop[0])
    value = (step + 1) * float(options["slope"]) + int(options["seed"])
    with open(evaluations, "a") as file:
        file.write(f"{100 * (step + 1)},{10 * (step + 1)},5,{value},1.0,{value - 1},{value + 1},50.0\\n")
    with open(timing, "a") as file:
        wall = time.time() - start
        file.write(f"{attempt},{100 * (step + 1)},{10 * (step + 1)},{wall + 5},{wall + 2}\\n")
(folder / "ended").write_text(str(time.time()))
"""

Writer = Callable[..., Path]


@pytest.fixture
def write_grid(tmp_path: Path) -> Writer:
    """Writes a grid of two tasks, two arms and the given seeds, with changes; returns the YAML file."""
    trainer = tmp_path / "trainer.py"
    trainer.write_text(TRAINER)

    def write(**changes: object) -> Path:
        grid = {
            "name": "slopes",
            "question": "Does the steeper slope win?",
            "expected_core_hours": 0.5,
            "budget_core_hours": 1.0,
            "tasks": {"hopper": ["evaluations=3"], "ant": ["evaluations=2"]},
            "arms": {"flat": ["slope=1"], "steep": ["slope=10"]},
            "seeds": [0, 1],
            "trainer": ["python", str(trainer)],
        } | changes
        path = tmp_path / "slopes" / "grid.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(grid, sort_keys=False))
        return path

    return write


ENVIRONMENT = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}


def command(path: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / "grid.py"), str(path), *arguments]


def run_grid(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(path, *arguments), capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False
    )


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The runner as a module, for what starts no process."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("grid")


def rows(path: Path) -> dict[str, dict[str, str]]:
    with (path.parent / "results.csv").open(newline="") as file:
        return {f"{row['task']}__{row['arm']}__{row['seed']}": row for row in csv.DictReader(file)}


def attempts(path: Path, name: str) -> int:
    return len((path.parent / "runs" / name / "attempts").read_text().splitlines())


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_run_leaves_a_row_a_curve_and_a_place_in_the_summary(write_grid: Writer) -> None:
    path = write_grid()
    finished = run_grid(path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    table = rows(path)
    assert len(table) == 8
    row = table["hopper__steep__1"]
    assert [row[key] for key in ("exit_code", "env_steps", "updates", "final_mean")] == ["0", "300", "30", "31"]
    assert [float(row[key]) for key in ("final_ci95_low", "final_ci95_high", "area")] == [30, 32, 21]
    assert float(row["wall_seconds"]) >= 5
    assert 2 <= float(row["train_seconds"]) < 3
    assert "cores" in row["machine"]
    assert "python 3." in row["versions"]
    assert "seed=1 threads=1 env.threads=1 name=hopper__steep__1" in row["command"]
    curve = path.parent / "curves" / "hopper__steep__1.csv"
    assert curve.read_text() == (path.parent / "runs" / "hopper__steep__1" / "eval.csv").read_text()
    assert (path.parent / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = (path.parent / "summary.md").read_text()
    assert "Does the steeper slope win?" in summary
    assert "8 of 8 runs finished" in summary
    assert "| hopper | steep | 2 | 30.5 ± 6.353 | 0: 30, 1: 31 |" in summary
    assert "None: every run finished." in summary
    assert (path.parent / "runs" / "hopper__flat__0" / "attempts").read_text().split()[1] == "1"


def test_finished_runs_are_not_run_again(write_grid: Writer) -> None:
    path = write_grid(tasks={"hopper": []}, seeds=[0])
    assert run_grid(path, "--only", "arm=flat").returncode == 1
    assert list(rows(path)) == ["hopper__flat__0"]
    assert run_grid(path).returncode == 0
    assert [attempts(path, f"hopper__{arm}__0") for arm in ("flat", "steep")] == [1, 1]


def test_failing_run_is_listed_and_tried_again_but_a_diverged_one_is_a_result(write_grid: Writer) -> None:
    arms = {"broken": ["fail=2"], "diverged": ["fail=3"], "fine": ["slope=1"]}
    path = write_grid(tasks={"hopper": []}, arms=arms, seeds=[0])
    first = run_grid(path)
    assert first.returncode == 1
    assert "missing  hopper__broken__0: exit code 2, see" in first.stdout
    assert rows(path)["hopper__broken__0"]["exit_code"] == "2"
    assert "a reason for the log" in (path.parent / "runs" / "hopper__broken__0.log").read_text()
    assert run_grid(path).returncode == 1
    assert [attempts(path, f"hopper__{arm}__0") for arm in arms] == [2, 1, 1]
    shortfall = (path.parent / "summary.md").read_text().split("## Shortfall")[1]
    assert "hopper__broken__0: exit code 2" in shortfall
    assert "hopper__diverged__0: exit code 3: stopped on non-finite numbers" in shortfall
    assert "fine" not in shortfall


def test_two_jobs_overlap_and_one_job_does_not(write_grid: Writer) -> None:
    for jobs, overlap in ((1, False), (2, True)):
        path = write_grid(tasks={f"task{jobs}": ["pause=0.4"]}, seeds=[0], name=f"jobs{jobs}")
        assert run_grid(path, "--jobs", str(jobs)).returncode == 0
        folders = [path.parent / "runs" / f"task{jobs}__{arm}__0" for arm in ("flat", "steep")]
        second_start = float((folders[1] / "attempts").read_text().split()[0])
        assert (second_start < float((folders[0] / "ended").read_text())) is overlap


def test_interrupt_lets_trainings_save_and_the_next_start_continues_them(write_grid: Writer) -> None:
    path = write_grid(tasks={"hopper": ["pause=0.5", "evaluations=5"]}, seeds=[0], jobs=2)
    process = subprocess.Popen(
        command(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )
    evaluations = path.parent / "runs" / "hopper__flat__0" / "eval.csv"
    wait_for(lambda: evaluations.exists() and len(evaluations.read_text().splitlines()) >= 4)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130, output
    assert "start the same command again to continue" in output
    assert "hopper__flat__0: interrupted" in (path.parent / "summary.md").read_text()
    assert not (path.parent / "results.csv").exists()
    assert run_grid(path).returncode == 0
    row = rows(path)["hopper__flat__0"]
    assert attempts(path, "hopper__flat__0") == 2
    assert row["env_steps"] == "500"
    assert float(row["wall_seconds"]) > 10  # both attempts, 5 seconds and more each


def test_killed_grid_takes_its_trainings_down_and_continues_when_started_again(write_grid: Writer) -> None:
    path = write_grid(tasks={"hopper": ["pause=1"]}, arms={"flat": ["slope=1"]}, seeds=[0])
    process = subprocess.Popen(command(path), stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    evaluations = path.parent / "runs" / "hopper__flat__0" / "eval.csv"
    wait_for(evaluations.exists)
    process.kill()
    process.wait()
    wait_for(lambda: run_grid(path).returncode == 0)  # refused until the orphan, told by the kernel, has ended
    assert attempts(path, "hopper__flat__0") == 2
    assert len(rows(path)) == 1
    assert len(evaluations.read_text().splitlines()) == 4


def test_second_grid_on_the_same_folder_is_refused(
    write_grid: Writer, grid: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_grid()
    (path.parent / "runs").mkdir()
    with (path.parent / "runs" / "grid.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert grid.main([str(path)]) == 2
    assert "is in use by another grid" in capsys.readouterr().err


def test_runs_beyond_the_budget_are_not_started(write_grid: Writer) -> None:
    # A run is recorded with 5 seconds and more: after two of them a third would pass 13 seconds.
    path = write_grid(tasks={"hopper": []}, seeds=[0, 1], expected_core_hours=12 / 3600, budget_core_hours=13 / 3600)
    finished = run_grid(path)
    assert finished.returncode == 1
    assert list(rows(path)) == ["hopper__flat__0", "hopper__steep__0"]
    assert "not started: the budget of" in (path.parent / "summary.md").read_text()


def test_results_of_other_settings_are_refused(
    write_grid: Writer, grid: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_grid(tasks={"hopper": []}, arms={"flat": ["slope=1"]}, seeds=[0])
    assert run_grid(path).returncode == 0
    write_grid(tasks={"hopper": ["evaluations=5"]}, arms={"flat": ["slope=1"]}, seeds=[0])
    assert grid.main([str(path)]) == 2
    assert "results.csv holds hopper__flat__0 made by" in capsys.readouterr().err


def test_dry_run_prints_the_commands_and_starts_nothing(
    write_grid: Writer, grid: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_grid(common=["max_minutes=null"])
    assert grid.main([str(path), "--dry-run", "--only", "task=ant", "--only", "seed=1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert "max_minutes=null evaluations=2 slope=1 seed=1" in printed[0]
    assert not (path.parent / "runs").exists()


def test_plot_only_makes_the_same_summary_from_what_is_committed(write_grid: Writer, grid: ModuleType) -> None:
    path = write_grid(tasks={"ant": ["evaluations=2"]})
    run_grid(path)
    summary = (path.parent / "summary.md").read_text()
    (path.parent / "summary.md").unlink()
    (path.parent / "runs").rename(path.parent.parent / "gone")
    assert grid.main([str(path), "--plot-only"]) == 0
    assert (path.parent / "summary.md").read_text() == summary


def test_example_in_the_readme_is_a_valid_grid(grid: ModuleType, tmp_path: Path) -> None:
    example = (ROOT / "benchmarks" / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "grid.yaml").write_text(example)
    assert len(grid.plan(grid.load(tmp_path / "grid.yaml"), tmp_path)) == 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seed": [1]}, "did you mean 'seeds'?"),
        ({"jobs": 3}, "jobs: 3"),
        ({"jobs": "many"}, "many"),
        ({"columns": ["speed"]}, "columns: speed"),
        ({"seeds": []}, "has no seeds"),
        ({"seeds": [1, 1]}, "no seed twice"),
        ({"arms": {"a__b": []}}, "'a__b'"),
        ({"budget_core_hours": 0.1}, "raise the budget"),
    ],
)
def test_wrong_grid_ends_with_one_sentence(
    write_grid: Writer, grid: ModuleType, capsys: pytest.CaptureFixture[str], changes: dict[str, object], sentence: str
) -> None:
    assert grid.main([str(write_grid(**changes))]) == 2
    message = capsys.readouterr().err
    assert sentence in message
    assert len(message.splitlines()) == 1


def test_mean_curve_and_interval_agree_with_the_closed_form(grid: ModuleType) -> None:
    results = grid.grid_results
    values = [1.0, 2.0, 4.0]
    mean, half_width = results.interval(values)
    low, high = student_t.interval(0.95, 2, loc=np.mean(values), scale=np.std(values, ddof=1) / math.sqrt(3))
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))
    assert math.isnan(results.interval([7.0])[1])
    first = (np.array([0.0, 10.0, 20.0]), np.array([0.0, 10.0, 20.0]))
    second = (np.array([5.0, 15.0, 30.0]), np.array([1.0, 3.0, 6.0]))
    x, mean_curve, _ = results.mean_curve([first, second])
    assert x.tolist() == [5, 10, 15, 20]
    assert mean_curve == pytest.approx([3.0, 6.0, 9.0, 12.0])
    assert results.curve_area(np.array([0.0, 1.0, 4.0]), np.array([0.0, 2.0, 2.0])) == pytest.approx(7 / 4)


def test_wall_seconds_add_up_over_attempts_and_train_seconds_already_have(grid: ModuleType, tmp_path: Path) -> None:
    """The second attempt resumes from the checkpoint at 60 seconds of training and is the longer one from the start."""
    seconds = grid.grid_results.seconds
    assert seconds(tmp_path, "wall_seconds") == 0
    table = "attempt,step,wall_seconds,train_seconds\n1,10,50,40\n1,20,100,80\n2,30,110,150\n2,40,200,230\n"
    (tmp_path / "timing.csv").write_text(table)
    assert seconds(tmp_path, "wall_seconds") == 300
    assert seconds(tmp_path, "train_seconds") == 230
    (tmp_path / "timing.csv").write_text("wall_seconds\n5\n7\n")
    assert seconds(tmp_path, "wall_seconds") == 7
    assert seconds(tmp_path, "train_seconds") == 0


def test_plot_shows_the_curves_and_its_whole_heading_whatever_the_width_of_the_band(
    grid: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = grid.grid_results
    figures = []
    save = results.Figure.savefig

    def spy(figure: Any, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(results.Figure, "savefig", spy)
    (tmp_path / "curves").mkdir()
    rows = []
    for seed, scale in enumerate((1.0, 2.0)):
        row = dict.fromkeys(results.Result._fields, 0.0) | {"task": "hopper", "arm": "flat", "seed": seed}
        rows.append(results.Result(**row))
        lines = [f"{100 * step},{scale * step}" for step in range(11)]
        (tmp_path / "curves" / f"hopper__flat__{seed}.csv").write_text("\n".join(["step,return_mean", *lines, ""]))
    results.plot(tmp_path, "A grid with a name that is far too long for a figure of a single panel", "step", rows)
    [figure] = figures
    [panel] = figure.axes
    assert panel.get_ylim() == pytest.approx((-1.0, 21.0))  # the band at the end is 15 +- 63.5
    assert len(panel.lines) == 3
    heading = figure._suptitle.get_window_extent()
    assert heading.x0 >= 0 and heading.x1 <= figure.bbox.width
    assert "far too long" in figure._suptitle.get_text().replace("\n", " ")

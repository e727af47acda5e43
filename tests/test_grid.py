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
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import t as student_t

from rlplastic.errors import ConfigurationError

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


def test_an_arm_may_have_its_own_trainer_and_fewer_seeds(write_grid: Writer, grid: ModuleType, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(TRAINER.replace('int(options["seed"])', "1000"))
    path = write_grid(
        tasks={"ant": ["evaluations=1"]},
        trainers={"steep": ["python", str(other)]},
        arm_seeds={"steep": [1]},
        packages=["pytest", "no-such-package"],
    )
    assert run_grid(path).returncode == 0
    table = rows(path)
    assert {name: row["final_mean"] for name, row in table.items()} == {
        "ant__flat__0": "1",
        "ant__flat__1": "2",
        "ant__steep__1": "1010",
    }
    assert f"pytest {pytest.__version__}" in table["ant__flat__0"]["versions"]
    assert "no-such-package" not in table["ant__flat__0"]["versions"]
    assert "3 of 3 runs finished" in (path.parent / "summary.md").read_text()
    both = grid.plan(grid.load(path), tmp_path)
    assert [run.command[1] for run in both if run.arm == "steep"] == [str(other)]


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
        ({"seed": [1]}, "did you mean 'seeds'"),
        ({"jobs": 3}, "jobs: 3"),
        ({"jobs": "many"}, "many"),
        ({"columns": ["speed"]}, "columns: speed"),
        ({"seeds": []}, "has no seeds"),
        ({"seeds": [1, 1]}, "no seed twice"),
        ({"arms": {"a__b": []}}, "'a__b'"),
        ({"trainers": {"steeep": ["python", "x.py"]}}, "did you mean 'steep'"),
        ({"arm_seeds": {"flat": [2]}}, "name some of the seeds [0, 1]"),
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
    assert x.tolist() == [5, 10, 15, 20, 30]
    assert mean_curve == pytest.approx([3.0, 6.0, 9.0, 12.0, 13.0])  # the first curve holds its 20 from step 20 on


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


Draw = Callable[..., Any]


@pytest.fixture
def draw(grid: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draw:
    """Plots runs of hopper, {seed: (steps, returns)} for every arm; returns the figure."""
    results = grid.grid_results
    figures = []
    save = results.Figure.savefig

    def spy(figure: Any, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(results.Figure, "savefig", spy)
    (tmp_path / "curves").mkdir()

    def draw(title: str, curves: dict[int, tuple[list[float], list[float]]], arms: Sequence[str] = ("flat",)) -> Any:
        rows = []
        for arm, (seed, points) in product(arms, curves.items()):
            row = dict.fromkeys(results.Result._fields, 0.0) | {"task": "hopper", "arm": arm, "seed": seed}
            rows.append(results.Result(**row))
            lines = [f"{step},{value}" for step, value in zip(*points, strict=True)]
            (tmp_path / "curves" / f"hopper__{arm}__{seed}.csv").write_text("\n".join(["step,return_mean", *lines, ""]))
        results.plot(tmp_path, title, "step", rows)
        return figures[-1]

    return draw


STEPS = [100.0 * index for index in range(11)]


def line(seed: int) -> tuple[list[float], list[float]]:
    return STEPS, [(seed + 1.0) * index for index in range(11)]


def explained(figure: Any) -> list[str]:
    [legend] = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_plot_shows_the_curves_and_its_whole_heading_whatever_the_width_of_the_band(draw: Draw) -> None:
    figure = draw("A grid with a name that is far too long for a figure of a single panel", {0: line(0), 1: line(1)})
    [panel] = figure.axes
    assert panel.get_ylim() == pytest.approx((-1.0, 21.0))  # the band at the end is 15 +- 63.5
    assert len(panel.lines) == 3
    assert all(band.get_clip_on() for band in panel.collections)
    legend = figure.legends[0].get_window_extent()
    for box in (figure._suptitle.get_window_extent(), legend):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert "far too long" in figure._suptitle.get_text().replace("\n", " ")
    assert explained(figure) == [
        "mean over seeds",
        "each seed",
        "95 % t interval of the mean (may go on beyond the panel)",
    ]


def test_many_arms_in_one_panel_are_means_and_bands_with_the_legend_below(draw: Draw) -> None:
    arms = [f"an arm named {letter}" for letter in "abcde"]
    figure = draw("Five arms", {0: line(0), 1: line(1)}, arms)
    [panel] = figure.axes
    assert len(panel.lines) == 5, "no seed has a line of its own"
    assert explained(figure) == ["mean over seeds", "95 % t interval of the mean (may go on beyond the panel)"]
    own, shared = panel.get_legend().get_window_extent(), figure.legends[0].get_window_extent()
    assert panel.get_window_extent().y0 > own.y1 and own.y0 > shared.y1 - 3, "on neither curves nor the other legend"
    assert own.x0 >= 0 and own.x1 <= figure.bbox.width


def test_the_mean_goes_on_to_the_end_of_the_longest_run_and_says_where_one_has_ended(draw: Draw) -> None:
    figure = draw("Two lengths", {0: line(0), 1: ([0.0, 100.0, 500.0], [0.0, 2.0, 4.0])})
    [panel] = figure.axes
    [dotted] = [curve for curve in panel.lines if curve.get_linestyle() == ":"]
    assert dotted.get_xdata().tolist() == [500.0, 600.0, 700.0, 800.0, 900.0, 1000.0]
    assert dotted.get_ydata() == pytest.approx([4.5, 5.0, 5.5, 6.0, 6.5, 7.0])
    assert "mean once a run has ended (it counts with its last value)" in explained(figure)


def test_an_axis_that_the_evaluations_lack_is_refused(draw: Draw, grid: ModuleType, tmp_path: Path) -> None:
    draw("Steps", {0: line(0)})
    with pytest.raises(ConfigurationError, match=r"no column train_seconds.* choose one of step$"):
        grid.grid_results._curve(tmp_path / "curves" / "hopper__flat__0.csv", "train_seconds")


def test_a_random_policy_beside_the_results_is_drawn_as_the_floor(draw: Draw, tmp_path: Path) -> None:
    figure = draw("No floor", {0: line(0)})
    assert explained(figure) == ["mean over seeds"]
    table = "task,episodes,return_mean,return_ci95_low,return_ci95_high,length_mean\nhopper,20,-10,-12,-8,5\n"
    (tmp_path / "random_policy.csv").write_text(table)
    [panel] = draw("Floor", {0: line(0)}).axes
    [floor] = [curve for curve in panel.lines if "random" in str(curve.get_label())]
    assert (floor.get_linestyle(), floor.get_color(), list(floor.get_ydata())) == ("--", "grey", [-10, -10])
    assert panel.get_ylim() == pytest.approx((-11.0, 11.0))  # the mean is in the picture, its interval may be cut
    [area] = panel.patches
    assert area.get_extents().transformed(panel.transData.inverted()).intervaly == pytest.approx([-12, -8])
    assert "random policy, 95 % interval" in [text.get_text() for text in panel.get_legend().get_texts()]


def test_a_random_policy_with_other_columns_is_refused(grid: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "random_policy.csv").write_text("task,score\nhopper,1\n")
    with pytest.raises(ConfigurationError, match=r"random_policy\.py"):
        grid.grid_results.random_policy(tmp_path)


def test_a_commit_that_a_reader_may_not_find_is_marked(
    grid: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = grid.grid_results
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "init.defaultBranch=main"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def committed(text: str) -> str:
        (tmp_path / "rlplastic" / "loop.py").write_text(text)
        git("add", "."), git("commit", "-m", text)
        return git("rev-parse", "--short=12", "HEAD")

    assert results.commit() == "unknown" and results.traced("abc") == "abc"
    (tmp_path / "rlplastic").mkdir()
    git("init")
    first = committed("first")
    assert results.commit() == first
    (tmp_path / "benchmarks" / "slopes").mkdir(parents=True)
    (tmp_path / "benchmarks" / "slopes" / "results.csv").write_text("what the grid itself writes")
    assert results.commit() == first
    (tmp_path / "benchmarks" / "slopes" / "train.py").write_text("a trainer of the grid's own")
    assert results.commit() == f"{first}+uncommitted"
    (tmp_path / "benchmarks" / "slopes" / "train.py").unlink()
    (tmp_path / "rlplastic" / "loop.py").write_text("changed")
    assert results.commit() == f"{first}+uncommitted"
    git("checkout", "--detach")
    second = committed("second")
    assert results.commit() == f"{second}+unreferenced"
    assert [results.traced(each) for each in (first, second, "unknown")] == [first, second, "unknown"]
    git("checkout", "main")
    assert results.traced(first) == first and results.traced(f"{first}+uncommitted") == f"{first}+uncommitted"
    assert results.traced(second) == f"{second} (not in this history)"
    assert results.traced("2f71d666ba0f") == "2f71d666ba0f (not in this history)"


def test_the_note_and_untraceable_commits_are_in_the_summary(write_grid: Writer, grid: ModuleType) -> None:
    path = write_grid(tasks={"hopper": []}, arms={"flat": ["slope=1"]}, seeds=[0], note="Seed 0 shared the machine.")
    assert run_grid(path).returncode == 0
    table = path.parent / "results.csv"
    recorded = rows(path)["hopper__flat__0"]["commit"]
    table.write_text(table.read_text().replace(f",{recorded},", ",0123456789ab,"))
    assert grid.main([str(path), "--plot-only"]) == 0
    summary = (path.parent / "summary.md").read_text()
    assert "- commit: 0123456789ab (not in this history)\n\nNote: Seed 0 shared the machine.\n" in summary

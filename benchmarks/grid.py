"""Run a grid of trainings, tasks x arms x seeds, that can be stopped and started again at any time.

    python benchmarks/grid.py benchmarks/<name>/grid.yaml [--jobs 2] [--only arm=a,b] [--plot-only] [--dry-run]

Each run is a process ``python -m rlplastic.train <overrides>`` on its own threads, in ``runs/`` beside the YAML.
A run that ends by itself adds a row to ``results.csv`` and its evaluations to ``curves/``; starting the grid again
skips those runs and continues the others, which resume by themselves. `grid_results` makes the plot and the summary.
Exit codes: 0 every run finished, 1 some did not, 2 configuration, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.live import Live
from rich.table import Table
from yaml import YAMLError

import grid_results
from grid_results import ROOT, Result
from rlplastic.analysis.statistics import curve_area
from rlplastic.errors import ConfigurationError, Interrupted, RlplasticError, nearest

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
POLL_SECONDS = 0.2
GRACE_SECONDS = 120.0
"""How long an interrupted training may take to save before it is killed."""
PR_SET_PDEATHSIG = 1


@dataclass
class Grid:
    """A grid's YAML file."""

    name: str = MISSING
    """Title of the plot and the summary."""
    expected_core_hours: float = MISSING
    """What the whole grid should cost: wall hours of every run times its threads."""
    budget_core_hours: float = MISSING
    """No run is started that would take the grid beyond this, runs of earlier starts included."""
    tasks: dict[str, list[str]] = MISSING
    """Overrides of each task."""
    arms: dict[str, list[str]] = MISSING
    """Overrides of each arm."""
    seeds: list[int] = MISSING
    question: str = ""
    """What the grid is run to find out; opens the summary."""
    note: str = ""
    """What came out different than the settings say, or else has to be known beside the numbers; in the summary."""
    common: list[str] = field(default_factory=list)
    """Overrides of every run; those of the task, then those of the arm follow and win."""
    jobs: int = 1
    """Runs at a time, 1 or 2."""
    threads: int = 1
    """Threads of each run."""
    x: str = "step"
    """The plot's horizontal axis: `step` or `updates`."""
    columns: list[str] = field(default_factory=lambda: ["final_mean", "area", "train_seconds"])
    """What the summary tabulates, of `grid_results.COLUMNS`."""
    trainer: list[str] = field(default_factory=lambda: ["python", "-m", "rlplastic.train"])
    """The command that trains; it takes the overrides and writes ``<runs>/<name>/eval.csv``. `python` is this one."""
    trainers: dict[str, list[str]] = field(default_factory=dict)
    """The command of the arms that another one than `trainer` trains."""
    arm_seeds: dict[str, list[int]] = field(default_factory=dict)
    """The seeds of arms that run at fewer than `seeds`."""
    packages: list[str] = field(default_factory=list)
    """Packages whose versions belong beside the results, besides those of every grid."""


@dataclass(frozen=True)
class Run:
    """One cell of the grid and the command that trains it."""

    task: str
    arm: str
    seed: int
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's directory, and the stem of its log and curve."""
        return f"{self.task}__{self.arm}__{self.seed}"


@dataclass
class Job:
    """A run at work."""

    run: Run
    process: subprocess.Popen[bytes]
    started: float
    commit: str


def load(path: Path) -> Grid:
    """Read and check a grid.

    Raises:
        ConfigurationError: the file is missing, is no YAML, or a key or value in it is wrong.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Grid), OmegaConf.load(path))
        absent = sorted(OmegaConf.missing_keys(merged))
        if absent:
            raise ConfigurationError(f"{path} lacks {', '.join(absent)}: every grid states them")
        grid = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        key = str(getattr(error, "key", None) or "")
        hint = f" ({nearest(key, Grid.__dataclass_fields__)})" if key and key not in Grid.__dataclass_fields__ else ""
        raise ConfigurationError(f"{path} is no grid: {str(error).splitlines()[0]}{hint}") from error
    for kind in ("tasks", "arms", "seeds", "trainer"):
        if not getattr(grid, kind):
            raise ConfigurationError(f"{path} has no {kind}: name at least one")
    for name in (*grid.tasks, *grid.arms):
        if "__" in name or not name.replace("_", "").replace("-", "").replace(".", "").isalnum():
            raise ConfigurationError(f"{name!r} in {path} cannot name a file: use letters, digits, single _, - and .")
    choices = {
        "x": (grid.x, grid_results.AXES),
        "columns": (grid.columns, grid_results.COLUMNS),
        "jobs": (grid.jobs, (1, 2)),
    }
    for key, (value, valid) in choices.items():
        for item in value if isinstance(value, list) else [value]:
            if item not in valid:
                raise ConfigurationError(f"{key}: {item} in {path} is not one of {', '.join(map(str, valid))}")
    for key, per_arm in (("trainers", grid.trainers), ("arm_seeds", grid.arm_seeds)):
        for arm in per_arm:
            if arm not in grid.arms:
                raise ConfigurationError(f"{key} in {path} names an arm that is none: {nearest(arm, grid.arms)}")
    for arm, seeds in grid.arm_seeds.items():
        if not seeds or not set(seeds) <= set(grid.seeds):
            raise ConfigurationError(f"arm_seeds of {arm} in {path} are {seeds}: name some of the seeds {grid.seeds}")
    if grid.threads < 1 or len(set(grid.seeds)) != len(grid.seeds):
        raise ConfigurationError(f"{path} needs at least one thread and no seed twice")
    if grid.expected_core_hours > grid.budget_core_hours:
        raise ConfigurationError(
            f"{path} expects {grid.expected_core_hours} core-hours and allows {grid.budget_core_hours}: "
            "cut runs or raise the budget"
        )
    return grid


def shown(path: Path) -> str:
    """A path relative to the repository, so that results name no machine's folders."""
    resolved = path.resolve()
    return str(resolved.relative_to(ROOT) if resolved.is_relative_to(ROOT) else resolved)


def plan(grid: Grid, directory: Path) -> list[Run]:
    """Every run of the grid; seeds vary slowest, so that a grid cut short has all arms at fewer seeds."""
    runs = []
    for seed in grid.seeds:
        for task, of_task in grid.tasks.items():
            for arm, of_arm in grid.arms.items():
                if seed not in grid.arm_seeds.get(arm, grid.seeds):
                    continue
                own = [f"seed={seed}", f"threads={grid.threads}", f"env.threads={grid.threads}"]
                place = [f"name={task}__{arm}__{seed}", f"runs={shown(directory / 'runs')}"]
                command = (*grid.trainers.get(arm, grid.trainer), *grid.common, *of_task, *of_arm, *own, *place)
                runs.append(Run(task, arm, seed, command))
    return runs


def select(runs: list[Run], only: list[str]) -> list[Run]:
    """The runs that match every ``task=…``, ``arm=…`` or ``seed=…`` filter; values are separated by commas.

    Raises:
        ConfigurationError: a filter's key or value does not occur in the grid.
    """
    for text in only:
        key, _, values = text.partition("=")
        if key not in ("task", "arm", "seed"):
            raise ConfigurationError(f"--only {text} filters by {key!r}: use task=…, arm=… or seed=…")
        present = {str(getattr(run, key)) for run in runs}
        for value in values.split(","):
            if value not in present:
                raise ConfigurationError(f"--only {text} matches no run: {nearest(value, present)}")
        runs = [run for run in runs if str(getattr(run, key)) in values.split(",")]
    return runs


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[int]:
    """Hold the grid's folder; trainings inherit the lock, so orphans of a killed grid keep it until they have saved.

    Raises:
        ConfigurationError: another process holds it.
    """
    (directory / "runs").mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / "runs" / "grid.lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"{shown(directory)} is in use by another grid or by its trainings: wait until they have ended"
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


class Runner:
    """Works through the runs of a grid that are not settled, ``jobs`` at a time."""

    def __init__(self, grid: Grid, directory: Path, runs: list[Run], jobs: int, lock: int, console: Console) -> None:
        self.grid, self.directory, self.jobs, self.lock, self.console = grid, directory, jobs, lock, console
        self.results = grid_results.read_results(directory / "results.csv")
        self.total = len(plan(grid, directory))
        self.selected = len(runs)
        self.waiting = [run for run in runs if run.name not in self.results or not self.results[run.name].settled]
        self.active: list[Job] = []
        self.reasons: dict[str, str] = {}
        self.signals = 0

    def work(self) -> None:
        """Run until nothing is left, the budget is spent, or a signal arrives.

        Raises:
            Interrupted: SIGINT or SIGTERM arrived and every training has ended.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        with Live(self.table(), console=self.console, auto_refresh=False, transient=True) as live:
            drawn = time.monotonic()
            while self.active or (self.waiting and not self.signals):
                while self.waiting and len(self.active) < self.jobs and not self.signals and self._affordable():
                    self._start(self.waiting.pop(0))
                time.sleep(POLL_SECONDS)
                if self.signals:
                    self._stop_all()
                for job in [job for job in self.active if job.process.poll() is not None]:
                    self._finish(job)
                if time.monotonic() - drawn >= 1:
                    live.update(self.table(), refresh=True)
                    drawn = time.monotonic()
        if self.signals:
            raise Interrupted("interrupted: start the same command again to continue")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1

    def _environment(self) -> dict[str, str]:
        return os.environ | dict.fromkeys(THREAD_VARIABLES, str(self.grid.threads))

    def _start(self, run: Run) -> None:
        command = [sys.executable if word == "python" else word for word in run.command[:1]] + list(run.command[1:])
        log = self.directory / "runs" / f"{run.name}.log"
        with log.open("ab") as output:
            # A session of its own keeps the terminal's Ctrl-C away from the training: the runner passes it on once.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self.lock,),
                preexec_fn=_end_with_parent,
            )
        self.active.append(Job(run, process, time.monotonic(), grid_results.commit()))
        self.console.print(f"started  {run.name}")

    def _stop_all(self) -> None:
        """Ask every training to save and end; kill them at the second signal or when patience is over."""
        self.console.print("stopping: trainings save their state (once more to kill them)")
        self.waiting.clear()
        for job in self.active:
            job.process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(job.process.poll() is None for job in self.active):
            if self.signals > 1 or time.monotonic() > deadline:
                for job in self.active:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(job.process.pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def _finish(self, job: Job) -> None:
        self.active.remove(job)
        run, code = job.run, job.process.returncode
        log = shown(self.directory / "runs" / f"{run.name}.log")
        if code < 0 or code == Interrupted.exit_code:
            self.reasons[run.name] = f"killed by signal {-code}, see {log}" if code < 0 else "interrupted"
            self.console.print(f"[red]ended[/]    {run.name}: {self.reasons[run.name]}")
            return
        result = self._result(job)
        grid_results.append_result(self.directory / "results.csv", result)
        self.results[run.name] = result
        if result.complete:
            minutes = result.wall_seconds / 60
            final = grid_results.number(result.final_mean)
            self.console.print(f"[green]finished[/] {run.name}: return {final} after {minutes:.1f} min")
        else:
            self.reasons[run.name] = f"exit code {code}{'' if code else ' but no evaluation'}, see {log}"
            self.console.print(f"[red]failed[/]   {run.name}: {self.reasons[run.name]}")

    def _result(self, job: Job) -> Result:
        run, folder = job.run, self.directory / "runs" / job.run.name
        table = grid_results.read_table(folder / "eval.csv")
        last = {column: float(values[-1]) for column, values in table.items()}
        if table:
            (self.directory / "curves").mkdir(exist_ok=True)
            text = (folder / "eval.csv").read_text(encoding="utf-8")
            grid_results.replace_file(self.directory / "curves" / f"{run.name}.csv", text)
        return Result(
            task=run.task,
            arm=run.arm,
            seed=run.seed,
            exit_code=job.process.returncode,
            env_steps=last.get("step", math.nan),
            updates=last.get("updates", math.nan),
            final_mean=last.get("return_mean", math.nan),
            final_ci95_low=last.get("return_ci95_low", math.nan),
            final_ci95_high=last.get("return_ci95_high", math.nan),
            area=curve_area(table["step"], table["return_mean"]) if table else math.nan,
            wall_seconds=max(grid_results.seconds(folder, "wall_seconds"), time.monotonic() - job.started),
            train_seconds=grid_results.seconds(folder, "train_seconds"),
            jobs=self.jobs,
            machine=grid_results.machine(),
            versions=grid_results.versions(tuple(self.grid.packages)),
            commit=job.commit,
            command=shlex.join(run.command),
        )

    def _run_seconds(self) -> float:
        """What a run costs: the mean of those finished, or the grid's own estimate before any has."""
        walls = [result.wall_seconds for result in self.results.values() if result.settled]
        return (
            sum(walls) / len(walls) if walls else self.grid.expected_core_hours * 3600 / self.grid.threads / self.total
        )

    def core_hours(self) -> float:
        """Spent so far: runs that ended, in this start or earlier ones, and the attempts of those that have not."""
        costs = {name: result.wall_seconds for name, result in self.results.items()}
        for path in (self.directory / "runs").glob("*/timing.csv"):
            name = path.parent.name
            costs[name] = max(costs.get(name, 0.0), grid_results.seconds(path.parent, "wall_seconds"))
        for job in self.active:
            costs[job.run.name] = max(costs.get(job.run.name, 0.0), time.monotonic() - job.started)
        total = sum(costs.values())
        return total * self.grid.threads / 3600

    def _affordable(self) -> bool:
        cost = self._run_seconds()
        ahead = sum(max(0.0, cost - (time.monotonic() - job.started)) for job in self.active) + cost
        needed = self.core_hours() + ahead * self.grid.threads / 3600
        if needed <= self.grid.budget_core_hours * (1 + 1e-9):
            return True
        if not self.active:
            for run in self.waiting:
                self.reasons[run.name] = (
                    f"not started: the budget of {self.grid.budget_core_hours:g} core-hours is spent"
                )
            self.waiting.clear()
        return False

    def table(self) -> Table:
        """What runs now, what is done, and when the rest will be."""
        settled = self.selected - len(self.waiting) - len(self.active) - len(self.reasons)
        cost = self._run_seconds()
        left = sum(max(0.0, cost - (time.monotonic() - job.started)) for job in self.active)
        eta = (left + cost * len(self.waiting)) / self.jobs / 60
        caption = (
            f"{settled} of {self.selected} done, {len(self.reasons)} not, {len(self.waiting)} waiting; "
            f"{self.core_hours():.2f} of {self.grid.budget_core_hours:g} core-hours; {eta:.0f} min to go"
        )
        table = Table("run", "minutes", "step", "last return", title=self.grid.name, caption=caption, min_width=60)
        for job in self.active:
            evaluations = grid_results.read_table(self.directory / "runs" / job.run.name / "eval.csv")
            last = (
                [grid_results.number(evaluations[column][-1]) for column in ("step", "return_mean")]
                if evaluations
                else ["", ""]
            )
            table.add_row(job.run.name, f"{(time.monotonic() - job.started) / 60:.1f}", *last)
        return table


def _end_with_parent() -> None:
    """In the child: receive SIGTERM, and so save and end, when the grid itself is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def check_unchanged(runs: list[Run], results: dict[str, Result]) -> None:
    """Refuse to mix runs of different settings under one arm's name.

    Raises:
        ConfigurationError: a settled row of ``results.csv`` was made by another command than the grid now asks for.
    """
    for run in runs:
        result = results.get(run.name)
        if result and result.settled and result.command != shlex.join(run.command):
            raise ConfigurationError(
                f"results.csv holds {run.name} made by `{result.command}`, and the grid now asks for "
                f"`{shlex.join(run.command)}`: restore the setting, or remove the row and its run directory"
            )


def publish(grid: Grid, path: Path, runs: list[Run], reasons: dict[str, str], console: Console) -> int:
    """Make plot and summary, list what is missing, and return the exit code."""
    directory = path.parent
    results = grid_results.read_results(directory / "results.csv")
    rows = [results[run.name] for run in runs if run.name in results]
    missing = {}
    for run in runs:
        result = results.get(run.name)
        if not (result and result.complete):
            ended = f"exit code {result.exit_code}" if result else "not run"
            if result and result.exit_code == grid_results.NON_FINITE_EXIT:
                ended += ": stopped on non-finite numbers"
            missing[run.name] = reasons.get(run.name, ended)
    order = {run.name: (list(grid.tasks).index(run.task), list(grid.arms).index(run.arm)) for run in runs}
    rows.sort(key=lambda row: (*order[row.name], row.seed))
    command = f"python benchmarks/grid.py {shown(path)}"
    picture = grid_results.plot(directory, grid.name, grid.x, rows)
    summary = grid_results.summarise(
        directory, grid.name, grid.question, grid.note, command, grid.columns, rows, missing
    )
    console.print(
        f"{len(runs) - len(missing)} of {len(runs)} runs finished; wrote {shown(summary)} and {shown(picture)}"
    )
    for name, reason in missing.items():
        console.print(f"[red]missing[/]  {name}: {reason}")
    return 1 if missing else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Run a grid of trainings; start it again to continue.")
    parser.add_argument("grid", type=Path, help="the grid's YAML file; everything is written beside it")
    parser.add_argument("--jobs", type=int, choices=(1, 2), help="runs at a time; default: the grid's")
    parser.add_argument("--only", action="append", default=[], metavar="KEY=A,B", help="filter by task, arm or seed")
    parser.add_argument("--trainer", help="the command that trains, instead of the grid's, all arms")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that would run")
    parser.add_argument("--plot-only", action="store_true", help="make the plot and the summary again")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        grid = load(options.grid)
        if options.trainer:
            grid.trainer, grid.trainers = shlex.split(options.trainer), {}
        directory, jobs = options.grid.parent, options.jobs or grid.jobs
        runs = plan(grid, directory)
        chosen = select(runs, options.only)
        results = grid_results.read_results(directory / "results.csv")
        check_unchanged(runs, results)
        if options.dry_run:
            for run in chosen:
                if run.name not in results or not results[run.name].settled:
                    print(shlex.join(run.command))
            return 0
        if options.plot_only:
            return publish(grid, options.grid, runs, {}, console)
        with locked(directory) as lock:
            runner = Runner(grid, directory, chosen, jobs, lock, console)
            try:
                runner.work()
            finally:
                code = publish(grid, options.grid, runs, runner.reasons, console)
        return code
    except RlplasticError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

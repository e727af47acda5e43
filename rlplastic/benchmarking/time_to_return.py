"""Returns after equal minutes, beside peers: the clock and the evaluation that all contenders share, and a short form.

A contender is a program of its own that trains one agent of one library and asks `Race.over` between its steps. The
clock starts with its process, so the interpreter's start, imports and compilation count; evaluations do not. They are
the same for all: deterministic actions, first episodes of gymnasium environments whose seeds depend on the run's seed
and the evaluation's number alone (see `rlplastic.evaluation`).

The contenders lie in ``benchmarks/time_to_return`` of the repository, and their commands in the ``grid.yaml`` there;
`measure` runs those of one task, one seed, one after the other.
"""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlplastic.command_line import run_verb
from rlplastic.config import EnvConfig
from rlplastic.errors import ConfigurationError, nearest
from rlplastic.evaluation import Evaluation, evaluate
from rlplastic.resources import process_age
from rlplastic.tracking import EvaluationRow

CAPTION = (
    "Mean deterministic return of one seed. The clock starts with the process, compilation included, evaluations "
    "excluded; one seed ranks nobody: benchmarks/time_to_return holds the grid of several."
)
CHECKOUT = Path(__file__).resolve().parents[2]
GRID = CHECKOUT / "benchmarks" / "time_to_return" / "grid.yaml"
WORDS = ("task", "minutes", "episodes", "seed", "threads", "runs", "name")
"""What every contender takes, as ``key=value``; ``env.threads`` too, which means something to rlplastic alone."""

Act = Callable[[NDArray[np.float32]], NDArray[Any]]
"""A deterministic policy: observations (E, D) to actions (E, A) in [-1, 1], of any float type."""


class Clock:
    """Seconds of training: since the process began, less what was spent inside `paused`.

    Raises:
        ConfigurationError: the system does not tell when the process began.
    """

    def __init__(self) -> None:
        age = process_age()
        if not age:
            raise ConfigurationError(
                "when this process began is not told here; expected Linux with /proc: measure there"
            )
        self._zero = time.perf_counter() - age
        self._paused = 0.0

    @property
    def wall(self) -> float:
        """Seconds since the process began."""
        return time.perf_counter() - self._zero

    @property
    def seconds(self) -> float:
        """Those that count."""
        return self.wall - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - started


@dataclass(frozen=True)
class Entry:
    """What a contender is asked for; read from its words."""

    task: str
    """A gymnasium id."""
    minutes: tuple[float, ...]
    """When to evaluate, rising; the last one ends the run."""
    episodes: int
    seed: int
    threads: int
    folder: Path
    """Where its results go."""
    own: dict[str, str]
    """Words that mean something to this contender alone."""

    @classmethod
    def read(cls, words: Sequence[str], own: Mapping[str, Collection[str]] | None = None) -> Entry:
        """From ``key=value`` words.

        Args:
            words: of the command line.
            own: the contender's own keys, each with its valid values, and all to be given; None takes any.

        Raises:
            ConfigurationError: a key or a value is wrong, or one of the contender's own is missing.
        """
        given = dict(word.partition("=")[::2] for word in words)
        common = {key: given.pop(key) for key in WORDS if key in given}
        if own is not None:
            given.pop("env.threads", None)
            for key, value in given.items():
                if key not in own:
                    raise ConfigurationError(f"unknown word {key!r}; {nearest(key, (*WORDS, *own))}")
                if value not in own[key]:
                    raise ConfigurationError(f"{key}={value} is none that there is; {nearest(value, own[key])}")
            if missing := [key for key in own if key not in given]:
                raise ConfigurationError(f"missing {', '.join(missing)}; give each as key=value")
        try:
            minutes = tuple(float(mark) for mark in common.get("minutes", "3,6").split(","))
            episodes, seed = int(common.get("episodes", "10")), int(common.get("seed", "0"))
            threads = int(common.get("threads", len(os.sched_getaffinity(0))))
        except ValueError as error:
            raise ConfigurationError(f"a number is expected: {error}") from error
        if min(minutes) <= 0 or list(minutes) != sorted(set(minutes)) or episodes < 1 or threads < 1:
            raise ConfigurationError(
                f"minutes={common.get('minutes')}, episodes={episodes} and threads={threads} were given; expected "
                "rising minutes such as 3,6, and at least one episode and thread"
            )
        folder = Path(common.get("runs", "runs")) / common.get("name", "time_to_return")
        return cls(common.get("task", "HalfCheetah-v5"), minutes, episodes, seed, threads, folder, given)


COLUMNS = (*EvaluationRow._fields, "train_seconds")
"""Of ``eval.csv``; ``train_seconds`` is the contender's clock when the evaluation began."""


class Race:
    """A contender's run: evaluates when its minutes have come, writes ``eval.csv`` and ``timing.csv``, tells the end.

    A contender cannot be continued: an earlier attempt's tables are replaced.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry, self.clock = entry, Clock()
        self._marks = [60 * mark for mark in entry.minutes]
        self._evaluations = 0
        entry.folder.mkdir(parents=True, exist_ok=True)
        self._table, self._times = entry.folder / "eval.csv", entry.folder / "timing.csv"
        _write(self._table, "w", COLUMNS)
        _write(self._times, "w", ("attempt", "step", "updates", "wall_seconds", "train_seconds"))

    @property
    def seconds_left(self) -> float:
        """Until the last mark; not below zero."""
        return max(self._marks[-1] - self.clock.seconds, 0.0) if self._marks else 0.0

    def over(self, steps: int, updates: int, act: Act) -> bool:
        """Whether the last mark has passed; evaluates first if one has. Cheap enough for every step.

        A step that passes several marks, a compilation say, is followed by one evaluation, which counts for them all.

        Args:
            steps: environment transitions made so far.
            updates: critic updates done so far.
            act: the deterministic policy.

        Raises:
            NonFiniteError: a return or an action is not finite.
        """
        seconds = self.clock.seconds
        if self._marks and seconds < self._marks[0]:
            return False
        if not self._marks:
            return True
        with self.clock.paused():
            self._marks = [mark for mark in self._marks if mark > seconds]
            result = self._evaluate(act)
            row = EvaluationRow.of(steps, updates, result)
            _write(self._table, "a", (*row, seconds))
            _write(self._times, "a", (1, steps, updates, self.clock.wall, seconds))
            print(
                f"{seconds:.1f} s of training: return {row.return_mean:.5g} [{row.return_ci95_low:.5g}, "
                f"{row.return_ci95_high:.5g}] after {steps:,} steps and {updates:,} updates",
                flush=True,
            )
        return not self._marks

    def _evaluate(self, act: Act) -> Evaluation:
        self._evaluations += 1
        env = EnvConfig(backend="gymnasium", family="mujoco", task=self.entry.task)

        def bounded(observation: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
            # A peer's own arithmetic may leave [-1, 1] by a rounding error.
            actions: NDArray[np.float32] = np.clip(np.asarray(act(observation["policy"]), np.float32), -1.0, 1.0)
            return actions

        return evaluate(bounded, env, seed=self.entry.seed, episodes=self.entry.episodes, index=self._evaluations)


def _write(path: Path, mode: str, cells: Sequence[object]) -> None:
    with path.open(mode, encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(cells)


def unit_actions(actions: NDArray[Any], low: NDArray[Any], high: NDArray[Any]) -> NDArray[Any]:
    """Actions (E, A) between ``low`` and ``high`` (A,) as values in [-1, 1]."""
    scaled: NDArray[Any] = 2 * (actions - low) / (high - low) - 1
    return scaled


def contend(train: Callable[[Race], None], own: Mapping[str, Collection[str]] | None) -> int:
    """A contender's main function: reads the words, starts the clock, trains; returns the exit code.

    What torch compiles goes into a folder of this process alone: compiled anew by every run, as by a user's first.

    Args:
        train: trains until `Race.over`.
        own: as for `Entry.read`.
    """

    def verb(words: Sequence[str]) -> None:
        race = Race(Entry.read(words, own))
        with tempfile.TemporaryDirectory(prefix="time_to_return_") as compiled:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = compiled
            try:
                train(race)
            except ModuleNotFoundError as error:
                raise ConfigurationError(
                    f"{error.name} is not installed; expected the extra `peers`: "
                    "pip install -c constraints.txt -e '.[peers]'"
                ) from error

    return run_verb(verb, sys.argv[1:])


def measure(options: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - the verb's arguments
    """A row for every contender of the grid that runs here.

    Raises:
        ConfigurationError: there is no grid beside the package, or it has no such task.
    """
    grid = _grid()
    if options.task not in grid["tasks"]:
        raise ConfigurationError(f"task={options.task} is none of the grid's; {nearest(options.task, grid['tasks'])}")
    end = 0.5 if options.quick else options.minutes
    marks = (end / 2, end)
    threads = options.threads or len(os.sched_getaffinity(0))
    common = [*grid["tasks"][options.task], f"minutes={marks[0]:g},{marks[1]:g}", f"threads={threads}"]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arm, words in grid["arms"].items():
            place = [f"env.threads={threads}", "seed=0", f"runs={folder}", f"name={arm}"]
            rows.append(_measured(arm, [*grid["trainers"][arm], *common, *words, *place], Path(folder) / arm, marks))
    return rows


def _grid() -> dict[str, Any]:
    from omegaconf import OmegaConf

    if not GRID.is_file():
        raise ConfigurationError(
            f"{GRID} is not there; expected a checkout of the repository, which holds the contenders: clone it and "
            "install with pip install -e '.[peers]'"
        )
    grid: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(GRID))  # type: ignore[assignment]
    return grid


def _measured(arm: str, command: Sequence[str], folder: Path, marks: Sequence[float]) -> dict[str, Any]:
    """One contender's row; what it says goes to stderr, and one that fails is told as such."""
    print(f"{arm}: {shlex.join(command)}", file=sys.stderr)
    words = [sys.executable if word == "python" else word for word in command[:1]] + list(command[1:])
    threads = next(word.partition("=")[2] for word in command if word.startswith("threads="))
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    done = subprocess.run(words, cwd=CHECKOUT, env=os.environ | variables, stdout=sys.stderr, check=False)
    table = folder / "eval.csv"
    found = list(csv.DictReader(table.open(encoding="utf-8"))) if table.exists() else []
    row: dict[str, Any] = {"contender": arm}
    for mark in marks:
        reached = returned_at(found, 60 * mark)
        row[f"return at {mark:g} min"] = (
            f"exit code {done.returncode}" if reached is None else float(reached["return_mean"])
        )
    last = found[-1] if found else {}
    return row | {column: int(last.get(column, 0)) for column in ("step", "updates")}


def returned_at(rows: Sequence[Mapping[str, str]], seconds: float) -> Mapping[str, str] | None:
    """The first row of an ``eval.csv`` whose evaluation began at ``seconds`` of training or later; None without one."""
    return next((row for row in rows if float(row["train_seconds"]) >= seconds), None)

"""The clock, the evaluations and the grid of the comparison with peers; peers themselves only where installed."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student_t

from rlplastic.benchmarking import time_to_return
from rlplastic.benchmarking.time_to_return import Clock, Entry, Race, measure, unit_actions
from rlplastic.errors import ConfigurationError
from rlplastic.evaluation import Evaluation

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "time_to_return"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, loaded)
    spec.loader.exec_module(loaded)
    return loaded


# The clock


def test_the_clock_counts_from_the_start_of_the_process_whatever_its_name() -> None:
    program = """
import pathlib, time
pathlib.Path("/proc/self/comm").write_text("a) b (c 7")
time.sleep(0.5)
from rlplastic.benchmarking.time_to_return import Clock
print(Clock().seconds)
"""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        counted = float(process.stdout.readline())
        seen = time.perf_counter() - started
    assert 0.5 < counted <= seen + 0.02
    assert counted == pytest.approx(seen, abs=0.3)


def test_paused_seconds_do_not_count() -> None:
    clock = Clock()
    before, wall = clock.seconds, clock.wall
    with pytest.raises(KeyError), clock.paused():
        time.sleep(0.3)
        raise KeyError
    assert clock.seconds - before < 0.2
    assert clock.wall - wall >= 0.3


# The words


def test_words_become_an_entry() -> None:
    words = [
        "task=Hopper-v5",
        "minutes=0.5,2",
        "episodes=3",
        "seed=4",
        "threads=2",
        "env.threads=2",
        "runs=a",
        "name=b",
        "kind=x",
    ]
    entry = Entry.read(words, {"kind": ("x", "y")})
    assert (entry.task, entry.minutes, entry.episodes, entry.seed, entry.threads) == ("Hopper-v5", (0.5, 2.0), 3, 4, 2)
    assert (entry.folder, entry.own) == (Path("a/b"), {"kind": "x"})
    assert Entry.read(words).own == {"kind": "x", "env.threads": "2"}
    assert Entry.read([], {}).minutes == (3, 6)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("kind=x tusk=Hopper-v5", "did you mean 'task'"),
        ("kind=z", "kind=z is none"),
        ("seed=0", "missing kind"),
        ("kind=x seed=one", "a number is expected"),
        ("kind=x minutes=6,3", "rising minutes"),
        ("kind=x minutes=0,3", "rising minutes"),
        ("kind=x threads=0", "at least one"),
    ],
)
def test_wrong_words_are_refused(words: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        Entry.read(words.split(), {"kind": ("x", "y")})


# The race


class Hands:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.seconds = self.wall = 0.0
        self.pauses = 0

    def paused(self) -> Any:
        self.pauses += 1
        return Clock.paused(SimpleNamespace(_paused=0.0))  # type: ignore[arg-type]


@pytest.fixture
def race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Race:
    """Marks after 60 and 120 seconds, a clock set by hand, and evaluations that return their own number."""
    race = Race(Entry.read(["minutes=1,2", "seed=7", "episodes=2", f"runs={tmp_path}", "name=run"]))
    race.clock = Hands()  # type: ignore[assignment]

    def evaluate(act: Any, env: Any, *, seed: int, episodes: int, index: int) -> Evaluation:
        assert (env.backend, env.task, seed, episodes) == ("gymnasium", "HalfCheetah-v5", 7, 2)
        assert act({"policy": np.zeros((2, 3), np.float32)}).tolist() == [[1.0], [-1.0]]
        return Evaluation(np.array([index, index + 2.0]), np.array([5, 6]), np.array([True, True]))

    monkeypatch.setattr(time_to_return, "evaluate", evaluate)
    return race


def act(observations: Any) -> Any:
    """Beyond the range by a rounding error, and of another float type."""
    return np.array([[1.0 + 1e-6], [-1.0 - 1e-6]], np.float64)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_mark_is_followed_by_one_evaluation_and_the_last_ends_the_race(race: Race) -> None:
    seen = []
    for seconds in (1.0, 59.9, 60.1, 60.2, 119.0, 120.5):
        race.clock.seconds = seconds  # type: ignore[misc]
        seen.append(race.over(round(seconds), 2 * round(seconds), act))
    assert seen == [False] * 5 + [True]
    assert race.over(0, 0, act)
    assert race.clock.pauses == 2  # type: ignore[attr-defined]
    table = rows(race.entry.folder / "eval.csv")
    assert [float(row["train_seconds"]) for row in table] == [60.1, 120.5]
    assert [(int(row["step"]), int(row["updates"])) for row in table] == [(60, 120), (120, 240)]
    assert [float(row["return_mean"]) for row in table] == [2.0, 3.0]
    low, high = student_t.interval(0.95, 1, loc=2.0, scale=1.0)
    assert (float(table[0]["return_ci95_low"]), float(table[0]["return_ci95_high"])) == pytest.approx((low, high))
    assert len(rows(race.entry.folder / "timing.csv")) == 2


def test_a_step_beyond_several_marks_is_evaluated_once(race: Race) -> None:
    race.clock.seconds = 500.0  # type: ignore[misc]
    assert race.over(1, 1, act)
    table = rows(race.entry.folder / "eval.csv")
    assert len(table) == 1
    assert [time_to_return.returned_at(table, mark) for mark in (60, 120)] == [table[0]] * 2
    assert time_to_return.returned_at(table, 501) is None


def test_equal_seeds_meet_equal_starting_states_and_another_evaluation_meets_others(tmp_path: Path) -> None:
    def returns(seed: int, name: str) -> list[float]:
        words = ["task=Pendulum-v1", "minutes=1,2", f"seed={seed}", "episodes=2", f"runs={tmp_path}", f"name={name}"]
        race = Race(Entry.read(words))
        race.clock = Hands()  # type: ignore[assignment]
        for seconds in (61.0, 121.0):
            race.clock.seconds = seconds  # type: ignore[misc]
            race.over(1, 1, lambda observations: np.zeros((len(observations), 1)))
        return [float(row["return_mean"]) for row in rows(race.entry.folder / "eval.csv")]

    first, again, other = returns(0, "a"), returns(0, "b"), returns(1, "c")
    assert first == again
    assert len({*first, *other}) == 4


def test_actions_are_mapped_from_their_box() -> None:
    low, high = np.array([-0.4, 0.0]), np.array([0.4, 10.0])
    actions = np.array([[-0.4, 10.0], [0.0, 2.5]])
    assert unit_actions(actions, low, high) == pytest.approx(np.array([[-1.0, 1.0], [0.0, -0.5]]))


def test_every_run_compiles_anew_and_a_missing_library_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_to_return, "run_verb", lambda verb, words: verb(words) or 0)
    monkeypatch.setattr(sys, "argv", ["contender.py", f"runs={tmp_path}", "name=x"])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "warm")
    caches = []

    def train(race: Race) -> None:
        caches.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        assert not list(caches[-1].iterdir())
        (caches[-1] / "compiled").touch()

    assert [time_to_return.contend(train, {}) for _ in range(2)] == [0, 0]
    assert caches[0] != caches[1] and not any(cache.exists() for cache in caches)
    with pytest.raises(ConfigurationError, match="no_such_library is not installed"):
        time_to_return.contend(lambda race: importlib.import_module("no_such_library") and None, {})


# The grid


def test_every_command_of_the_grid_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    grid = importlib.import_module("grid")
    loaded = grid.load(FOLDER / "grid.yaml")
    runs = grid.plan(loaded, FOLDER)
    assert (loaded.jobs, loaded.threads, loaded.x) == (1, 2, "train_seconds")
    assert {run.task for run in runs} == {"halfcheetah", "hopper", "humanoid"}
    assert {run.seed for run in runs if run.arm == "rlplastic"} == {0, 1, 2}
    for run in runs:
        path = ROOT / run.command[1]
        entry = Entry.read(run.command[2:], module(path.stem, monkeypatch).OWN)
        assert (entry.minutes, entry.threads, entry.episodes) == ((3, 6), 2, 10)
        assert entry.own.get("algorithm", run.arm) in run.arm


CONTENDER = """
import pathlib, sys
words = dict(word.split("=", 1) for word in sys.argv[1:])
if words["kind"] == "broken":
    sys.exit("error: no such library")
folder = pathlib.Path(words["runs"]) / words["name"]
folder.mkdir()
half, end = (60 * float(mark) for mark in words["minutes"].split(","))
value = f"{words['task']}-{words['threads']}-{words['seed']}" == "Hopper-v5-1-0"
(folder / "eval.csv").write_text(
    "step,updates,return_mean,train_seconds\\n"
    f"10,5,{float(value)},{half}\\n20,9,2.5,{end + 1}\\n"
)
"""


def test_bench_runs_every_contender_once_and_tells_those_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "contender.py").write_text(CONTENDER)
    trainer = f"[python, {tmp_path / 'contender.py'}]"
    (tmp_path / "grid.yaml").write_text(
        "tasks: {hopper: [task=Hopper-v5]}\narms: {good: [kind=good], bad: [kind=broken]}\n"
        f"trainers: {{good: {trainer}, bad: {trainer}}}\n"
    )
    monkeypatch.setattr(time_to_return, "GRID", tmp_path / "grid.yaml")
    options = SimpleNamespace(task="hopper", minutes=3.0, threads=1, quick=False)
    monkeypatch.setattr(time_to_return, "CHECKOUT", tmp_path)
    assert measure(options) == [
        {"contender": "good", "return at 1.5 min": 1.0, "return at 3 min": 2.5, "step": 20, "updates": 9},
        {
            "contender": "bad",
            "return at 1.5 min": "exit code 1",
            "return at 3 min": "exit code 1",
            "step": 0,
            "updates": 0,
        },
    ]
    assert "no such library" in capfd.readouterr().err
    with pytest.raises(ConfigurationError, match="task=ant is none of the grid's"):
        measure(SimpleNamespace(task="ant", minutes=3.0, threads=1, quick=False))
    monkeypatch.setattr(time_to_return, "GRID", tmp_path / "gone.yaml")
    with pytest.raises(ConfigurationError, match="expected a checkout"):
        measure(options)


def test_returns_are_compared_with_the_best_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = module("compare", monkeypatch)
    results = compare.grid_results
    (tmp_path / "curves").mkdir()

    def add(arm: str, seed: int, half: float, end: float, exit_code: int = 0) -> None:
        values = dict.fromkeys(results.Result._fields, 0.0) | {"final_mean": end, "jobs": 1}
        result = results.Result(**values | {"task": "hopper", "arm": arm, "seed": seed, "exit_code": exit_code})
        results.append_result(tmp_path / "results.csv", result)
        table = f"step,updates,return_mean,train_seconds\n10,5,{half},180.2\n30,15,{end},361\n"
        (tmp_path / "curves" / f"hopper__{arm}__{seed}.csv").write_text(table)

    for seed, end in enumerate((100.0, 200.0, 600.0)):
        add("rlplastic", seed, 50.0, end)
    add("slow", 0, -1.0, 150.0)
    add("fast", 0, -2.0, 200.0)
    add("broken", 0, 900.0, 900.0, exit_code=3)
    final = compare.scores(tmp_path, 6)["hopper"]
    assert [(one.arm, one.seeds, one.mean) for one in final] == [
        ("rlplastic", 3, 300),
        ("fast", 1, 200),
        ("slow", 1, 150),
    ]
    half_width = student_t.ppf(0.975, 2) * np.std([100, 200, 600], ddof=1) / math.sqrt(3)
    assert final[0].half_width == pytest.approx(half_width)
    assert [compare.ratio(one, final) for one in final] == [1.5, 1.0, 0.75]
    half = compare.scores(tmp_path, 3)["hopper"]
    assert all(math.isnan(compare.ratio(one, half)) for one in half)
    assert compare.main(tmp_path) == 0
    text = (tmp_path / "returns.md").read_text()
    assert "| hopper | slow | 1 | 150 | 0.75 | 30 | 15 |" in text
    assert "| hopper | rlplastic | 3 | 50 ± 0 | – | 10 | 5 |" in text
    assert (tmp_path / "returns.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    assert compare.main(tmp_path / "empty") == 1


# The contenders


def trained(program: str, folder: Path, *words: str) -> list[dict[str, str]]:
    """The evaluations of a contender that had 12 and 20 seconds on Hopper."""
    common = [
        "task=Hopper-v5",
        "minutes=0.2,0.34",
        "episodes=1",
        "threads=1",
        "env.threads=1",
        f"runs={folder}",
        "name=x",
    ]
    command = [sys.executable, str(FOLDER / program), *common, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return rows(folder / "x" / "eval.csv")


@pytest.mark.slow
def test_rlplastic_trains_in_the_race_and_its_own_clock_leaves_the_evaluations_out(tmp_path: Path) -> None:
    words = ["replay.minimum=64", "replay.capacity=10000", "agent.critic_width=16", "agent.actor_width=16"]
    words += ["replay.batch_size=16", "tracking.every=200", "checkpoint.every=200"]
    last = trained("with_rlplastic.py", tmp_path, *words)[-1]
    assert int(last["updates"]) > 0
    assert float(last["train_seconds"]) >= 20.4
    timing = rows(tmp_path / "x" / "run" / "timing.csv")[-1]
    assert float(timing["train_seconds"]) < float(last["train_seconds"])
    assert list((tmp_path / "x" / "run" / "checkpoints").glob("step_*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "program", "words"),
    [
        ("stable_baselines3", "with_stable_baselines.py", ["algorithm=sb3_sac", "critic=default"]),
        ("sb3_contrib", "with_stable_baselines.py", ["algorithm=sb3_crossq", "critic=256"]),
        ("sbx", "with_stable_baselines.py", ["algorithm=sbx_crossq", "critic=256"]),
        ("torchrl", "with_torchrl.py", []),
        ("skrl", "with_skrl.py", []),
    ],
)
def test_peers_that_are_installed_train_in_the_race(
    tmp_path: Path, library: str, program: str, words: list[str]
) -> None:
    pytest.importorskip(library)
    assert int(trained(program, tmp_path, *words)[-1]["step"]) > 0

"""What a run tells while it runs: logs that cannot be written end nothing, and nothing known is shown as unknown."""

from __future__ import annotations

import csv
import errno
import io
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from small_runs import SMALL, final_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.hparams.metadata import (
    SESSION_END_INFO_TAG,
    SESSION_START_INFO_TAG,
    parse_session_start_info_plugin_data,
)

from rlplastic import record_files, reporting, train_agent
from rlplastic.errors import LogWriteError
from rlplastic.progress import Progress
from rlplastic.session import Session
from rlplastic.terminal import Moment, Status, View


class FullDisk:
    """A disk that takes no log from the ``first`` to the ``last`` attempt to write one, counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
        self.count, self.first, self.last = 0, first, last
        self._really = record_files.append
        monkeypatch.setattr(record_files, "append", self._append)

    def _append(self, path: Path, content: bytes) -> None:
        self.count += 1
        if self.first <= self.count <= self.last:
            with record_files.writing(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        self._really(path, content)


def logged(folder: Path) -> tuple[str, list[str], list[int]]:
    """What must not depend on the disk: evaluations, the steps of timing.csv, and those of a TensorBoard curve."""
    run = folder / "run"
    with open(run / "timing.csv") as file:
        steps = [row["step"] for row in csv.DictReader(file)]
    events = EventAccumulator(str(run)).Reload()
    return (run / "eval.csv").read_text(), steps, [event.step for event in events.Scalars("replay/transitions")]


def test_a_disk_that_is_full_for_a_while_costs_one_warning_and_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_agent([*SMALL, f"runs={tmp_path / 'usual'}", "name=run"], quiet=True)
    uncaught: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    disk = FullDisk(monkeypatch, first=6, last=20)
    train_agent([*SMALL, f"runs={tmp_path / 'full'}", "name=run"])
    assert disk.count > disk.last
    captured = capsys.readouterr()
    (warning,) = captured.err.splitlines()
    assert "cannot be written (No space left on device); free space on the disk: meanwhile the run goes on" in warning
    assert captured.out.count("logs are written again") == 1
    assert logged(tmp_path / "full") == logged(tmp_path / "usual")
    assert final_state(tmp_path / "full" / "run") == final_state(tmp_path / "usual" / "run")
    assert uncaught == []


def test_a_disk_that_stays_full_does_not_stop_checkpoints_but_leaves_the_run_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, f"runs={tmp_path}", "name=run"]
    with monkeypatch.context() as patch:
        FullDisk(patch, first=6, last=10**9)
        with pytest.raises(LogWriteError, match="rerun the command"):
            train_agent(arguments)
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert (tmp_path / "run" / "checkpoints" / "step_000000000600").is_dir()
    result = train_agent(arguments, quiet=True)
    assert result.evaluation is not None
    last = (tmp_path / "run" / "eval.csv").read_text().splitlines()[-1]
    assert last.startswith("600,") and float(last.split(",")[3]) == result.evaluation.mean


def test_a_resumed_run_shows_its_last_evaluation_before_it_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Status] = []
    monkeypatch.setattr(View, "update", lambda self, status: shown.append(status))
    monkeypatch.setattr(View, "watch", lambda self, look, status: shown.append(status))
    arguments = [*SMALL, f"runs={tmp_path}", "name=run", "evaluation.every=0"]
    first = train_agent([*arguments, "env_steps=300"], quiet=True)
    assert shown[0].eval_return is None and first.evaluation is not None
    shown.clear()
    train_agent(arguments, quiet=True)
    assert len(shown) > 3
    low, high = first.evaluation.ci95
    for status in shown:
        assert (status.eval_return, status.eval_ci95) == (first.evaluation.mean, (high - low) / 2)


def test_the_view_knows_what_the_run_is_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampled where the loop calls the reporter; the view's thread asks at any time."""
    seen: list[tuple[str, int, int]] = []
    really = reporting.Reporter.log

    def log(self: reporting.Reporter) -> None:
        moment = self._moment()
        seen.append((moment.phase, moment.step, moment.updates))
        really(self)

    phases: list[str] = []
    monkeypatch.setattr(reporting.Reporter, "log", log)
    during = View.during
    monkeypatch.setattr(View, "during", lambda self, phase: phases.append(phase) or during(self, phase))
    train_agent([*SMALL, f"runs={tmp_path}", "name=run", "replay.minimum=200", "tracking.every=20"], quiet=True)
    assert {phase for phase, step, _ in seen if step < 200} == {"collecting"}
    assert {phase for phase, step, _ in seen if step >= 200} == {"learning"}
    assert seen == sorted(seen, key=lambda each: each[1])
    assert set(phases) == {"evaluating", "saving"}


def records(run: Path, tag: str) -> int:
    """How often a tag was written, over all event files."""
    loaders = (LegacyEventFileLoader(str(file)) for file in run.glob("*tfevents*"))
    return sum(value.tag == tag for loader in loaders for event in loader.Load() for value in event.summary.value)


def test_a_run_tells_tensorboard_its_configuration_once_also_when_it_was_interrupted(tmp_path: Path) -> None:
    arguments = [*SMALL, f"runs={tmp_path}", "name=run"]
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(reporting.Reporter, "evaluate", lambda *_: (_ for _ in ()).throw(RuntimeError))
        train_agent(arguments, quiet=True)
    assert records(tmp_path / "run", SESSION_START_INFO_TAG) == 0
    train_agent(arguments, quiet=True)
    for tag in ("configuration/text_summary", SESSION_START_INFO_TAG, SESSION_END_INFO_TAG):
        assert records(tmp_path / "run", tag) == 1
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    start = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    told = parse_session_start_info_plugin_data(start).hparams
    assert told["agent.critic_width"].number_value == 8 and told["env.task"].string_value == "Pendulum-v1"
    assert not {"runs", "name", "tracking.every", "env_steps", "max_minutes"} & set(told)
    (text,) = events.Tensors("configuration/text_summary")
    assert (tmp_path / "run" / "config.yaml").read_bytes() in text.tensor_proto.string_val[0]


class Fake(SimpleNamespace):
    """A session of which only this much is real."""

    compiling = Session.compiling


def test_updates_that_may_compile_are_told_as_such_after_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for first in (0, 5000):
        session = Fake(
            progress=Progress(transitions=900, train_seconds=30.0),
            agent=SimpleNamespace(updates=first),
            first_update=first,
            config=SimpleNamespace(compile="on"),
            replay_ratio=SimpleNamespace(minimum=1000),
        )
        monkeypatch.setattr(reporting.Reporter, "_status", lambda *_: None)
        view = SimpleNamespace(watch=lambda look, status: None)
        tracker = SimpleNamespace(last_evaluation=lambda: None)
        reporter = reporting.Reporter(session, tracker, view)  # type: ignore[arg-type]
        assert reporter._moment() == Moment("collecting", 900, 0.5, first)
        session.progress.transitions, told = 1000, []
        for updates in range(4):
            session.agent.updates = first + updates
            told.append(reporter._moment().phase)
        assert told == ["compiling", "compiling", "learning", "learning"]


def test_a_live_view_says_that_it_films_while_it_films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    console = Console(force_terminal=True, width=80, file=shown, color_system=None)
    monkeypatch.setattr("rlplastic.training.View", lambda live, quiet: View(console=console))

    def record(act: object, env: object, path: Path, *, seed: int, transitions: int) -> str:
        deadline = time.monotonic() + 20
        while "filming" not in shown.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        return "a test needs none"

    monkeypatch.setattr("rlplastic.video.record", record)
    train_agent([*SMALL, "env_steps=300", "tracking.video=true", f"runs={tmp_path}", "name=run"])
    assert "filming" in shown.getvalue()
    assert "no video: a test needs none" in shown.getvalue()

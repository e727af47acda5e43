"""What is drawn on a terminal fits it and keeps moving; nothing that happens to the output happens to the run."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from rlplastic.terminal import Moment, Status, View, banner

STATUS = Status(
    step=3000,
    minutes=1.2,
    env_steps=6000,
    max_minutes=None,
    updates=1049,
    env_steps_per_s=100,
    updates_per_s=25,
    replay_ratio=0.25,
)

WIDEST = Status(
    step=987_654_321,
    minutes=600.0,
    env_steps=1_000_000_000,
    max_minutes=6000.0,
    updates=987_654_321,
    env_steps_per_s=123_456.7,
    updates_per_s=12_345.6,
    replay_ratio=0.0012345,
    train_return=-12345.678,
    train_episodes=100,
    eval_return=-12345.678,
    eval_ci95=1234.5678,
    critic_loss=1.2345e-05,
    alpha=1.2345e-05,
)


def terminal(width: int = 80) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(force_terminal=True, width=width, file=file, color_system=None, legacy_windows=False), file


def plain(file: io.StringIO) -> str:
    """What was written without the control codes."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_bar_does_not_push_the_first_row_off_the_screen() -> None:
    """A progress bar ends without a new line: what follows it must begin one."""
    console, file = terminal()
    with View(console=console) as view:
        view.update(STATUS)
    rows = plain(file).splitlines()
    assert any(row.startswith("step 3,000") for row in rows)
    assert any(row.startswith("updates 1,049") for row in rows)
    assert any("50.0% done   30s left" in row for row in rows)


def test_the_live_view_redraws_in_place_and_keeps_notes() -> None:
    console, file = terminal()
    with View(console=console) as view:
        view.update(STATUS)
        view.note("evaluated [not markup]")
        view.update(dataclasses.replace(STATUS, step=24_000))
    output = file.getvalue()
    assert "\x1b[2K" in output and "━" in output and output.count("\x1b[?25h") == 1  # the cursor comes back
    assert "step 3,000" in plain(file) and "step 24,000" in plain(file) and "evaluated [not markup]" in plain(file)


def test_the_widest_numbers_fit_eighty_columns_without_wrapping_or_dots() -> None:
    console, file = terminal()
    view = View(console=console)
    view.watch(lambda: Moment("collecting", WIDEST.step, WIDEST.minutes, WIDEST.updates), WIDEST)
    with view:
        view.update(WIDEST)
        assert max(map(len, plain(file).splitlines())) <= 80
        shown = plain(file)
    assert "…" not in shown
    for cell in (
        "return -12346 (100 episodes)",
        "eval -12346 +/- 1235",
        "critic loss 1.234e-05",
        "updates 987,654,321",
    ):
        assert cell in shown
    *_, step, updates, ratio = shown.splitlines()
    assert (step[:4], updates[:7], ratio[:12]) == ("step", "updates", "replay ratio")


def test_a_narrow_terminal_cuts_cells_off_and_keeps_the_rows() -> None:
    console, file = terminal(width=40)
    with View(console=console) as view:
        view.update(WIDEST)
        assert len(plain(file).strip().splitlines()) == 5
    assert "…" in plain(file)


def test_the_live_view_moves_while_the_run_says_nothing() -> None:
    console, file = terminal()
    threads: set[int] = set()
    step = 0

    def look() -> Moment:
        nonlocal step
        threads.add(threading.get_ident())
        step += 1
        return Moment("compiling", step, 0.5, 7)

    view = View(console=console)
    view.watch(look, STATUS)
    with view:
        eventually(lambda: "step 3 " in plain(file))
        assert "compiling" in plain(file) and "0s elapsed" in plain(file)
        with view.during("evaluating"):
            eventually(lambda: "evaluating" in plain(file))
        assert threading.get_ident() not in threads
    looks = step
    time.sleep(0.6)
    assert step == looks, "after the end nobody may look"
    assert "evaluating" not in plain(file).splitlines()[-3]


def test_nothing_redraws_in_plain_output() -> None:
    file = io.StringIO()

    def look() -> Moment:
        raise AssertionError

    view = View(console=Console(file=file))
    view.watch(look, STATUS)
    with view, view.during("evaluating"):
        time.sleep(0.6)
    assert file.getvalue() == ""


def test_warnings_go_to_standard_error_and_nothing_else_does(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        with View(quiet=quiet) as view:
            view.warn("disk nearly full")
            view.note("saved")
        captured = capsys.readouterr()
        assert captured.err == "warning: disk nearly full\n"
        assert captured.out == ("" if quiet else "saved\n")


def test_a_quiet_view_shows_warnings_only(capsys: pytest.CaptureFixture[str]) -> None:
    console, file = terminal()
    with View(console=console, quiet=True) as view:
        view.update(STATUS)
        view.note("warning: this is only a note")
        view.warn("disk nearly full")
        assert list(view.track([1, 2], "replaying")) == [1, 2]
    assert (file.getvalue(), capsys.readouterr().err) == ("", "warning: disk nearly full\n")


def test_plain_lines_asked_for_on_a_terminal_have_no_progress_bar() -> None:
    console, file = terminal()
    assert list(View(live=False, console=console).track([1, 2], "replaying actions")) == [1, 2]
    assert file.getvalue() == "replaying actions: 2\n"


def test_warnings_beside_a_live_view_reach_a_file_that_standard_error_goes_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console, file = terminal()
    with View(console=console) as view:
        view.update(STATUS)
        view.warn("disk nearly full")
        print("a library's warning", file=sys.stderr)
    assert capsys.readouterr().err == "warning: disk nearly full\na library's warning\n"
    assert "nearly full" not in file.getvalue()


class Broken(io.StringIO):
    """A terminal that went away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise OSError(28, "No space left on device")

    def isatty(self) -> bool:
        return True


def test_output_that_nobody_takes_any_more_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failures: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    monkeypatch.setattr(sys, "stdout", Broken())
    monkeypatch.setattr(sys, "stderr", Broken())
    for live in (False, True):
        view = View(live=live)
        view.watch(lambda: Moment("learning", 1, 0.0, 1), STATUS)
        with view:
            view.update(STATUS)
            view.note("saved")
            view.warn("disk nearly full")
            time.sleep(0.6)
        assert list(view.track([1, 2], "replaying")) == [1, 2]
    banner([("device", "cpu", "no accelerator found")])
    assert failures == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_standard_output_does_not_change_the_exit_code(unbuffered: str) -> None:
    program = """
import sys
from rlplastic.command_line import run_verb
from rlplastic.terminal import View
sys.exit(run_verb(lambda arguments: View().note("saved"), []))
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 0
    told = "" if unbuffered else "warning: standard output is incomplete (No space left on device)\n"
    assert done.stderr == told


def test_a_closed_pipe_behind_standard_output_is_silent_to_the_end() -> None:
    program = """
import sys
from rlplastic.command_line import run_verb
from rlplastic.terminal import View
view = View()
print("first line", flush=True)
sys.stdin.read()
sys.exit(run_verb(lambda arguments: [view.note("more")] * 3 and None, []))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == "first line\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0

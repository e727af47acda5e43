"""Tracking: rows that read back exactly, events TensorBoard can read after a cut, views without stray control codes."""

from __future__ import annotations

import csv
import dataclasses
import io
import random
import re
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from rlplastic.errors import ConfigurationError, LogWriteError
from rlplastic.run_directory import RunDirectory
from rlplastic.terminal import Status, View, banner, duration, plain_line
from rlplastic.tracking import SCALARS, SECTIONS, EvaluationRow, TimingRow, Tracker, scalar_layout
from rlplastic.writers.tensorboard import MAX_GIF_FRAMES

STATUS = Status(
    step=12_000,
    minutes=2.0,
    env_steps=48_000,
    max_minutes=10.0,
    updates=3_000,
    env_steps_per_s=100.0,
    updates_per_s=25.0,
    replay_ratio=0.25,
    train_return=123.456,
    train_episodes=10,
    eval_return=150.2,
    eval_ci95=12.1,
    critic_loss=1.234,
    alpha=0.01,
)


def evaluation_row(step: int, value: float) -> EvaluationRow:
    return EvaluationRow(step, step // 4, 10, value, value / 3, value - 1, value + 1, 1000.0)


def timing_row(step: int) -> TimingRow:
    return TimingRow(step, step // 4, 0.5, 0.25, *[1 / len(SECTIONS)] * len(SECTIONS))


def curve(directory: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory)).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def hyperparameters(events: EventAccumulator) -> dict[str, float | str]:
    """What the HParams tab shows of a run, read by its own parser."""
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    values = metadata.parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def test_importing_rlplastic_tracking_does_not_import_tensorboard() -> None:
    program = "import sys, rlplastic.tracking; sys.exit('tensorboard' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_evaluation_rows_read_back_bit_for_bit(tmp_path: Path) -> None:
    chance = random.Random(0)
    rows = [evaluation_row(step, chance.uniform(-1e4, 1e4)) for step in range(20)]
    rows.append(EvaluationRow(np.int64(3), 1, 2, np.float64(1) / 3, np.float32(0.1), -0.0, 5e-324, 1e300))  # type: ignore[arg-type]
    with Tracker(tmp_path) as tracker:
        for row in rows:
            tracker.evaluation(row)
    with open(tmp_path / "eval.csv") as file:
        header, *lines = csv.reader(file)
    columns = "step,updates,episodes,return_mean,return_std,return_ci95_low,return_ci95_high,length_mean"
    assert ",".join(header) == columns
    for row, line in zip(rows, lines, strict=True):
        assert [int(cell) for cell in line[:3]] == list(row[:3])
        assert np.array(line[3:], np.float64).tobytes() == np.array(row[3:], np.float64).tobytes()


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.scalars(5, {"loss/critic": 0.5, "policy/alpha": 0.25})
        tracker.scalars(10, {"loss/critic": 0.125})
        tracker.evaluation(EvaluationRow(10, 2, 4, 3.0, 1.0, 2.5, 3.5, 100.0))
    assert curve(tmp_path, "loss/critic") == [(5, 0.5), (10, 0.125)]
    assert curve(tmp_path, "eval/return_mean") == [(10, 3.0)] and curve(tmp_path, "eval/return_ci95") == [(10, 0.5)]


@pytest.mark.parametrize(("count", "kept", "milliseconds"), [(5, 5, 80), (2 * MAX_GIF_FRAMES, MAX_GIF_FRAMES, 160)])
def test_a_film_is_thinned_out_and_keeps_its_speed(tmp_path: Path, count: int, kept: int, milliseconds: int) -> None:
    imageio = pytest.importorskip("imageio.v3", reason="the extra 'video' is not installed")
    pytest.importorskip("imageio_ffmpeg", reason="the extra 'video' is not installed")
    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 255, (count, 32, 48, 3), dtype=np.uint8)
    imageio.imwrite(tmp_path / "episode.mp4", frames, fps=12.5)
    (tmp_path / "run").mkdir()
    with Tracker(tmp_path / "run") as tracker:
        tracker.video("episode", tmp_path / "episode.mp4", 1)
    image = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload().Images("episode")[0]
    assert (image.width, image.height) == (48, 32)
    with Image.open(io.BytesIO(image.encoded_image_string)) as animation:
        assert getattr(animation, "n_frames", 0) == kept and animation.size == (48, 32)
        assert animation.info["duration"] == milliseconds


def test_resumed_logs_equal_those_of_a_run_that_was_never_interrupted(tmp_path: Path) -> None:
    """Write to 3, remember the lengths, write on to 6 and lose that, cut back, write 4 to 8: as if 1 to 8."""

    def write(tracker: Tracker, steps: range) -> None:
        for step in steps:
            tracker.scalars(step, {"loss/critic": step / 7})
            tracker.evaluation(evaluation_row(step, step / 3))
            tracker.timing(timing_row(step))

    whole, parts = (RunDirectory.open(tmp_path, name, {}) for name in ("whole", "parts"))
    with Tracker(whole.path) as tracker:
        write(tracker, range(1, 9))
    first = Tracker(parts.path)
    write(first, range(1, 4))
    first.flush()
    lengths = parts.log_lengths()
    write(first, range(4, 7))
    first.flush()
    assert parts.log_lengths() != lengths
    assert parts.cut_back(lengths) == []
    with Tracker(parts.path) as tracker:
        write(tracker, range(4, 9))
    assert (parts.path / "eval.csv").read_bytes() == (whole.path / "eval.csv").read_bytes()
    assert curve(parts.path, "loss/critic") == curve(whole.path, "loss/critic")
    assert len(curve(parts.path, "eval/return_mean")) == 8
    timings = [line.split(",")[:2] for line in (parts.path / "timing.csv").read_text().splitlines()[1:]]
    assert [int(step) for _, step in timings] == [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8]
    assert [int(attempt) for attempt, _ in timings] == [1] * 6 + [2] * 5


def test_flush_leaves_nothing_to_be_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths that a checkpoint records must hold: nothing may write to the logs from a thread of its own."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # its delay would hide the race
    with RunDirectory.open(tmp_path, "run", {}) as run, Tracker(run.path) as tracker:
        for step in range(100):
            tracker.scalars(step, dict.fromkeys(SCALARS, 1.0))
            tracker.flush()
            lengths = run.log_lengths()
            time.sleep(0.003)
            assert run.log_lengths() == lengths


def test_row_that_a_killed_process_left_incomplete_is_dropped(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        tracker.timing(timing_row(1))
    complete = (tmp_path / "timing.csv").read_bytes()
    (tmp_path / "timing.csv").write_bytes(complete + b"2,2,0.")
    Tracker(tmp_path)
    assert (tmp_path / "timing.csv").read_bytes() == complete
    (tmp_path / "timing.csv").write_bytes(complete[:10])
    Tracker(tmp_path)
    assert (tmp_path / "timing.csv").read_bytes() == complete.splitlines(keepends=True)[0]


def test_attempts_are_numbered_and_a_timing_row_has_a_fraction_of_every_section(tmp_path: Path) -> None:
    for rows in (1, 2, 0, 1):  # the third attempt dies before its first row and leaves no trace
        with Tracker(tmp_path) as tracker:
            for step in range(rows):
                tracker.timing(timing_row(step))
    with open(tmp_path / "timing.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["attempt"] for row in table] == ["1", "2", "2", "3"]
    assert list(table[0])[:5] == ["attempt", "step", "updates", "wall_seconds", "train_seconds"]
    assert list(table[0])[5:] == [f"fraction_{name}" for name in SECTIONS]
    assert [name for name in SCALARS if "fraction" in name] == [f"speed/fraction_{name}" for name in SECTIONS]
    assert sum(float(row["fraction_store"]) for row in table) == pytest.approx(4 / 7)


def test_row_that_only_half_fits_on_the_disk_is_taken_back(tmp_path: Path) -> None:
    program = f"""
import pathlib, resource, signal
from rlplastic.errors import LogWriteError
from rlplastic.record_files import append
from rlplastic.tracking import _line
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
table = pathlib.Path({str(tmp_path / "eval.csv")!r})
append(table, _line((1, 0.5)))
resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
try:
    append(table, _line((2, 0.123456789)))
except LogWriteError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
append(table, _line((3, 0.25)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert (tmp_path / "eval.csv").read_text() == "1,0.5\n3,0.25\n"


def test_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "eval.csv").write_text("step,score\n1,2\n")
    with pytest.raises(ConfigurationError, match="step,score"):
        Tracker(tmp_path)


def full(path: Path, content: bytes) -> None:
    raise LogWriteError("no space")


def test_full_disk_is_one_sentence_and_what_to_do_about_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker(tmp_path) as tracker:
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(LogWriteError, match=r"No space left on device\); free space on the disk$") as caught:
                tracker.flush()
        assert caught.value.exit_code == 1
        (tmp_path / "eval.csv").unlink()
        (tmp_path / "eval.csv").mkdir()
        with pytest.raises(LogWriteError, match=r"eval\.csv cannot be written .*; move the folder away"):
            tracker.evaluation(evaluation_row(1, 1.0))
        (tmp_path / "eval.csv").rmdir()


def test_what_could_not_be_written_comes_later_in_its_order_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory, broken in ((whole, ()), (parts, (2, 3, 5))):
        directory.mkdir()
        with Tracker(directory) as tracker:
            for step in range(1, 7):
                with monkeypatch.context() as patch:
                    if step in broken:
                        patch.setattr("rlplastic.record_files.append", full)
                    for write in (
                        lambda step=step: tracker.scalars(step, {"loss/critic": step / 7}),
                        lambda step=step: tracker.evaluation(evaluation_row(step, step / 3)),
                        lambda step=step: tracker.timing(timing_row(step)),
                    ):
                        with pytest.raises(LogWriteError) if step in broken else nullcontext():
                            write()
    for table in ("eval.csv", "timing.csv"):
        assert (parts / table).read_bytes() == (whole / table).read_bytes()
    for tag in ("loss/critic", "eval/return_mean"):
        assert curve(parts, tag) == curve(whole, tag) != []


def test_a_file_that_cannot_be_written_holds_back_no_other(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        (tmp_path / "eval.csv").unlink()
        (tmp_path / "eval.csv").mkdir()
        with pytest.raises(LogWriteError):
            tracker.evaluation(evaluation_row(7, 0.5))
        assert curve(tmp_path, "eval/return_mean") == [(7, 0.5)]
        (tmp_path / "eval.csv").rmdir()
    assert (tmp_path / "eval.csv").read_text().startswith("7,1,10,0.5,")


def test_logs_that_stay_unwritten_are_an_error_unless_there_is_a_worse_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (LogWriteError, ZeroDivisionError):
        with monkeypatch.context() as patch, pytest.raises(error), Tracker(tmp_path) as tracker:
            patch.setattr("rlplastic.record_files.append", full)
            with suppress(LogWriteError):
                tracker.timing(timing_row(1))
            if error is ZeroDivisionError:
                raise ZeroDivisionError


def test_the_last_evaluation_is_found_again_bit_for_bit(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        assert tracker.last_evaluation() is None
        rows = [evaluation_row(step, step / 7) for step in (10, 20)]
        for row in rows:
            tracker.evaluation(row)
    assert Tracker(tmp_path).last_evaluation() == rows[-1]


def test_every_documented_scalar_has_a_place_in_the_layout() -> None:
    charts = [tags for section in scalar_layout().values() for _, tags in section.values()]
    shown = {name for name in SCALARS if any(re.fullmatch(tag, name) for tags in charts for tag in tags)}
    assert shown == set(SCALARS)
    assert all(sentence.endswith(".") for sentence in SCALARS.values())


def test_the_layout_shows_what_people_look_for_first_and_nothing_twice() -> None:
    layout = scalar_layout()
    assert list(layout) == ["return", "loss", "policy", "value", "plasticity", "replay", "norm", "time"]
    charts = [tags for section in layout.values() for _, tags in section.values()]
    for name in SCALARS:
        assert sum(any(re.fullmatch(tag, name) for tag in tags) for tags in charts) == 1, name
    monitored = ("critic/trunk.3/effective_rank", "actor/all/dormant", "decisions/ratio", "critic/all/held_out_td_gap")
    for name in monitored:
        assert sum(any(re.match(tag, f"plasticity/{name}") for tag in tags) for tags in charts) == 1, name
    for name in ("actor/all/dormant_0.1", "critic/all/dormant_worst", "frozen/critic/all/dormant"):
        assert not any(re.match(tag, f"plasticity/{name}") for tags in charts for tag in tags), name


def test_a_text_and_the_settings_with_the_last_value_of_a_metric_reach_tensorboard(tmp_path: Path) -> None:
    settings = {"agent.name": "sac", "seed": 3, "env_steps": None, "overlap": True, "env.kwargs": {}}
    with Tracker(tmp_path) as tracker:
        tracker.text("configuration", "```yaml\nseed: 3\n```", 0)
        tracker.scalars(9, {"eval/return_mean": 1.5})
        tracker.hyperparameters(9, settings, "eval/return_mean")
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("configuration/text_summary")
    assert text.step == 0 and text.tensor_proto.string_val[0] == b"```yaml\nseed: 3\n```"
    assert curve(tmp_path, "eval/return_mean") == [(9, 1.5)]
    assert hyperparameters(events) == {
        "agent.name": "sac",
        "seed": 3.0,
        "env_steps": "None",
        "overlap": "True",
        "env.kwargs": "{}",
    }


def test_fraction_and_time_left_follow_the_budget_that_ends_first() -> None:
    assert STATUS.fraction == 0.25 and STATUS.seconds_left == 360.0  # 36,000 steps at 100/s, against 8 minutes
    by_time = dataclasses.replace(STATUS, max_minutes=2.5)
    assert by_time.fraction == 0.8 and by_time.seconds_left == 30.0
    over = dataclasses.replace(STATUS, step=50_000)
    assert over.fraction == 1.0 and over.seconds_left == 0.0
    endless = dataclasses.replace(STATUS, env_steps=None, max_minutes=None)
    assert endless.fraction is None and endless.seconds_left is None
    stalled = dataclasses.replace(STATUS, max_minutes=None, env_steps_per_s=0.0)
    assert stalled.seconds_left is None


def test_durations_read_naturally() -> None:
    spoken = [duration(seconds) for seconds in (None, 0.4, 59.4, 59.6, 200, 3599.6, 7530)]
    assert spoken == ["?", "0s", "59s", "1m00s", "3m20s", "1h00m", "2h05m"]


def test_plain_output_is_one_ascii_line_per_update_without_control_codes() -> None:
    stream = io.StringIO()
    with View(console=Console(file=stream, width=40)) as view:
        view.update(STATUS)
        view.note("checkpoint \x1b[31m[bold]saved[/bold]")
        view.update(dataclasses.replace(STATUS, train_return=None, eval_return=None, eval_ci95=None, alpha=None))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()
    assert lines[0] == plain_line(STATUS) and lines[0].isascii()
    for part in ("step 12,000 (25.0%, 6m00s left)", "return 123.46 (10 episodes)", "eval 150.2 +/- 12.1", "alpha 0.01"):
        assert part in lines[0]
    assert "[bold]saved[/bold]" in lines[1] and "eval - |" in lines[2]


def test_tracked_items_come_through_in_order_with_one_plain_line() -> None:
    stream = io.StringIO()
    assert list(View(console=Console(file=stream)).track(range(1500), "replaying actions")) == list(range(1500))
    assert stream.getvalue() == "replaying actions: 1,500\n"
    terminal = Console(file=io.StringIO(), force_terminal=True)
    with View(console=terminal) as view:
        view.update(STATUS)
        assert list(view.track(range(3), "replaying actions")) == [0, 1, 2]


def test_live_false_gives_plain_lines_on_a_terminal() -> None:
    stream = io.StringIO()
    with View(live=False, console=Console(file=stream, force_terminal=True)) as view:
        view.update(STATUS)
    assert stream.getvalue() == plain_line(STATUS) + "\n"


def test_variables_that_force_colour_put_no_control_codes_into_a_log() -> None:
    program = "from rlplastic.terminal import banner, View; banner([('device', 'cpu', 'é')]); View().note('x')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        env={"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "PYTHONIOENCODING": "ascii", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout == b"device  cpu  ?\nx\n"


def test_banner_aligns_its_columns_and_wraps_nothing() -> None:
    rows = [("device", "cpu", "no accelerator found"), ("replay", "1,000,000 transitions, 1.5 GB", "x" * 200)]
    stream = io.StringIO()
    banner(rows, Console(file=stream, width=40))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].index("no accelerator") == lines[1].index("xxx")
    stream = io.StringIO()
    banner(rows, Console(file=stream, force_terminal=True, width=100))
    assert "no accelerator found" in stream.getvalue() and "\x1b[" in stream.getvalue()
    stream = io.StringIO()
    banner([], Console(file=stream))
    assert stream.getvalue() == ""

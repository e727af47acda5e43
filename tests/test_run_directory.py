"""Run directories: one process at a time, one configuration per name, logs that end where the checkpoint does."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rlplastic.errors import ConfigurationError
from rlplastic.run_directory import MAX_NAME, RunDirectory, default_name, remedy, write_atomically

CONFIG: dict[str, Any] = {
    "env": {"task": "Hopper-v5", "num_envs": None, "kwargs": {}},
    "agent": {"learning_rate": 3e-4, "n_step": 1},
    "tracking": {"every": 1000, "live": True},
    "env_steps": 2000,
    "seed": 0,
}


def changed(**leaves: Any) -> dict[str, Any]:
    """CONFIG with some leaves replaced: ``agent__n_step=3``."""
    config = copy.deepcopy(CONFIG)
    for key, value in leaves.items():
        *path, leaf = key.split("__")
        section = config
        for part in path:
            section = section[part]
        section[leaf] = value
    return config


def open_and_close(root: Path, config: dict[str, Any], **options: Any) -> RunDirectory:
    with RunDirectory.open(root, "run", config, **options) as run:
        return run


def saved_run(root: Path, config: dict[str, Any], **options: Any) -> RunDirectory:
    """The same, leaving a checkpoint behind."""
    run = open_and_close(root, config, **options)
    (run.path / "checkpoints" / "step_000000000001").mkdir(parents=True, exist_ok=True)
    return run


def test_first_open_records_the_configuration_and_the_second_resumes(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "runs", CONFIG)
    assert run.path == tmp_path / "runs" / "run" and run.moved_to is None
    assert OmegaConf.to_container(OmegaConf.load(run.path / "config.yaml")) == CONFIG
    again = open_and_close(tmp_path / "runs", CONFIG)
    assert again.path == run.path and again.moved_to is None and any((again.path / "checkpoints").iterdir())


@pytest.mark.parametrize("leftover", [None, "checkpoints", "checkpoints/.staging_step_000000000001"])
def test_run_that_never_saved_a_checkpoint_does_not_occupy_its_name(tmp_path: Path, leftover: str | None) -> None:
    run = open_and_close(tmp_path, changed(agent__n_step=33))
    if leftover:
        (run.path / leftover).mkdir(parents=True)
    assert open_and_close(tmp_path, CONFIG).moved_to is None
    assert OmegaConf.to_container(OmegaConf.load(run.path / "config.yaml")) == CONFIG
    (run.path / "config.yaml").write_text("agent: [unclosed")
    open_and_close(tmp_path, CONFIG)
    assert OmegaConf.to_container(OmegaConf.load(run.path / "config.yaml")) == CONFIG


def test_other_configuration_is_refused_with_the_difference_and_a_way_out(tmp_path: Path) -> None:
    run = saved_run(tmp_path, CONFIG)
    before = (run.path / "config.yaml").read_text()
    config = changed(agent__n_step=3, env__kwargs={"frame_skip": 2}, env_steps=5)
    with pytest.raises(ConfigurationError) as caught:
        open_and_close(tmp_path, config, ignore={"env_steps"})
    sentence = str(caught.value)
    assert "agent.n_step: 1 -> 3" in sentence and "env.kwargs.frame_skip: (absent) -> 2" in sentence
    assert "name=" in sentence and "fresh=true" in sentence
    assert not any(key in sentence for key in ("env_steps", "seed", "learning_rate"))
    assert caught.value.exit_code == 2 and (run.path / "config.yaml").read_text() == before


def test_ignored_keys_and_sections_do_not_make_a_run_different(tmp_path: Path) -> None:
    saved_run(tmp_path, CONFIG)
    longer = changed(env_steps=4000, tracking__every=10, tracking__live=False)
    run = open_and_close(tmp_path, longer, ignore={"env_steps", "tracking"})
    assert OmegaConf.to_container(OmegaConf.load(run.path / "config.yaml")) == longer
    with pytest.raises(ConfigurationError, match="env_steps: 4000 -> 1"):
        open_and_close(tmp_path, changed(env_steps=1, tracking__every=10), ignore={"tracking", "env", "env_step"})


@settings(max_examples=25, deadline=None)
@given(st.floats(allow_nan=False), st.text(st.characters(codec="utf-8", exclude_characters="${}\\"), max_size=8))
def test_any_value_equals_itself_after_a_rerun(
    tmp_path_factory: pytest.TempPathFactory, number: float, text: str
) -> None:
    root = tmp_path_factory.mktemp("root")
    config = changed(agent__learning_rate=number, env__task=text)
    run = saved_run(root, config)
    assert open_and_close(root, config).path == run.path
    with pytest.raises(ConfigurationError, match=r"env\.task"):
        open_and_close(root, changed(agent__learning_rate=number, env__task=text + "x"))


def test_fresh_moves_the_old_run_aside_and_deletes_nothing(tmp_path: Path) -> None:
    for attempt in range(3):
        run = open_and_close(tmp_path, changed(seed=attempt), fresh=True)
        assert run.moved_to == (tmp_path / f"run.old-{attempt}" if attempt else None)
        (run.path / "policy").write_text(f"trained {attempt}")
    kept = {path.name: (path / "policy").read_text() for path in tmp_path.iterdir()}
    assert kept == {"run": "trained 2", "run.old-1": "trained 0", "run.old-2": "trained 1"}


def test_checkpoints_without_their_configuration_are_not_resumed(tmp_path: Path) -> None:
    run = saved_run(tmp_path, CONFIG)
    (run.path / "config.yaml").write_text("agent: [unclosed")
    with pytest.raises(ConfigurationError, match="cannot be read") as caught:
        open_and_close(tmp_path, CONFIG)
    assert "\n" not in str(caught.value)
    (run.path / "config.yaml").unlink()
    with pytest.raises(ConfigurationError, match=r"no config\.yaml"):
        open_and_close(tmp_path, CONFIG)
    assert open_and_close(tmp_path, CONFIG, fresh=True).moved_to == tmp_path / "run.old-1"


HOLD = """
import os, sys, time
from rlplastic.run_directory import RunDirectory
run = RunDirectory.open(sys.argv[1], "run", {"seed": 0})
if len(sys.argv) > 2 and os.fork() == 0:
    os.write(1, f"{os.getpid()}\\n".encode())  # a worker that outlives its trainer
    time.sleep(60)
os.write(1, f"{os.getpid()}\\n".encode())
time.sleep(60)
"""


def test_second_process_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        pid = int(first.stdout.readline())
        for fresh in (False, True):
            with pytest.raises(
                ConfigurationError, match=f"process {pid} on {re.escape(socket.gethostname())}, started 2"
            ):
                RunDirectory.open(tmp_path, "run", {"seed": 0}, fresh=fresh)
        first.kill()
    open_and_close(tmp_path, {"seed": 0})  # the lock dies with its holder
    holder = json.loads((tmp_path / "run" / "lock").read_text())
    assert holder["pid"] == os.getpid()


def test_worker_that_outlives_a_killed_trainer_does_not_hold_the_lock(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", HOLD, str(tmp_path), "fork"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        worker = ({int(first.stdout.readline()), int(first.stdout.readline())} - {first.pid}).pop()
        first.kill()
        first.wait()
        try:
            open_and_close(tmp_path, {"seed": 0})
        finally:
            os.kill(worker, signal.SIGKILL)


def test_one_process_cannot_open_a_run_twice(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, "run", CONFIG), pytest.raises(ConfigurationError, match=f"process {os.getpid()}"):
        RunDirectory.open(tmp_path, "run", CONFIG)
    open_and_close(tmp_path, CONFIG).close()


def test_failed_open_leaves_no_lock_behind(tmp_path: Path) -> None:
    saved_run(tmp_path, CONFIG)
    with pytest.raises(ConfigurationError, match="another configuration"):
        open_and_close(tmp_path, changed(seed=1))
    open_and_close(tmp_path, CONFIG)


@pytest.mark.parametrize("name", ["../elsewhere", "/absolute", "", "a/../../b"])
def test_name_cannot_leave_the_folder_of_runs(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a name inside"):
        RunDirectory.open(tmp_path, name, CONFIG)


def test_a_disk_too_full_for_the_name_of_the_holder_leaves_no_lock_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    saved_run(tmp_path, CONFIG)
    with monkeypatch.context() as patch, pytest.raises(ConfigurationError, match="free space on the disk") as caught:
        patch.setattr(socket, "gethostname", full)
        RunDirectory.open(tmp_path, "run", CONFIG)
    assert caught.value.__cause__ is not None, "whose frames keep the lock file from being collected"
    RunDirectory.open(tmp_path, "run", CONFIG).close()


def test_place_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        RunDirectory.open(tmp_path / "file", "run", CONFIG)


def test_the_advice_fits_what_went_wrong() -> None:
    assert remedy(OSError(errno.ENOSPC, "No space left on device")) == "free space on the disk"
    assert remedy(PermissionError(errno.EACCES, "Permission denied")) == "mend the permission"
    assert "mount" in remedy(OSError(errno.EROFS, "Read-only file system"))
    assert remedy(OSError("no number")) == "mend that"


def test_an_empty_folder_of_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="runs= is empty"):
        RunDirectory.open("", "run", CONFIG)
    assert list(tmp_path.iterdir()) == []


def refused(root: Path, name: str = "run", leftover: str | None = None, **options: Any) -> None:
    """A run that turns out to be impossible after it has its directory."""
    with pytest.raises(ConfigurationError), RunDirectory.open(root, name, CONFIG, **options) as run:
        run.write("machine.json", "{}")
        if leftover:
            (run.path / leftover).parent.mkdir(exist_ok=True)
            (run.path / leftover).write_text("")
        raise ConfigurationError("no such task")


def test_a_refused_run_leaves_nothing_behind(tmp_path: Path) -> None:
    refused(tmp_path / "runs", "folder/run")
    assert list(tmp_path.iterdir()) == []
    saved_run(tmp_path / "runs", CONFIG)
    refused(tmp_path / "runs", "other")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]


@pytest.mark.parametrize("leftover", ["eval.csv", "checkpoints/step_000000000001", "non_finite_1/report.json"])
def test_a_run_that_saved_or_logged_something_is_never_removed(tmp_path: Path, leftover: str) -> None:
    refused(tmp_path, leftover=leftover)
    assert (tmp_path / "run" / leftover).exists() and (tmp_path / "run" / "config.yaml").exists()


def test_a_refused_run_leaves_a_directory_that_was_there_before(tmp_path: Path) -> None:
    open_and_close(tmp_path, CONFIG)
    refused(tmp_path)
    assert (tmp_path / "run" / "machine.json").exists()
    open_and_close(tmp_path, CONFIG)


def test_a_refused_fresh_run_gives_the_earlier_one_its_place_back(tmp_path: Path) -> None:
    saved_run(tmp_path, CONFIG)
    refused(tmp_path, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "checkpoints" / "step_000000000001").is_dir()
    open_and_close(tmp_path, CONFIG)


def test_an_interrupted_or_crashed_run_keeps_its_directory(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunDirectory.open(tmp_path, "run", CONFIG):
        raise ZeroDivisionError
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_disk_that_is_full_from_the_start_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ConfigurationError, match="free space on the disk"):
        RunDirectory.open(tmp_path / "runs", "run", CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_logs_are_cut_back_to_what_they_were(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, "run", CONFIG) as run:
        event = "events.out.tfevents.1.host.2.0"
        old = {"eval.csv": b"step\n1\n", "plasticity.jsonl": b"{}\n", event: b"\0\1\2", "timing.csv": b"a\n"}
        for name, content in old.items():
            (run.path / name).write_bytes(content)
        lengths = json.loads(json.dumps(run.log_lengths()))
        assert lengths == {name: len(content) for name, content in old.items() if name != "timing.csv"}
        for name in old:
            with open(run.path / name, "ab") as file:
                file.write(b"later\n")
        for name in ("events.out.tfevents.2.host.3.0", "decisions.jsonl"):
            (run.path / name).write_bytes(b"new")
        assert run.cut_back(lengths) == []
        found = {
            path.name: path.read_bytes() for path in run.path.iterdir() if path.name not in ("lock", "config.yaml")
        }
        assert found == old | {"timing.csv": b"a\nlater\n"}


def test_without_a_checkpoint_all_logs_go_and_lost_rows_are_reported(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, "run", CONFIG) as run:
        (run.path / "eval.csv").write_text("step\n")
        warnings = run.cut_back({"eval.csv": 100, "gone.jsonl": 3})
        assert len(warnings) == 2 and "eval.csv has 5 bytes" in warnings[0] and "gone.jsonl is gone" in warnings[1]
        assert run.cut_back({}) == [] and run.log_lengths() == {}
        assert (run.path / "config.yaml").exists()


def test_default_name_reads_like_the_command() -> None:
    assert default_name("humanoid", "flashsac", 3, []) == "humanoid_flashsac_seed3"
    overrides = ["env=humanoid", "seed=3", "replay_ratio=2", "+critic=flow", "fresh=true", "runs=/tmp/x", "name=y"]
    name = default_name("humanoid", "flashsac", 3, overrides)
    assert name == "humanoid_flashsac_seed3_critic=flow_replay_ratio=2"
    assert name == default_name("humanoid", "flashsac", 3, ["critic=flow", "replay_ratio=2"])


def test_overrides_that_look_alike_once_cleaned_get_different_names() -> None:
    names = {default_name("hopper", "flashsac", 0, [f"a=x{separator}y"]) for separator in "-/, +"}
    assert len(names) == 5 and default_name("hopper", "flashsac", 0, ["a=x-y"]) == "hopper_flashsac_seed0_a=x-y"


override = st.tuples(st.sampled_from(["a", "env.task", "critic", "env.kwargs.x"]), st.text(max_size=40)).map("=".join)


@given(st.lists(override, max_size=6), st.lists(override, max_size=6))
def test_default_names_are_safe_short_and_differ_when_overrides_do(first: list[str], second: list[str]) -> None:
    one, two = default_name("hopper", "flashsac", 0, first), default_name("hopper", "flashsac", 0, second)
    for name in (one, two):
        assert len(name) <= MAX_NAME and re.fullmatch(r"hopper_flashsac_seed0[A-Za-z0-9._=-]*", name)
    # The last of several overrides of one key wins, as on the command line.
    same = dict(item.split("=", 1) for item in first) == dict(item.split("=", 1) for item in second)
    assert (one == two) == same


def test_atomic_write_replaces_or_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.yaml"
    write_atomically(file, "old é")
    assert file.read_text(encoding="utf-8") == "old é"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(file, "new")
    assert file.read_text(encoding="utf-8") == "old é" and list(tmp_path.iterdir()) == [file]
    write_atomically(file, "new")
    assert file.read_text() == "new"


def test_other_files_of_a_run_are_written_whole_or_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunDirectory.open(tmp_path, "run", CONFIG) as run:
        run.write("plan.md", "first é")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ConfigurationError, match=r"No space left on device.*free space.*runs=") as caught:
            run.write("plan.md", "second")
        assert "permission" not in str(caught.value)
        assert (run.path / "plan.md").read_text(encoding="utf-8") == "first é"

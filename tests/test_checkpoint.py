"""Checkpoints: bit-exact round trips, damage that is always noticed, and no instant without a good one."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save
from torch import Tensor

from rlplastic import checkpoint_format
from rlplastic.checkpoint import Checkpoint, CheckpointStore, Loaded
from rlplastic.checkpoint_format import DTYPE_CODES, FORMAT_VERSION, render_manifest
from rlplastic.errors import CheckpointError, CheckpointWriteError, ConfigurationError, NonFiniteError

DTYPES = list(DTYPE_CODES)


def segment(step: int) -> dict[str, Tensor]:
    return {"observation": torch.full((5, 3), float(step)), "valid": torch.arange(5) % 2 == 0}


def save_step(store: CheckpointStore, step: int, kept: Checkpoint | None = None, salt: int = 0) -> Checkpoint:
    """A checkpoint whose every part follows from ``step``, sharing the segments of ``kept``."""
    return store.save(
        step,
        {"agent": {"weight": torch.full((4, 4), float(step)), "count": torch.tensor(step)}},
        {"progress": {"step": step, "salt": salt}},
        new_segments=[segment(step)],
        kept_segments=kept.segments if kept else (),
        check_finite=["agent"],
    )


def check_step(loaded: Loaded | None) -> int:
    """Every part of ``loaded`` follows from one step, its last segment included; returns that step."""
    assert loaded is not None
    step = loaded.step
    tensors = loaded.tensors("agent")
    assert tensors["count"].item() == step and torch.equal(tensors["weight"], torch.full((4, 4), float(step)))
    assert loaded.documents["progress"]["step"] == step
    assert torch.equal(list(loaded.segments())[-1]["observation"], segment(step)["observation"])
    return step


def same_bits(a: Tensor, b: Tensor) -> bool:
    def raw(tensor: Tensor) -> bytes:
        return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())

    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=5),
    st.integers(0, 2**32),
)
@settings(max_examples=30, deadline=None)
def test_every_dtype_and_shape_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, list[int]]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, (dtype, shape) in enumerate(kinds):
        count = int(torch.tensor(shape).prod()) if shape else 1
        high = 2 if dtype == torch.bool else 256
        raw = torch.randint(0, high, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
        tensors[f"t.{index}"] = raw.view(dtype).reshape(shape)
    directory = tmp_path_factory.mktemp("store")
    CheckpointStore(directory, 1).save(1, {"all": tensors}, {})
    loaded = CheckpointStore(directory, 1).newest()
    assert loaded is not None
    found = loaded.tensors("all")
    assert found.keys() == tensors.keys() and all(same_bits(found[name], tensors[name]) for name in tensors)


def test_written_file_means_the_same_to_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.tensor([True, False, True]), "c": torch.randn(2).bfloat16()}
    CheckpointStore(tmp_path, 1).save(1, {"group": tensors}, {})
    ours = load_file(tmp_path / "step_000000000001" / "group.safetensors")
    (tmp_path / "theirs").write_bytes(save(tensors))
    theirs = load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(same_bits(ours[name], theirs[name]) for name in theirs)


def test_views_and_shared_memory_and_parameters_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(torch.randn(3))
    tensors = {
        "transposed": base.T,
        "strided": base[:, ::2],
        "same": base,
        "again": base,
        "row": base[1],
        "expanded": torch.tensor(2.0).expand(3),
        "scalar": torch.tensor(7, dtype=torch.int32),
        "parameter": parameter,
    }
    CheckpointStore(tmp_path, 1).save(1, {"group": tensors}, {})
    loaded = CheckpointStore(tmp_path, 1).newest()
    assert loaded is not None
    found = loaded.tensors("group")
    assert all(same_bits(found[name], tensor.detach()) for name, tensor in tensors.items())
    assert not found["parameter"].requires_grad


def test_documents_come_back_equal_floats_included(tmp_path: Path) -> None:
    document = {"credit": 0.1 + 0.2, "list": [1, None, True, "é"], "big": 2**70, "tiny": 5e-324, "deep": {"a": {}}}
    CheckpointStore(tmp_path, 1).save(1, {}, {"state": document})
    loaded = CheckpointStore(tmp_path, 1).newest()
    assert loaded is not None and loaded.documents == {"state": document}


def test_compiler_prefix_never_reaches_the_file(tmp_path: Path) -> None:
    compiled = {"_orig_mod.body.weight": torch.ones(2), "head._orig_mod.bias": torch.zeros(1)}
    CheckpointStore(tmp_path, 1).save(1, {"actor": compiled}, {})
    loaded = CheckpointStore(tmp_path, 1).newest()
    assert loaded is not None and set(loaded.tensors("actor")) == {"body.weight", "head.bias"}
    with pytest.raises(CheckpointWriteError, match="taken"):
        CheckpointStore(tmp_path, 1).save(2, {"actor": {"w": torch.ones(1), "_orig_mod.w": torch.ones(1)}}, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_state_is_never_saved(tmp_path: Path, bad: float, dtype: torch.dtype) -> None:
    store = CheckpointStore(tmp_path, 1)
    save_step(store, 1)
    before = snapshot(tmp_path)
    tensors = {"fine": torch.ones(3), "count": torch.tensor(3), "weight": torch.tensor([1.0, bad], dtype=dtype)}
    with pytest.raises(NonFiniteError, match="'weight' of 'actor'"):
        store.save(2, {"actor": tensors}, {}, check_finite=["actor"])
    with pytest.raises(NonFiniteError, match="document 'state'"):
        store.save(2, {}, {"state": {"scale": bad}})
    assert snapshot(tmp_path) == before
    store.save(2, {"diagnostics": tensors}, {})  # only the named groups are checked


@pytest.mark.parametrize(
    ("tensors", "documents"),
    [
        ({"g": {"z": torch.zeros(2, dtype=torch.complex64)}}, {}),
        ({"g": {"z": torch.zeros(2, 2).to_sparse()}}, {}),
        ({"g": {"__metadata__": torch.zeros(2)}}, {}),
        ({"../g": {"z": torch.zeros(2)}}, {}),
        ({}, {"manifest": {}}),
        ({}, {"state": {1: 2}}),
        ({}, {"state": [{"deep": {1: 2}}]}),
        ({}, {"state": torch.zeros(2)}),
    ],
)
def test_what_would_not_come_back_the_same_is_refused(tmp_path: Path, tensors: Any, documents: Any) -> None:
    with pytest.raises(CheckpointWriteError):
        CheckpointStore(tmp_path, 1).save(1, tensors, documents)
    assert snapshot(tmp_path) == {}


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_rotation_keeps_the_newest_and_the_segments_they_list(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    last = None
    for step in range(1, 5):
        last = save_step(store, step, last)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_000000000003", "step_000000000004"]
    loaded = store.newest()
    assert loaded is not None and last is not None and loaded.segment_references == last.segments
    order = [int(values["observation"][0, 0]) for values in loaded.segments()]
    assert order == [1, 2, 3, 4]
    # A ring that dropped its oldest rows lists fewer segments: they go once no checkpoint lists them.
    store.save(5, {}, {}, kept_segments=last.segments[2:])
    store.save(6, {}, {}, kept_segments=last.segments[2:])
    assert {path.name for path in (tmp_path / "segments").iterdir()} == {item.name for item in last.segments[2:]}


def test_shared_segments_are_not_written_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 3)
    first = save_step(store, 1)
    path = tmp_path / "segments" / first.segments[0].name
    inode = path.stat().st_ino
    second = store.save(2, {}, {}, kept_segments=first.segments)
    assert path.stat().st_ino == inode and second.bytes_written < first.bytes_written


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    save_step(store, 1, salt=1)
    save_step(store, 1, salt=2)
    loaded = store.newest()
    assert loaded is not None and loaded.documents["progress"]["salt"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"step_000000000001", "segments"}


def test_replacement_killed_between_two_renames_leaves_the_old_one_usable(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    save_step(store, 1)
    old = tmp_path / "step_000000000001"
    old.rename(tmp_path / "step_000000000001.replaced")
    assert check_step(store.newest()) == 1
    save_step(store, 2)
    assert {path.name for path in tmp_path.glob("step_*")} == {"step_000000000001", "step_000000000002"}


def test_empty_store_has_no_newest(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "none", 1).newest() is None
    (tmp_path / ".staging_step_000000000001").mkdir()
    assert CheckpointStore(tmp_path, 1).newest() is None
    with pytest.raises(ConfigurationError, match="keep"):
        CheckpointStore(tmp_path, 0)


def files_of_newest(directory: Path) -> list[Path]:
    newest = max(directory.glob("step_*"))
    shared = json.loads((min(directory.glob("step_*")) / "manifest.json").read_text())["segments"]
    old = {item["name"] for item in shared}
    return sorted(newest.iterdir()) + [path for path in (directory / "segments").iterdir() if path.name not in old]


def damage(path: Path, way: str, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if way == "missing":
        path.unlink()
        return
    if way == "flipped":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif way == "longer":
        content += b"\0"
    else:
        del content[0 if way == "emptied" else chance.randrange(len(content)) :]
    path.write_bytes(content)


@pytest.mark.parametrize("way", ["flipped", "truncated", "emptied", "longer", "missing"])
@pytest.mark.parametrize("which", range(4))
def test_damage_to_any_file_is_named_and_the_previous_checkpoint_is_used(tmp_path: Path, way: str, which: int) -> None:
    chance = random.Random(which)
    for attempt in range(12 if way in ("flipped", "truncated") else 1):
        directory = tmp_path / str(attempt)
        store = CheckpointStore(directory, 2)
        save_step(store, 2, save_step(store, 1))
        files = files_of_newest(directory)
        assert len(files) == 4  # a group, a document, the manifest, a segment
        damage(files[which], way, chance)
        heard: list[str] = []
        reader = CheckpointStore(directory, 2, warn=heard.append)
        assert check_step(reader.newest()) == 1
        assert len(reader.skipped) == 1 and str(files[which]) in reader.skipped[0]
        assert len(heard) == 1 and str(files[which]) in heard[0]


def test_any_single_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    store.save(1, {}, {})
    file = tmp_path / "step_000000000001" / "manifest.json"
    content = file.read_bytes()
    for position in range(0, len(content) * 8, 5):  # 5 and 8 are coprime: every bit of a byte gets its turn
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            store.newest()


def test_without_a_good_checkpoint_all_are_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    save_step(store, 2, save_step(store, 1))
    for directory in tmp_path.glob("step_*"):
        (directory / "agent.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        store.newest()
    assert caught.value.exit_code == 4
    assert "step_000000000001" in str(caught.value) and "step_000000000002" in str(caught.value)


def test_other_format_version_is_an_error_that_names_both(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    save_step(store, 2, save_step(store, 1))
    file = tmp_path / "step_000000000002" / "manifest.json"
    body = json.loads(file.read_text())
    del body["checksum"]
    body["format"] = FORMAT_VERSION + 6
    file.write_bytes(render_manifest(body))
    with pytest.raises(CheckpointError, match=f"version {FORMAT_VERSION + 6} .*version {FORMAT_VERSION}:"):
        store.newest()


def test_damaged_newer_checkpoint_never_pushes_out_the_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 1)
    save_step(store, 30)
    (tmp_path / "kept_away").mkdir()
    (tmp_path / "step_000000000030").rename(tmp_path / "kept_away" / "later")
    save_step(store, 20)
    (tmp_path / "kept_away" / "later").rename(tmp_path / "step_000000000030")
    (tmp_path / "step_000000000030" / "progress.json").write_text("{}")
    resumed = CheckpointStore(tmp_path, 1)
    assert check_step(resumed.newest()) == 20
    save_step(resumed, 25)
    assert check_step(CheckpointStore(tmp_path, 1).newest()) == 25
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_000000000025"]


def test_load_opens_the_given_checkpoint_and_names_what_it_lacks(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    first = save_step(store, 1)
    save_step(store, 2, first)
    assert check_step(CheckpointStore.load(first.path)) == 1
    with pytest.raises(CheckpointError, match="'agnt'; did you mean 'agent'"):
        CheckpointStore.load(first.path).tensors("agnt")
    with pytest.raises(CheckpointError, match="nowhere"):
        CheckpointStore.load(tmp_path / "nowhere")


class FullDisk:
    """Replaces `open`: files that are written take ``room`` bytes in all, then the disk is full."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path: Path, mode: str = "r") -> Any:
        file: Any = io.open(path, mode)  # noqa: UP020, SIM115 - the name `open` is what is replaced
        if "x" in mode:
            write = file.write
            disk = self

            class Limited:
                def __enter__(self) -> Limited:
                    return self

                def __exit__(self, *_: object) -> None:
                    file.close()

                def write(self, chunk: Any) -> int:
                    disk.room -= len(chunk)
                    if disk.room < 0:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
                    return int(write(chunk))

                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

            return Limited()
        return file


def test_full_disk_is_one_sentence_and_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, 1)
    first = save_step(store, 1)
    before = snapshot(tmp_path)
    # Twice the real size: rooms from nothing to just short of enough stop the save inside every file.
    for room in range(0, first.bytes_written - 8, 97):
        monkeypatch.setattr(checkpoint_format, "open", FullDisk(room), raising=False)
        with pytest.raises(CheckpointWriteError, match="No space left on device"):
            save_step(store, 2, first)
        assert snapshot(tmp_path) == before
    monkeypatch.setattr(checkpoint_format, "open", FullDisk(10 * first.bytes_written), raising=False)
    save_step(store, 2, first)
    assert check_step(store.newest()) == 2


@pytest.mark.parametrize("step", [1, 2])
def test_failure_of_any_rename_or_flush_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Every system call of a save fails once; saving anew (2) and replacing (1) both leave the first checkpoint."""
    store = CheckpointStore(tmp_path, 2)
    first = save_step(store, 1)
    before = snapshot(tmp_path)
    failures = 0
    for fatal in range(100):
        calls = 0
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (Path, "replace"), (os, "fsync")):
                original = getattr(owner, name)

                def failing(*arguments: Any, original: Any = original, fatal: int = fatal) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == fatal + 1:
                        raise OSError(errno.EIO, "Input/output error")
                    return original(*arguments)

                patch.setattr(owner, name, failing)
            try:
                save_step(store, step, first, salt=step)
            except CheckpointWriteError:
                failures += 1
            else:
                break
        assert snapshot(tmp_path) == before
    assert failures > 8 and check_step(store.newest()) == step


def test_checkpoint_stops_being_one_before_its_first_file_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, 1)
    save_step(store, 1)

    def half(path: Path, ignore_errors: bool = False) -> None:
        if path.exists():
            min(path.iterdir()).unlink()
            raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("rlplastic.checkpoint.shutil.rmtree", half)
        save_step(store, 2)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_000000000002"]
    save_step(store, 3)
    assert not list(tmp_path.glob(".*"))


def test_failure_to_remove_old_checkpoints_is_only_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    store = CheckpointStore(tmp_path, 1, warn=heard.append)
    save_step(store, 1)

    def stuck(path: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(store, "_discard", stuck)
    save_step(store, 2)
    assert check_step(store.newest()) == 2 and len(heard) == 1 and "could not be removed" in heard[0]


def test_limit_on_file_size_in_a_real_process_is_reported(tmp_path: Path) -> None:
    save_step(CheckpointStore(tmp_path, 1), 1)
    before = snapshot(tmp_path)
    program = (
        "import sys, torch; from pathlib import Path; from rlplastic.checkpoint import CheckpointStore\n"
        "CheckpointStore(Path(sys.argv[1]), 1).save(2, {'big': {'w': torch.zeros(100_000)}}, {})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
        check=False,
    )
    assert done.returncode == 1 and "CheckpointWriteError" in done.stderr and "File too large" in done.stderr
    assert snapshot(tmp_path) == before


def save_forever(directory: Path, say: int) -> None:
    """Resume as a run does and save until killed, every step twice; ``say`` is a pipe that hears of complete ones."""
    store = CheckpointStore(directory, 2)
    last = store.newest()
    kept = last.segment_references[-3:] if last else ()
    for step in itertools.count(last.step + 1 if last else 1):
        for salt in range(2):
            tensors = {"agent": {"weight": torch.full((4, 4), float(step)), "count": torch.tensor(step)}}
            documents = {"progress": {"step": step, "salt": salt}}
            made = store.save(step, tensors, documents, new_segments=[segment(step)], kept_segments=kept)
        kept = made.segments[-3:]
        os.write(say, f"{step}\n".encode())


@pytest.mark.filterwarnings("ignore:This process")
def test_kill_at_any_instant_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(0)
    store = CheckpointStore(tmp_path, 2)
    reached = 0
    for _ in range(40):
        hear, say = os.pipe()
        child = os.fork()  # a new interpreter would spend seconds importing torch before it can be killed
        if child == 0:
            try:
                save_forever(tmp_path, say)
            finally:
                os._exit(1)
        os.close(say)
        with open(hear) as pipe:
            first = pipe.readline()  # the killing starts when the saving does
            time.sleep(chance.uniform(0, 0.05))
            os.kill(child, signal.SIGKILL)
            said = [int(word) for word in (first + pipe.read()).split()]
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the saving process failed by itself"
        step = check_step(store.newest())
        for path in tmp_path.glob("step_*"):  # half-removed old ones must not pass for checkpoints either
            check_step(CheckpointStore.load(path))
        assert step >= said[-1] > reached
        reached = step
    save_step(store, reached + 1)
    assert not list(tmp_path.glob(".*")) and len(list(tmp_path.glob("step_*"))) == 2

"""Training on several ranks as a user starts it: torchrun, gloo, processes that are killed, stopped and restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_runs import SMALL, final_state, run

from rlplastic import diagnose_run

RUN = [*SMALL, "name=run", "distributed.timeout=60"]
PATIENCE = 240.0
"""Seconds that a busy machine may take."""


def torchrun(folder: Path, *overrides: str, ranks: int = 2, flags: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    chosen = {override.partition("=")[0] for override in overrides}
    plain = [override for override in RUN if override.partition("=")[0] not in chosen]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *flags]
    return subprocess.Popen(
        [*command, "-m", "rlplastic.train", *plain, f"runs={folder}", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return output


def trained(folder: Path, *overrides: str, ranks: int = 2, flags: tuple[str, ...] = ()) -> str:
    process = torchrun(folder, *overrides, ranks=ranks, flags=flags)
    output = finish(process)
    assert process.returncode == 0, output
    return output


def states(folder: Path) -> list[dict[str, object]]:
    """The state that each of two ranks ended with; the second has no eval.csv, networks or counters."""
    (folder / "run" / "rank_1" / "eval.csv").touch()
    for checkpoint in (folder / "run" / "rank_1" / "checkpoints").glob("step_*"):
        (checkpoint / "progress.json").write_text('{"train_seconds": 0}')
    return [final_state(folder / "run"), final_state(folder / "run" / "rank_1")]


def wait_for(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.02)


def step_of(folder: Path) -> int:
    """Of the newest committed checkpoint; 0 without one."""
    found = (folder / "run" / "checkpoints").glob("step_*")
    return max((int(path.name.split("_")[1].split(".")[0]) for path in found), default=0)


def process_of_rank(folder: Path, rank: int) -> int:
    lock = folder / "run" / (f"rank_{rank}/lock" if rank else "lock")
    pid: int = json.loads(lock.read_text())["pid"]
    return pid


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, object]]]:
    """What two ranks end with if nobody disturbs them."""
    folder = tmp_path_factory.mktemp("reference")
    output = trained(folder)
    assert output.count("evaluation at step 600") == 1, "only the first rank tells"
    yield states(folder)


@pytest.mark.slow
def test_the_same_command_gives_the_same_bits_on_every_rank(tmp_path: Path, reference: list[dict[str, object]]) -> None:
    trained(tmp_path)
    assert states(tmp_path) == reference
    assert reference[0]["replay"] != reference[1]["replay"]
    assert reference[0]["progress"]["transitions"] == 600  # type: ignore[index]
    # a verb that reads the replay reads that of all ranks
    assert "after 99 updates" in diagnose_run(tmp_path / "run", rows=32, probe_steps=0).subject


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_the_same_command_goes_on_bit_for_bit(
    tmp_path: Path, rank: int, reference: list[dict[str, object]]
) -> None:
    process = torchrun(tmp_path)
    wait_for(lambda: step_of(tmp_path) >= 300 or process.poll() is not None)
    os.kill(process_of_rank(tmp_path, rank), signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 1 and f"rank {1 - rank} of 2 lost the others" in output
    assert step_of(tmp_path) >= 300
    assert "exact:" in trained(tmp_path)
    assert states(tmp_path) == reference


@pytest.mark.slow
def test_torchrun_restarts_all_ranks_from_the_last_checkpoint(
    tmp_path: Path, reference: list[dict[str, object]]
) -> None:
    """Even with fresh=true, which is about what lay there before."""
    process = torchrun(tmp_path, "fresh=true", flags=("--max-restarts=1",))
    wait_for(lambda: step_of(tmp_path) >= 300 or process.poll() is not None)
    os.kill(process_of_rank(tmp_path, 1), signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    assert "exact:" in output and not (tmp_path / "run.old-1").exists()
    assert states(tmp_path) == reference


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_within_the_time_out(tmp_path: Path) -> None:
    process = torchrun(tmp_path, "distributed.timeout=5")
    wait_for(lambda: step_of(tmp_path) >= 200 or process.poll() is not None)
    hung = process_of_rank(tmp_path, 1)
    os.kill(hung, signal.SIGSTOP)
    other = process_of_rank(tmp_path, 0)
    began = time.monotonic()
    wait_for(lambda: not _runs(other))
    assert time.monotonic() - began < 30
    os.kill(hung, signal.SIGKILL)  # torchrun would do so after half a minute
    assert "rank 0 of 2 lost the others" in finish(process) and process.returncode == 1


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_on_all_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, reference: list[dict[str, object]]
) -> None:
    process = torchrun(tmp_path)
    wait_for(lambda: step_of(tmp_path) >= 200 or process.poll() is not None)
    os.kill(process_of_rank(tmp_path, 1), signal.SIGTERM)
    output = finish(process)
    assert process.returncode != 0 and "and saved; rerun the same command to resume" in output
    trained(tmp_path)
    assert states(tmp_path) == reference


@pytest.mark.slow
def test_two_ranks_become_one_and_two_again(tmp_path: Path) -> None:
    trained(tmp_path, "env_steps=300")
    alone = run(*RUN, "env_steps=400", f"runs={tmp_path}")
    assert alone.returncode == 0, alone.stderr
    assert "another number of ranks wrote the checkpoint" in alone.stderr
    assert "another number of ranks wrote the checkpoint" in trained(tmp_path, "env_steps=500")
    assert "exact:" in trained(tmp_path, "env_steps=600")
    assert step_of(tmp_path) == 600


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["agent=sac"], ["critic=flow"], ["distributed.bn_sync=forward", "distributed.scale_batch=true"]]
)
def test_every_agent_and_kind_of_synchronisation_trains(tmp_path: Path, options: list[str]) -> None:
    trained(tmp_path, "env_steps=300", *options)
    assert step_of(tmp_path) == 300


@pytest.mark.slow
def test_interventions_and_an_adaptive_replay_ratio_keep_ranks_identical(tmp_path: Path) -> None:
    """The ranks compare their networks at every log; every network counts as ill, and every branch as good enough."""
    treating = ["monitor.probe_steps=5", "monitor.budget=100", "monitor.ill=0.001", "monitor.ill_gap=-2"]
    treating += ["monitor.healthy=1000", "monitor.value_margin=1000", "monitor.rank_margin=2"]
    treating += ["monitor.verify_updates=10"]
    pacing = ["replay_ratio=adaptive", "adaptive.window=100", "replay.holdout=0.3"]
    trained(tmp_path, "monitor=full", *treating, *pacing)
    lines = (tmp_path / "run" / "plasticity.jsonl").read_text().splitlines()
    events = {json.loads(line)["event"] for line in lines}
    assert {"probe", "branch", "committed", "replay_ratio"} <= events


@pytest.mark.slow
def test_what_is_refused_ends_all_ranks_at_once(tmp_path: Path) -> None:
    process = torchrun(tmp_path, "env.num_envs=3")
    output = finish(process)
    assert process.returncode == 1 and "env.num_envs=3 cannot be dealt out to 2 ranks" in output

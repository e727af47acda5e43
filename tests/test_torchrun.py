"""Training on several ranks as a user starts it: torchrun, gloo, processes that are killed, stopped and restarted."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from small_runs import run
from started_ranks import RUN, Job, process_of_rank, runs, states, step_of, torchrun, trained, wait_for

from rlplastic import diagnose_run

KILLS = 10
LONG = "env_steps=1000"
"""What lasts for some kills."""
TELLING = """
import hashlib, sys
from rlplastic import training
from rlplastic.command_line import run_verb
loop = training.train
def train(session, reporter):
    loop(session, reporter)
    digest = hashlib.sha256()
    for name, value in session.agent.state_dict().items():
        if name not in session.agent.COLUMNS:
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
    print(f"\\n{session.agent.updates} updates led to {digest.hexdigest()}\\n", end="", flush=True)
training.train = train
sys.exit(run_verb(training.train_agent, sys.argv[1:]))
"""
"""A program that trains, and tells what every rank's networks and optimizers ended as."""


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
    job = torchrun(tmp_path)
    wait_for(lambda: step_of(tmp_path) >= 300 or job.ended)
    os.kill(process_of_rank(tmp_path, rank), signal.SIGKILL)
    output = job.finish()
    assert job.process.returncode == 1 and f"rank {1 - rank} of 2 lost the others" in output
    assert step_of(tmp_path) >= 300
    assert "exact:" in trained(tmp_path)
    assert states(tmp_path) == reference


@pytest.mark.slow
def test_torchrun_restarts_all_ranks_from_the_last_checkpoint(
    tmp_path: Path, reference: list[dict[str, object]]
) -> None:
    """Even with fresh=true, which is about what lay there before."""
    job = torchrun(tmp_path, "fresh=true", flags=("--max-restarts=1",))
    wait_for(lambda: step_of(tmp_path) >= 300 or job.ended)
    os.kill(process_of_rank(tmp_path, 1), signal.SIGKILL)
    output = job.finish()
    assert job.process.returncode == 0, output
    assert "exact:" in output and not (tmp_path / "run.old-1").exists()
    assert states(tmp_path) == reference


@pytest.fixture(scope="module")
def long_reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("long_reference")
    trained(folder, LONG)
    return states(folder)


def kill_at_random(folder: Path, job: Job, rng: random.Random, seen: set[int]) -> str:
    """Kill a rank of the start after those ``seen``: once in four times while it sets up, else after up to two more
    checkpoints, which a busy machine takes its time for."""
    wait_for(lambda: job.ended or len(set(job.ranks().values()) - seen) == 2)
    pids, rank, learning, more = job.ranks(), rng.randrange(2), rng.random() > 0.25, rng.randrange(3)
    seen.update(pids.values())
    before, banners = step_of(folder), job.output.count("samples per transition")
    if learning:
        wait_for(lambda: job.ended or not runs(pids[0]) or job.output.count("samples per transition") > banners)
        wait_for(lambda: job.ended or not runs(pids[0]) or step_of(folder) >= before + 100 * more)
    time.sleep(rng.uniform(0.0, 0.5 if learning else 6.0))
    committed = step_of(folder)
    if job.ended:
        return f"ended before it was killed | {committed}"
    with suppress(ProcessLookupError):
        os.kill(pids[rank], signal.SIGKILL)
    return f"rank {rank}, {'learning' if learning else 'setting up'} | {committed}"


def resumed_from(output: str) -> list[int]:
    """The checkpoints that starts went on from."""
    return [int(step) for step in re.findall(r"step_(\d+), exact:", output)]


def is_beginning(folder: Path, reference: list[dict[str, object]]) -> bool:
    """Whether all whole rows of eval.csv are the first rows of the undisturbed run's."""
    table = folder / "run" / "eval.csv"
    rows = table.read_text() if table.exists() else ""
    return str(reference[0]["eval.csv"]).startswith(rows[: rows.rfind("\n") + 1])


@pytest.mark.slow
def test_ten_kills_of_random_ranks_at_random_moments_change_nothing_if_the_command_is_rerun(
    tmp_path: Path, long_reference: list[dict[str, object]]
) -> None:
    rng = random.Random(0)
    for number in range(KILLS):
        committed = step_of(tmp_path)
        job = torchrun(tmp_path, LONG)
        told = kill_at_random(tmp_path, job, rng, set())
        output = job.finish()
        resumed = resumed_from(output)
        print(f"| {number + 1} | {told} | {step_of(tmp_path)} | {resumed[0] if resumed else '-'} |")
        assert resumed in ([], [committed]) and step_of(tmp_path) >= committed
        assert is_beginning(tmp_path, long_reference)
        assert job.process.returncode in ((0, 1) if "checkpoint: " in output else (1,)), output
    committed = step_of(tmp_path)
    assert committed == 1000 or resumed_from(trained(tmp_path, LONG)) == [committed] * (committed > 0)
    assert states(tmp_path) == long_reference


@pytest.mark.slow
def test_ten_kills_of_random_ranks_at_random_moments_change_nothing_if_torchrun_restarts_them(
    tmp_path: Path, long_reference: list[dict[str, object]]
) -> None:
    rng, seen = random.Random(1), set[int]()
    job = torchrun(tmp_path, LONG, "fresh=true", flags=(f"--max-restarts={KILLS}",))
    committed = []
    for number in range(KILLS):
        print(f"| {number + 1} | {kill_at_random(tmp_path, job, rng, seen)} |")
        committed.append(step_of(tmp_path))
        assert is_beginning(tmp_path, long_reference)
    output = job.finish()
    assert job.process.returncode == 0, output
    resumed = resumed_from(output)
    print(f"went on from {resumed}")
    assert resumed == sorted(resumed) and resumed[-1] >= committed[-1]
    assert states(tmp_path) == long_reference


@pytest.mark.slow
def test_a_rank_that_hangs_ends_all_within_the_time_out(tmp_path: Path) -> None:
    job = torchrun(tmp_path, "distributed.timeout=5")
    wait_for(lambda: step_of(tmp_path) >= 200 or job.ended)
    hung = process_of_rank(tmp_path, 1)
    os.kill(hung, signal.SIGSTOP)
    other = process_of_rank(tmp_path, 0)
    began = time.monotonic()
    wait_for(lambda: not runs(other))
    assert time.monotonic() - began < 30
    os.kill(hung, signal.SIGKILL)  # torchrun would do so after half a minute
    assert "rank 0 of 2 lost the others" in job.finish() and job.process.returncode == 1


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_on_all_and_the_run_goes_on_bit_for_bit(
    tmp_path: Path, reference: list[dict[str, object]]
) -> None:
    job = torchrun(tmp_path)
    wait_for(lambda: step_of(tmp_path) >= 200 or job.ended)
    os.kill(process_of_rank(tmp_path, 1), signal.SIGTERM)
    output = job.finish()
    assert job.process.returncode != 0 and "and saved; rerun the same command to resume" in output
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
def test_four_ranks_are_identical_after_interventions_and_changes_of_the_replay_ratio(tmp_path: Path) -> None:
    """Every network counts as ill, and every branch as good enough."""
    program = tmp_path / "telling.py"
    program.write_text(TELLING)
    treating = ["monitor.probe_steps=5", "monitor.budget=100", "monitor.ill=0.001", "monitor.ill_gap=-2"]
    treating += ["monitor.healthy=1000", "monitor.value_margin=1000", "monitor.rank_margin=2"]
    treating += ["monitor.verify_updates=10"]
    pacing = ["replay_ratio=adaptive", "adaptive.window=50"]
    overrides = ["env_steps=800", "replay.holdout=0.3", "monitor=full", *treating, *pacing]
    output = trained(tmp_path, *overrides, ranks=4, program=[str(program)])
    ends = re.findall(r"(\d+) updates led to (\w+)", output)
    assert len(ends) == 4 and len(set(ends)) == 1 and int(ends[0][0]) >= 200, ends
    lines = (tmp_path / "run" / "plasticity.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert {"probe", "branch", "committed"} <= {record["event"] for record in records}
    assert len({record["ratio"] for record in records if record["event"] == "replay_ratio"}) > 2


@pytest.mark.slow
def test_what_is_refused_ends_all_ranks_at_once(tmp_path: Path) -> None:
    job = torchrun(tmp_path, "env.num_envs=3")
    output = job.finish()
    assert job.process.returncode == 1 and "env.num_envs=3 cannot be dealt out to 2 ranks" in output

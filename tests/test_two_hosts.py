"""Training on two hosts: network namespaces with a cable between them, which share a folder as hosts share a disk."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from started_ranks import Job, process_of_rank, runs, states, step_of, torchrun, trained, wait_for

TIMEOUT = 15
"""Seconds that a rank waits for the other."""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def host(number: int) -> str:
    return f"rlplastic-{os.getpid()}-{number}"


def switch(state: str) -> None:
    """Plug the cable of the second host in (up) or out (down)."""
    ip("-n", host(1), "link", "set", "cable1", state)


@pytest.fixture(scope="module")
def cable() -> Iterator[None]:
    """Two hosts, 10.77.0.1 and 10.77.0.2, that reach nothing but each other."""
    try:
        if shutil.which("ip") is None:
            pytest.skip("needs ip (iproute2)")
        try:
            for number in range(2):
                ip("netns", "add", host(number))
                ip("-n", host(number), "link", "set", "lo", "up")
            ip("-n", host(0), "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", host(1))
            for number in range(2):
                ip("-n", host(number), "address", "add", f"10.77.0.{number + 1}/24", "dev", f"cable{number}")
                ip("-n", host(number), "link", "set", f"cable{number}", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not allowed here: {error.stderr.decode().strip()}")
        yield
    finally:
        for number in range(2):
            subprocess.run(["ip", "netns", "delete", host(number)], check=False, capture_output=True)


@pytest.fixture
def start(cable: None, tmp_path: Path) -> Iterator[Callable[..., list[Job]]]:
    """A function that starts one rank on each host; what is left of them at the end is killed."""
    jobs: list[Job] = []

    def torchruns(*overrides: str, flags: tuple[str, ...] = ()) -> list[Job]:
        both = [
            torchrun(
                tmp_path,
                f"distributed.timeout={TIMEOUT}",
                *overrides,
                ranks=1,
                # the machine's own name leads to neither address, so who is the first host has to be said
                flags=[
                    "--nnodes=2",
                    "--rdzv-backend=c10d",
                    "--rdzv-endpoint=10.77.0.1:29500",
                    f"--rdzv-conf=is_host={int(number == 0)}",
                    f"--local-addr=10.77.0.{number + 1}",
                    *flags,
                ],
                before=["ip", "netns", "exec", host(number)],
                variables={"GLOO_SOCKET_IFNAME": f"cable{number}"},
            )
            for number in range(2)
        ]
        jobs.extend(both)
        return both

    yield torchruns
    for job in jobs:
        for pid in (*job.ranks().values(), job.process.pid) if not job.ended else ():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What two ranks of one host end with if nobody disturbs them."""
    folder = tmp_path_factory.mktemp("reference")
    trained(folder)
    return states(folder)


@pytest.mark.slow
def test_two_hosts_learn_what_two_ranks_of_one_host_do(
    start: Callable[..., list[Job]], tmp_path: Path, reference: list[dict[str, object]]
) -> None:
    outputs = [job.finish() for job in start()]
    assert "evaluation at step 600" in outputs[0] and "evaluation" not in outputs[1]
    assert states(tmp_path) == reference


@pytest.mark.slow
def test_a_cable_that_is_pulled_ends_both_hosts_within_the_time_out_and_the_same_command_goes_on_bit_for_bit(
    start: Callable[..., list[Job]], tmp_path: Path, reference: list[dict[str, object]]
) -> None:
    jobs = start()
    wait_for(lambda: step_of(tmp_path) >= 200 or jobs[0].ended)
    pids = [process_of_rank(tmp_path, rank) for rank in range(2)]
    switch("down")
    began = time.monotonic()
    try:
        wait_for(lambda: all("lost the others" in job.output for job in jobs))
        assert time.monotonic() - began < 2 * TIMEOUT
        wait_for(lambda: not any(runs(pid) for pid in pids))
    finally:
        switch("up")  # without which the second torchrun waits for the first until TCP gives up
    for rank, output in enumerate([job.finish() for job in jobs]):
        assert f"error: rank {rank} of 2 lost the others" in output and jobs[rank].process.returncode == 1
    committed = step_of(tmp_path)
    first, _ = (job.finish() for job in start())
    assert f"step_{committed:012d}, exact:" in first
    assert states(tmp_path) == reference


@pytest.mark.slow
def test_a_rank_killed_on_either_host_is_restarted_on_both_from_the_last_checkpoint(
    start: Callable[..., list[Job]], tmp_path: Path, reference: list[dict[str, object]]
) -> None:
    """Each torchrun counts the ends of its own ranks: here the first host counts one and the second up to three."""
    jobs = start("fresh=true", flags=("--max-restarts=4",))
    for rank, step in ((1, 100), (1, 200), (0, 300)):
        wait_for(lambda step=step: step_of(tmp_path) >= step or jobs[0].ended)
        os.kill(process_of_rank(tmp_path, rank), signal.SIGKILL)
    output, _ = (job.finish() for job in jobs)
    assert [job.process.returncode for job in jobs] == [0, 0], output
    resumed = [int(step) for step in re.findall(r"step_(\d+), exact:", output)]
    assert len(resumed) == 3 and resumed == sorted(resumed) and resumed[0] >= 100
    assert states(tmp_path) == reference

"""Trainings on several ranks as a user starts them: torchrun, its ranks as processes, and what they end with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from small_runs import SMALL, final_state

RUN = [*SMALL, "name=run", "distributed.timeout=60"]
PATIENCE = 900.0
"""Seconds that a busy machine may take."""


@dataclass(frozen=True)
class Job:
    """A torchrun at work."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """What torchrun and its ranks have written so far."""
        return self.log.read_text()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def finish(self) -> str:
        """The whole output; a job that does not end is killed with its ranks."""
        try:
            self.process.wait(PATIENCE)
        finally:
            if not self.ended:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.output

    def ranks(self) -> dict[int, int]:
        """Processes by rank, from the moment they begin."""
        parent = self.process.pid
        found = {}
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            try:
                entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found |= {int(entry[5:]): int(child) for entry in entries if entry.startswith(b"RANK=")}
        return found


def torchrun(
    folder: Path,
    *overrides: str,
    ranks: int = 2,
    flags: Sequence[str] = (),
    program: Sequence[str] = ("-m", "rlplastic.train"),
    before: Sequence[str] = (),
    variables: dict[str, str] | None = None,
) -> Job:
    """Start a training named ``run`` in ``folder``; ``before`` is a command that starts it, as ``ip netns exec``."""
    chosen = {override.partition("=")[0] for override in overrides}
    plain = [override for override in RUN if override.partition("=")[0] not in chosen]
    where = () if any(flag.startswith("--nnodes") for flag in flags) else ("--standalone",)
    command = [sys.executable, "-m", "torch.distributed.run", *where, f"--nproc-per-node={ranks}", *flags]
    log = folder / f"output_{len(list(folder.glob('output_*')))}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*before, *command, *program, *plain, f"runs={folder}", *overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Job(process, log)


def trained(
    folder: Path,
    *overrides: str,
    ranks: int = 2,
    flags: Sequence[str] = (),
    program: Sequence[str] = ("-m", "rlplastic.train"),
) -> str:
    """The output of a training that ends well."""
    job = torchrun(folder, *overrides, ranks=ranks, flags=flags, program=program)
    output = job.finish()
    assert job.process.returncode == 0, output
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
    """The process that holds the lock of a rank's folder."""
    lock = folder / "run" / (f"rank_{rank}/lock" if rank else "lock")
    pid: int = json.loads(lock.read_text())["pid"]
    return pid


def runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

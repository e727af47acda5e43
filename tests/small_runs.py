"""Small real runs for the tests, and what two of them must have in common to be the same run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

SMALL = [
    "env=pendulum",
    "preset=debug",
    "env_steps=600",
    "threads=1",
    "env.threads=1",
    "agent.critic_width=8",
    "agent.actor_width=8",
    "replay.batch_size=16",
    "replay.capacity=400",
    "evaluation.every=250",
    "evaluation.episodes=2",
    "evaluation.final_episodes=2",
    "checkpoint.every=100",
    "tracking.every=70",
    "env.rebuild_every=60",
    "monitor=off",
]
"""150 vector steps with two rebuilds, a wrapped ring, random and learned actions."""


def command(*overrides: str, verb: str = "train") -> list[str]:
    return [sys.executable, "-m", f"rlplastic.{verb}", *overrides]


def run(*overrides: str, verb: str = "train", **options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        command(*overrides, verb=verb), capture_output=True, text=True, env=environment, check=False, **options
    )


SLOW_TASK = """
import gymnasium, time
class Slow(gymnasium.Env):
    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))
    def reset(self, *, seed=None, options=None):
        print('started', flush=True)
        time.sleep(60)
gymnasium.register('Slow-v0', Slow, max_episode_steps=9)
"""
"""A module with a task that says when it is reset, and then takes its time."""


def heeding(number: signal.Signals) -> Callable[[], None]:
    """For ``preexec_fn``: the process heeds a signal even if the tests run under nohup or in a shell's background."""

    def heed() -> None:
        signal.signal(number, signal.SIG_DFL)

    return heed


def with_module(folder: Path, name: str, source: str) -> dict[str, str]:
    """Writes a module into ``folder``; returns the variables of a process that can import it."""
    (folder / f"{name}.py").write_text(source)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def final_state(path: Path) -> dict[str, object]:
    """Hashes of every tensor of the newest checkpoint, its counters, the replay's rows and eval.csv; no wall times."""
    checkpoint = max((path / "checkpoints").glob("step_*"))
    state: dict[str, object] = {"checkpoint": checkpoint.name, "eval.csv": (path / "eval.csv").read_text()}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            state[f"{file.stem}.{name}"] = hashlib.sha256(plain(tensor).tobytes()).hexdigest()
    progress = json.loads((checkpoint / "progress.json").read_text())
    progress.pop("train_seconds")
    state["progress"] = progress
    state["replay"] = replay_rows(checkpoint)
    return state


def plain(tensor: torch.Tensor) -> np.ndarray:
    """The bits of a tensor; numpy knows no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()


def in_final_cells(name: str, segment: dict[str, torch.Tensor], head: dict[str, torch.Tensor]) -> torch.Tensor:
    """8-bit observations (of one group) in the cells that the replay ended with; anything else as it is."""
    if segment[name].dtype != torch.int8:
        return segment[name]
    growth = (head["cells.exponent"] - segment["replay.cells.exponent"]).clamp(max=7)[: segment[name].shape[1]]
    return segment[name] >> growth.to(torch.int8)


def replay_rows(checkpoint: Path) -> str:
    """A hash of all replay rows that the checkpoint's segments hold, however they are cut into segments."""
    rows: dict[tuple[int, int], bytes] = {}
    head = load_file(checkpoint / "replay_head.safetensors")
    for reference in json.loads((checkpoint / "manifest.json").read_text())["segments"]:
        tensors = load_file(checkpoint.parent / "segments" / reference["name"])
        start, stop = tensors["replay.start"].tolist(), tensors["replay.stop"].tolist()
        fields = [
            plain(in_final_cells(n, tensors, head))
            for n in sorted(tensors)
            if n.startswith("replay.") and n[7:] not in ("start", "stop") and not n.startswith("replay.cells.")
        ]
        offset = 0
        for column, (first, last) in enumerate(zip(start, stop, strict=True)):
            for row in range(first, last):
                rows[column, row] = b"".join(field[offset + row - first].tobytes() for field in fields)
            offset += last - first
    written = head["written"].tolist()
    capacity = min(100, min(written))  # what is surely still in the ring, whichever segments carry older rows
    digest = hashlib.sha256()
    for column, last in enumerate(written):
        for row in range(last - capacity, last):
            digest.update(rows[column, row])
    return digest.hexdigest()

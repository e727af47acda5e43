"""How long ranks take to average a tensor: t(S, W) = 2 (W - 1) a + 2 (W - 1) / W * S / b (docs/distributed.md).

torchrun --standalone --nproc-per-node=2 benchmarks/messages.py out=messages.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from rlplastic.command_line import parse, run_verb
from rlplastic.distributed import Group, joined
from rlplastic.errors import ConfigurationError
from rlplastic.machine import probe_machine

SIZES = [2**power for power in range(2, 25, 2)]
"""Bytes: from one number to 16 MB."""


@dataclass
class Arguments:
    """Measure messages between ranks; run it under torchrun."""

    device: str = "auto"
    repeats: int = 50
    out: str = "messages.json"


def seconds(group: Group, size: int, device: str, repeats: int) -> float:
    """Median time of averaging ``size`` bytes."""
    tensor = torch.zeros(size // 4, device=device)
    taken = []
    for _ in range(repeats + 5):
        group.total(0)  # all begin together
        began = time.perf_counter()
        group.average(tensor)
        tensor[:1].item()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[5:])


def fitted(sizes: list[int], times: list[float], ranks: int) -> dict[str, float]:
    """The latency a in seconds and the bandwidth b in bytes per second, by least squares of relative errors."""
    columns = np.array([[2 * (ranks - 1), 2 * (ranks - 1) / ranks * size] for size in sizes])
    weighted = columns / np.array(times)[:, None]
    latency, inverse = np.linalg.lstsq(weighted, np.ones(len(sizes)), rcond=None)[0]
    return {"latency_s": float(latency), "bandwidth_bytes_per_s": float(1 / inverse)}


def main(arguments: list[str]) -> None:
    options = parse(arguments, Arguments, "messages")
    with joined(options.device, 60.0) as group:
        if group.size == 1:
            raise ConfigurationError("one rank sends no messages; expected at least two: start this under torchrun")
        machine = probe_machine(options.device)
        times = [seconds(group, size, machine.device, options.repeats) for size in SIZES]
        result = {"ranks": group.size, "machine": asdict(machine), **fitted(SIZES, times, group.size)}
        result["seconds_by_bytes"] = dict(zip(SIZES, times, strict=True))
        if group.rank == 0:
            Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))

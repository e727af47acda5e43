"""How long ranks take to average a tensor, and what that adds to an update: t = 2 (W - 1) a + 2 (W - 1) / W * S / b.

torchrun --standalone --nproc-per-node=2 benchmarks/messages.py out=benchmarks/messages.json

The time t of a ring all-reduce of S bytes over W ranks (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms
for clusters of workstations", JPDC 2009), fitted to what is measured between these ranks, and projected to links whose
latency a and bandwidth b are published. A projection is no measurement: published bandwidths are peaks, so it is what
messages take at least.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlplastic.agents.flashsac import FlashSAC
from rlplastic.command_line import parse, run_verb
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig
from rlplastic.distributed import Group, joined
from rlplastic.errors import ConfigurationError
from rlplastic.machine import probe_machine

SIZES = [2**power for power in range(2, 25, 2)]
"""Bytes: from one number to 16 MB."""
WIDTHS = {"published": (256, 128), "small": (64, 32)}
"""Of critic and actor."""
MEASURED = "as measured here"


@dataclass(frozen=True)
class Link:
    """What joins neighbours of a ring; of different links in one ring, its slowest."""

    name: str
    ranks: tuple[int, ...]
    latency_s: float
    """Of one step of a ring."""
    bandwidth_bytes_per_s: float
    """In one direction."""
    source: str


NCCL = "latency: NCCL's model of a ring, simple protocol (src/graph/tuning.cc)"
PUBLISHED = (
    Link("NVLink 4, one node", (2, 8), 3.4e-6, 450e9, f"900 GB/s both ways (NVIDIA H100 datasheet); {NCCL}"),
    Link("PCIe 5.0 x16, one node", (2, 8), 5.7e-6, 63e9, f"32 GT/s, 16 lanes, 128b/130b (PCI-SIG); {NCCL}"),
    Link("400 Gb/s, two nodes of 8", (16,), 14e-6, 50e9, f"NVIDIA ConnectX-7, one card a node; {NCCL}"),
    Link("100 Gb/s Ethernet, two nodes of 8", (16,), 14e-6, 12.5e9, f"IEEE 802.3, one card a node; {NCCL}"),
    Link("10 Gb/s Ethernet, two nodes of 8", (16,), 14e-6, 1.25e9, f"IEEE 802.3, one card a node; {NCCL}"),
)


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


def fitted(sizes: list[int], times: list[float], ranks: int) -> tuple[float, float]:
    """The latency a in seconds and the bandwidth b in bytes per second, by least squares of relative errors."""
    columns = np.array([[2 * (ranks - 1), 2 * (ranks - 1) / ranks * size] for size in sizes])
    weighted = columns / np.array(times)[:, None]
    latency, inverse = np.linalg.lstsq(weighted, np.ones(len(sizes)), rcond=None)[0]
    return float(latency), float(1 / inverse)


def ring(size: float, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds of averaging ``size`` bytes, by the model."""
    return 2 * (ranks - 1) * latency + 2 * (ranks - 1) / ranks * size / bandwidth


def message_bytes(critic_width: int, actor_width: int) -> tuple[int, int]:
    """What FlashSAC sends on Humanoid-v5: gradients and moments of the critic with its target's, and of the actor."""
    settings = FlashSACConfig(critic_width=critic_width, actor_width=actor_width, gamma=0.99)
    learner = FlashSAC({"policy": 348}, 17, 1, settings, CategoricalCriticConfig(), seed=0).learner

    def moments(network: torch.nn.Module) -> int:
        return 2 * sum(value.numel() for name, value in network.named_buffers() if name.endswith("running_mean"))

    critic, actor = (
        sum(value.numel() for value in network.parameters()) + moments(network)
        for network in (learner.critic, learner.actor)
    )
    return 4 * (critic + moments(learner.target_critic)), 4 * actor


def projected(links: Sequence[Link]) -> list[dict[str, Any]]:
    """Microseconds that messages add to an update; the actor's count half, for every second has one."""
    sizes = {name: message_bytes(*widths) for name, widths in WIDTHS.items()}
    rows = []
    for link in links:
        a, b = link.latency_s, link.bandwidth_bytes_per_s
        for ranks in link.ranks:
            added = {
                f"{name}_us": round(1e6 * (ring(critic, ranks, a, b) + ring(actor, ranks, a, b) / 2), 1)
                for name, (critic, actor) in sizes.items()
            }
            facts = {"latency_us": round(1e6 * a, 2), "gigabytes_per_s": round(b / 1e9, 2)}
            rows.append({"link": link.name, "ranks": ranks, **facts, **added, "source": link.source})
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as docs/distributed.md shows them; sources are in its text, and in the file."""
    head = [name for name in rows[0] if name != "source"]
    lines = [head, ["---"] * len(head), *([str(row[name]) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: list[str]) -> None:
    options = parse(arguments, Arguments, "messages")
    with joined(options.device, 60.0) as group:
        if group.size == 1:
            raise ConfigurationError("one rank sends no messages; expected at least two: start this under torchrun")
        machine = probe_machine(options.device)
        times = [seconds(group, size, machine.device, options.repeats) for size in SIZES]
        if group.rank:
            return
    a, b = fitted(SIZES, times, group.size)
    rows = [
        {"bytes": size, "measured_us": round(1e6 * t, 1), "model_us": round(1e6 * ring(size, group.size, a, b), 1)}
        for size, t in zip(SIZES, times, strict=True)
    ]
    here = Link(MEASURED, (group.size, 8), a, b, "the fit above")
    projection = projected([here, *PUBLISHED])
    result = {"ranks": group.size, "machine": asdict(machine), "latency_s": a, "bandwidth_bytes_per_s": b}
    document = result | {"messages": rows, "projection": projection}
    Path(options.out).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{group.size} ranks on {machine.processor}: a = {1e6 * a:.1f} us, b = {b / 1e9:.2f} GB/s\n\n{table(rows)}")
    print(f"\nProjected, microseconds for each update:\n\n{table(projection)}")


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))

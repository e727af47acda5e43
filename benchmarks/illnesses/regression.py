"""Illnesses whose truth is exact: one network learns one random regression after another, in a bare supervised loop.

    python benchmarks/illnesses/regression.py [--seeds 0 1 2] [--tasks 24]

Every task asks for new standard normal targets of the same 512 inputs (memorising random labels, Lyle et al., arXiv
2303.01486), learnt by Adam for 300 steps. At the end of each the network is read and probed. What is true is told by
the next task: its mean loss, beside that of a fresh network on the very same targets and batches. The network is ill
where that is 1.25 times as high and more, healthy up to 1.1 times, and neither in between.

Each case leaves ``runs/<case>__probed__<seed>/plasticity.jsonl``, as a training run does, with the truth as further
events, for `benchmarks/detection.py`. `fast` learns at 3e-3 and falls ill, `slow` at 3e-4; `renewed` is `fast` with a
new network for every task, and healthy by construction.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlplastic.plasticity import ModuleReader, Subject, measure
from rlplastic.plasticity.monitor import Rules, is_ill, probe, screen
from rlplastic.plasticity.patient import Patient, hidden_layers

HERE = Path(__file__).resolve().parent
INPUTS, ROWS, WIDTH, BATCH, STEPS = 16, 512, 64, 128, 300
ILL, HEALTHY = 1.25, 1.1
"""Mean loss on the next task over a fresh network's: from here on ill, and up to here healthy."""
CASES = {"regression_fast": (3e-3, False), "regression_slow": (3e-4, False), "regression_renewed": (3e-3, True)}
"""Learning rate, and whether every task begins with a new network."""


def make(key: int) -> nn.Sequential:
    """A network of its own randomness."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key)
        layers = nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
        return nn.Sequential(*layers)


def learn(
    network: nn.Sequential, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, task: int
) -> float:
    """One task; its mean loss, the variance of the targets being 1."""
    rng = torch.Generator().manual_seed(task)
    total = 0.0
    for picks in torch.randint(ROWS, (STEPS, BATCH), generator=rng):
        loss = (network(inputs[picks]) - targets[picks]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / STEPS


def readings(network: nn.Sequential, inputs: Tensor) -> dict[str, float]:
    """What the screen looks at, and the dormant ratio."""
    subject = Subject("net", network, ModuleReader(network, network), rank_layers=["3"])
    return measure(subject, inputs, "forward") | measure(subject, inputs, "ranks")


def run(rate: float, renewed: bool, seed: int, tasks: int, tell: Callable[..., None]) -> None:
    """Learn ``tasks`` tasks, and tell of each what was read, found, and true."""
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(ROWS, INPUTS, generator=rng)
    network, rules = make(seed), Rules()
    optimizer = torch.optim.Adam(network.parameters(), rate)
    raised: set[str] = set()
    for task in range(tasks + 1):
        targets = torch.randn(ROWS, 1, generator=rng)
        other = make(1_000 * seed + task + 1)
        fresh_optimizer = torch.optim.Adam(other.parameters(), rate)
        fresh = learn(other, fresh_optimizer, inputs, targets, task)
        if renewed:
            network = make(500_000 + 1_000 * seed + task)
            optimizer = torch.optim.Adam(network.parameters(), rate)
        loss = learn(network, optimizer, inputs, targets, task)
        if task:  # so it was at the end of the task before
            ill = True if loss >= ILL * fresh else False if loss <= HEALTHY * fresh else None
            tell("truth", task * STEPS, ill=ill, loss=loss, fresh_loss=fresh)
        if task == tasks:
            return
        updates = (task + 1) * STEPS
        values, normal = readings(network, inputs), readings(make(seed), inputs)
        tell("measurement", updates, tier="all", values=values, fresh=normal)
        alarms = screen(values, normal, {}, {})
        for alarm in alarms:
            if alarm.metric not in raised:
                tell("alarm", updates, **asdict(alarm))
        raised = {alarm.metric for alarm in alarms}
        parts = hidden_layers(network, "", ())
        patient = Patient("net", network, optimizer, make, (inputs,), hidden=parts, head=("4.weight", "4.bias"))
        found = probe({"net": patient}, updates, rules)["net"]
        areas = {"members": found.members, "areas": found.areas, "fresh_areas": found.fresh_areas}
        named = [alarm.metric for alarm in alarms]
        ratio = {"ratio": found.ratio, "worst": found.worst, "ill": is_ill(found, rules)}
        tell("probe", updates, patient="net", alarms=named, **ratio, **areas)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, default=24)
    parser.add_argument("--directory", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for case, (rate, renewed) in CASES.items():
            lines: list[str] = []

            def tell(event: str, updates: int, lines: list[str] = lines, **evidence: Any) -> None:
                lines.append(json.dumps({"step": updates, "event": event, "updates": updates, **evidence}))

            run(rate, renewed, seed, arguments.tasks, tell)
            folder = arguments.directory / "runs" / f"{case}__probed__{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "plasticity.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{folder.name}: {len(lines)} lines")


if __name__ == "__main__":
    main()

"""Policy evaluation with a known answer: flow, categorical and scalar critics with many updates for each datum.

    python benchmarks/flow_chain.py benchmarks/flow_chain [--seeds 3]

A ring of 16 states with 8 random features each: with probability 0.95 one goes on by a state, else anywhere. Rewards
are redrawn in every phase, so that targets keep changing; values V = (I - gamma P)^-1 r are scaled to at most 4. A
phase has `DATA` transitions, which come one by one into an empty replay, and a critic does R updates after each. Its
error at the end of a phase is the root mean square of Q - V over all states, divided by that of V. What a critic lost
of its plasticity is the error of the later phases over that of the first. No critic knows more than its data: the error
of the exact solution of the chain that was seen is told beside theirs. Critics are the agents' own (plain: SAC's;
bounded: FlashSAC's), equal but for their kind; actions change nothing. Flow: K = m = 4.

Writes ``errors.csv`` (a row for each critic, seed and phase), ``summary.md`` and ``errors.png``; what the CSV has is
not run again. About two and a half core-minutes for each seed.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from grid_results import COLOURS, interval, replace_file, with_interval
from rlplastic import seeding
from rlplastic.agents import make_agent
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.sac import SAC
from rlplastic.agents.subjects import values
from rlplastic.composition import compose
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.replay.sample import Batch

STATES, FEATURES, GAMMA, LARGEST = 16, 8, 0.9, 4.0
ONWARDS = 0.95
PHASES, DATA, BATCH = 3, 120, 32
RATIOS = (1, 4, 16)
TRUNKS = {
    "plain": ["agent=sac", "agent.critic_width=64"],
    "bounded": ["agent=flashsac", "agent.critic_width=32", "agent.num_blocks=1"],
}
CRITICS = {
    "flow": ["critic=flow", "critic.steps=4", "critic.noises=4"],
    "categorical": ["critic=categorical"],
    "scalar": ["critic=scalar"],
}
COMMON = [
    *("agent.backup_entropy=false", "agent.actor_every=1000000", "agent.actor_width=8", "agent.target_rate=0.02"),
    *("agent.learning_rate=1e-3", "env.num_envs=1", f"replay.batch_size={BATCH}", "compile=off", "precision=float32"),
]
"""The actor learns once, and its actions change nothing; targets and critics move fast, since phases are short."""


class Row(NamedTuple):
    """A line of ``errors.csv``; the error is over the root mean square of the values."""

    trunk: str
    critic: str
    ratio: int
    seed: int
    phase: int
    error: float


class Chain(NamedTuple):
    """What never changes: features (S, F) and transition probabilities (S, S)."""

    features: Tensor
    transition: Tensor


def chain_of(seed: int) -> Chain:
    """The ring of a seed."""
    rng = seeding.generator("cpu", seed, "chain", 0)
    transition = ONWARDS * torch.eye(STATES).roll(1, 1) + (1 - ONWARDS) / STATES
    return Chain(torch.randn(STATES, FEATURES, generator=rng), transition)


def rewards_of(chain: Chain, seed: int, phase: int) -> tuple[Tensor, Tensor]:
    """Rewards (S,) of a phase, and the values (S,) that follow from them."""
    reward = torch.randn(STATES, generator=seeding.generator("cpu", seed, "rewards", phase))
    value = torch.linalg.solve(torch.eye(STATES) - GAMMA * chain.transition, reward)
    scale = LARGEST / value.abs().max()
    return scale * reward, scale * value


def data_of(chain: Chain, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """States (DATA,) of a phase's transitions, and what followed."""
    states = torch.randint(STATES, (DATA,), generator=rng)
    return states, torch.multinomial(chain.transition[states], 1, generator=rng).squeeze(1)


def error_of(found: Tensor, value: Tensor) -> float:
    """Of values (S,) beside the true ones: the module's measure."""
    return float((found - value).square().mean().sqrt() / value.square().mean().sqrt())


def exact_error(seed: int, phase: int) -> float:
    """Of the exact solution of the chain as the phase's data show it; states that were not seen are worth 0."""
    chain = chain_of(seed)
    reward, value = rewards_of(chain, seed, phase)
    states, following = data_of(chain, seeding.generator("cpu", seed, "data", phase))
    counts = torch.zeros(STATES, STATES).index_put_((states, following), torch.ones(DATA), accumulate=True)
    visits = counts.sum(1)
    seen = torch.eye(STATES) - GAMMA * counts / visits.clamp_min(1).unsqueeze(1)
    return error_of(torch.linalg.solve(seen, reward * (visits > 0)), value)


def critic_of(trunk: str, critic: str, seed: int) -> FlashSAC | SAC:
    """An agent, of which the critic is what matters."""
    asked = compose([*TRUNKS[trunk], *CRITICS[critic], *COMMON, f"seed={seed}"])
    agent = make_agent(resolve(asked, probe_machine("cpu"))[0], {"policy": FEATURES}, 1)
    assert isinstance(agent, FlashSAC | SAC)
    return agent


def run(trunk: str, critic: str, ratio: int, seed: int) -> list[Row]:
    """All phases of one critic."""
    chain, agent = chain_of(seed), critic_of(trunk, critic, seed)
    rows = []
    for phase in range(PHASES):
        reward, value = rewards_of(chain, seed, phase)
        rng = seeding.generator("cpu", seed, "data", phase)
        states, following = data_of(chain, rng)
        for number in range(1, DATA + 1):
            for _ in range(ratio):
                drawn = torch.randint(number, (BATCH,), generator=rng)
                action = 2 * torch.rand(BATCH, 1, generator=rng) - 1
                here, there = chain.features[states[drawn]], chain.features[following[drawn]]
                discount = torch.full((BATCH,), GAMMA)
                batch = Batch({"policy": here}, action, reward[states[drawn]], discount, {"policy": there}, drawn)
                agent.update(batch, 0.0)
        with torch.no_grad():
            found = values(agent, chain.features, torch.zeros(STATES, 1)).mean(0)
        rows.append(Row(trunk, critic, ratio, seed, phase, error_of(found, value)))
    return rows


def read(path: Path) -> list[Row]:
    """The rows of ``errors.csv``; none without the file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(line["trunk"], line["critic"], *(int(line[name]) for name in Row._fields[2:5]), float(line["error"]))
            for line in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace ``errors.csv``."""
    lines = [",".join(Row._fields), *(",".join(map(str, row[:-1])) + f",{row.error:.6g}" for row in rows)]
    replace_file(path, "\n".join(lines) + "\n")


def of_seeds(rows: Sequence[Row], trunk: str, critic: str, ratio: int, phases: Sequence[int]) -> dict[int, float]:
    """The mean error over phases, by seed."""
    mine: dict[int, list[float]] = {}
    for row in rows:
        if (row.trunk, row.critic, row.ratio) == (trunk, critic, ratio) and row.phase in phases:
            mine.setdefault(row.seed, []).append(row.error)
    return {seed: statistics.fmean(errors) for seed, errors in mine.items()}


def summary(rows: Sequence[Row]) -> str:
    """Errors, how they differ from the flow's, and what later phases cost beside the first."""
    lines = [
        "# Values of a chain whose rewards change: flow, categorical and scalar critics",
        "",
        f"Made by `python benchmarks/flow_chain.py benchmarks/flow_chain`. {PHASES} phases of {DATA} transitions,",
        f"batch {BATCH}; error: root mean square of Q - V over that of V, at the end of the phases after the first,",
        "with 95 % t intervals over seeds. minus flow: paired by seed, above 0 where the flow is nearer to V. later /",
        "first: the same errors over that of the first phase, above 1 where what was learned before is in the way.",
        "",
        "| trunk | replay ratio | critic | seeds | error | minus flow | later / first |",
        "|---|---|---|---|---|---|---|",
    ]
    later = range(1, PHASES)
    for trunk in TRUNKS:
        for ratio in RATIOS:
            flow = of_seeds(rows, trunk, "flow", ratio, later)
            for critic in CRITICS:
                mine, first = (of_seeds(rows, trunk, critic, ratio, phases) for phases in (later, (0,)))
                if not mine:
                    continue
                minus = [error - flow[seed] for seed, error in mine.items() if seed in flow]
                ratios = [error / first[seed] for seed, error in mine.items()]
                cells = (
                    *(trunk, str(ratio), critic, str(len(mine)), with_interval(*interval(list(mine.values())))),
                    "" if critic == "flow" else with_interval(*interval(minus)),
                    with_interval(*interval(ratios)),
                )
                lines.append(f"| {' | '.join(cells)} |")
    seeds = sorted({row.seed for row in rows})
    exact = [statistics.fmean(exact_error(seed, phase) for phase in later) for seed in seeds]
    told = f"The exact solution of the chain as the data show it errs by {with_interval(*interval(exact))}."
    return "\n".join([*lines, "", told, "", "![errors](errors.png)"]) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Errors by phase: a panel for each trunk and replay ratio, a line for each kind of critic."""
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplots(len(TRUNKS), len(RATIOS), sharex=True, sharey="row", squeeze=False)
    seeds = {row.seed for row in rows}
    exact = [statistics.fmean(exact_error(seed, phase) for seed in seeds) for phase in range(PHASES)]
    for line, trunk in zip(panels, TRUNKS, strict=True):
        for panel, ratio in zip(line, RATIOS, strict=True):
            for colour, critic in zip(COLOURS, CRITICS, strict=False):
                means, widths = [], []
                for phase in range(PHASES):
                    found = list(of_seeds(rows, trunk, critic, ratio, (phase,)).values())
                    mean, width = interval(found) if found else (math.nan, math.nan)
                    means.append(mean)
                    widths.append(width)
                panel.errorbar(range(1, PHASES + 1), means, widths, color=colour, marker="o", capsize=3, label=critic)
            panel.plot(range(1, PHASES + 1), exact, "--", color="grey", label="exact, of the same data")
            panel.set(title=f"{trunk}, replay ratio {ratio}", xticks=range(1, PHASES + 1))
            panel.grid(alpha=0.3)
        line[0].set_ylabel("error of the value")
    for panel in panels[-1]:
        panel.set_xlabel("phase")
    panels[0][0].legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    directory: Path = arguments.directory
    directory.mkdir(parents=True, exist_ok=True)
    rows = read(directory / "errors.csv")
    done = {row[:4] for row in rows}
    for seed in range(arguments.seeds):
        for cell in ((trunk, critic, ratio, seed) for ratio in RATIOS for trunk in TRUNKS for critic in CRITICS):
            if cell not in done:
                rows += run(*cell)
                write(directory / "errors.csv", rows)
                print(*cell, *(f"{row.error:.3f}" for row in rows[-PHASES:]), flush=True)
    replace_file(directory / "summary.md", summary(rows))
    draw(rows, directory / "errors.png")


if __name__ == "__main__":
    main()

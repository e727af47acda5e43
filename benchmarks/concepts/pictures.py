"""The pictures of docs/concepts.md: a network that learns one function after another, and priming from committed runs.

    python benchmarks/concepts/pictures.py            # both pictures, from what is committed
    python benchmarks/concepts/pictures.py measure    # functions.csv anew: 8 minutes of one core

A plain ReLU network and one of FlashSAC's norm-bounded kind learn 60 random functions of the same 1,024 states, each in
300 steps of Adam (3e-3). After every tenth the probe asks how fast they still learn, beside fresh ones of their kind.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from rlplastic.agents.layers import NormBounds, Trunk, UnitLinear
from rlplastic.plasticity.patient import Patient, unbounded
from rlplastic.plasticity.probe import probe, smooth_functions
from rlplastic.plasticity.weights import weight_norm

HERE = Path(__file__).parent
PRIMING = HERE.parent / "priming_sac" / "curves"
STATES, FUNCTIONS, STEPS, BATCH, RATE, SEEDS = 1024, 60, 300, 128, 3e-3, (0, 1)
INPUTS = 8
COLUMNS = ("network", "seed", "functions", "error", "probe", "weight_norm")
COLOURS = {"plain": "tab:orange", "bounded": "tab:blue"}


class Bounded(nn.Module):
    """The published critic's trunk with one number on top."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.trunk, self.head = Trunk(INPUTS, width, num_blocks=1), UnitLinear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.to_rows(self.trunk(x.mT, self.training))


def plain(key: int, width: int = 64) -> nn.Module:
    torch.manual_seed(key)
    sizes = [INPUTS, width, width, width]
    hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


def bounded(key: int) -> nn.Module:
    torch.manual_seed(key)
    return Bounded()


def projection(module: nn.Module) -> Callable[[], None]:
    return NormBounds(module).project


KINDS = {"plain": (plain, unbounded), "bounded": (bounded, projection)}


def learn(kind: str, seed: int) -> Iterator[dict[str, object]]:
    """A row of `COLUMNS` after every tenth function, whose error is the mean while the ten were learned."""
    make, bound = KINDS[kind]
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(STATES, INPUTS, generator=rng)
    network = make(seed)
    optimizer = torch.optim.Adam(network.parameters(), RATE)
    patient = Patient(kind, network, optimizer, fresh=make, states=(states,), bound=bound)
    project = bound(network)
    reference, errors = None, []
    for count in range(1, FUNCTIONS + 1):
        (function,) = smooth_functions((states,), outputs=1, count=1, rng=rng)
        for _ in range(STEPS):
            rows = torch.randint(STATES, (BATCH,), generator=rng)
            loss = (network(states[rows]) - function[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            project()
            errors.append(loss.item())
        if count % 10 == 0:
            found = probe(patient, (states,), key=seed, reference=reference)
            reference = reference or found
            norm = weight_norm([weight for weight in network.parameters() if weight.dim() == 2])
            values = (sum(errors) / len(errors), found.ratio, norm.item())
            yield dict(zip(COLUMNS, (kind, seed, count, *(f"{value:.5g}" for value in values)), strict=True))
            errors = []


def measure() -> None:
    torch.set_num_threads(1)
    with open(HERE / "functions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for seed in SEEDS:
            for kind in KINDS:
                writer.writerows(learn(kind, seed))
                file.flush()


def table(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def panel(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)


def functions() -> Figure:
    """Three columns of functions.csv: thin lines are seeds, thick ones their mean."""
    figure = Figure((11, 3.6), layout="constrained")
    rows = table(HERE / "functions.csv")
    titles = ("error while it learns a function", "probe: 1 learns as fast as a fresh network", "norm of the weights")
    for axes, column, title in zip(figure.subplots(1, 3), COLUMNS[3:], titles, strict=True):
        for kind, colour in COLOURS.items():
            seeds = [[row for row in rows if (row["network"], row["seed"]) == (kind, str(seed))] for seed in SEEDS]
            x = [int(row["functions"]) for row in seeds[0]]
            lines = [[float(row[column]) for row in seed] for seed in seeds]
            for line in lines:
                axes.plot(x, line, color=colour, linewidth=0.8, alpha=0.5)
            mean = [sum(values) / len(values) for values in zip(*lines, strict=True)]
            axes.plot(x, mean, color=colour, linewidth=2, marker="o", label=f"{kind} network")
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=10)
        panel(axes, "functions learned, one after another", column.replace("_", " "))
    figure.axes[0].legend()
    return figure


def priming() -> Figure:
    """HalfCheetah, plain SAC: the same run with and without 30,000 updates on its first 500 transitions."""
    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    arms = {"unprimed": "1 update per transition", "untreated": "30,000 updates on the first 500 transitions, then 1"}
    for (arm, label), colour in zip(arms.items(), ("tab:blue", "tab:orange"), strict=True):
        rows = table(PRIMING / f"halfcheetah__{arm}__0.csv")
        x, y = ([float(row[column]) for row in rows] for column in ("step", "return_mean"))
        low, high = ([float(row[f"return_ci95_{side}"]) for row in rows] for side in ("low", "high"))
        axes.plot(x, y, color=colour, marker="o", markersize=3, label=label)
        axes.fill_between(x, low, high, color=colour, alpha=0.2)
    panel(axes, "environment transitions", "evaluation return, ten episodes")
    axes.legend(fontsize=9)
    return figure


if __name__ == "__main__":
    if sys.argv[1:] == ["measure"]:
        measure()
    for name, figure in (("functions", functions()), ("priming", priming())):
        figure.savefig(HERE / f"{name}.png", dpi=120)

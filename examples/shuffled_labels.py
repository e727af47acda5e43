"""A plain network loses its plasticity in a bare torch loop, is measured and probed, and gets it back.

    python examples/shuffled_labels.py

512 random inputs get new random labels 20 times, and each time the same network has 200 steps to learn them by heart.
No task is harder than the first, which a new network learns completely (Lyle et al., arXiv 2303.01486). One network
is left alone. Its twin is probed before every task and treated with shrink-and-perturb (Ash and Adams, arXiv
1910.08475) when the probe has become worse. `rlplastic.plasticity` knows nothing of this loop but the module, its
optimizer and its inputs.

What one sees (seed 0, torch 2.13, CPU): left alone, the network falls from 100 % to 14 % correct, which is hardly
more than chance; half of its units die, but only after it had stopped learning. The probe rises before that, from 0.6
to 1.4; it is below 1 at first because whoever has learned something learns the next smooth function more easily than
a fresh network. The treated twin stays between 78 and 100 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlplastic.plasticity import ModuleReader, Subject, measure
from rlplastic.plasticity.interventions import shrink_and_perturb
from rlplastic.plasticity.patient import Patient, hidden_layers
from rlplastic.plasticity.probe import probe

ROWS, INPUTS, WIDTH, CLASSES = 512, 32, 64, 10
STEPS = 200
"""Of Adam, on all rows, for each task."""
ILL = 0.8
"""The probe above which the network is treated; after the first task it is at 0.6 here."""


def network(seed: int) -> nn.Sequential:
    """Two hidden layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)
        )


@dataclass(frozen=True)
class Task:
    """What was seen of one task.

    probed: the probe before it; treated: by what, if at all; dead: share of units that no input turns on, and accuracy,
    after it.
    """

    probed: float
    treated: str
    dead: float
    accuracy: float


def learn(inputs: Tensor, tasks: int, treat: bool) -> list[Task]:
    """One network through all tasks."""
    net = network(seed=0)
    optimizer = torch.optim.Adam(net.parameters())
    patient = Patient("net", net, optimizer, fresh=network, states=(inputs,), hidden=hidden_layers(net, "", ()))
    subject = Subject("net", net, ModuleReader(net, net))
    rng = torch.Generator().manual_seed(0)
    seen = []
    for task in range(tasks):
        labels = torch.randint(CLASSES, (ROWS,), generator=rng)
        found, treated = probe(patient, patient.states, key=task, steps=100, functions=1).ratio, ""
        if treat and task and not found < ILL:
            treated = shrink_and_perturb(patient, key=task).name
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), labels).backward()
            optimizer.step()
        with torch.no_grad():
            accuracy = (net(inputs).argmax(-1) == labels).float().mean().item()
        seen.append(Task(found, treated, measure(subject, inputs, "forward")["plasticity/net/all/dead"], accuracy))
    return seen


def main(tasks: int = 20) -> tuple[list[Task], list[Task]]:
    """The network that is left alone, and its twin; prints a table."""
    torch.set_num_threads(1)
    inputs = torch.randn(ROWS, INPUTS, generator=torch.Generator().manual_seed(0))
    alone, treated = learn(inputs, tasks, treat=False), learn(inputs, tasks, treat=True)
    print("task | left alone: probe  dead  accuracy | probed and treated: probe  dead  accuracy")
    for index, (a, b) in enumerate(zip(alone, treated, strict=True)):
        print(
            f"{index:4} | {a.probed:17.2f} {a.dead:5.0%} {a.accuracy:9.0%} | "
            f"{b.probed:25.2f} {b.dead:5.0%} {b.accuracy:9.0%}  {b.treated}"
        )
    return alone, treated


if __name__ == "__main__":
    main()

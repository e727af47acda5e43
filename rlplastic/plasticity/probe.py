"""The trainability probe: how fast a network still learns, beside a fresh one of its kind.

A discarded copy of the network, with a fresh Adam, learns its own output plus a random smooth function of unit
variance. The area under its loss curve, over that of a freshly initialised network with the same functions and batches,
is the ratio: about 1 for a healthy network, above it for one that learns more slowly than a fresh one.

    area = mean_k min(L_k, 2),  L_k = mean (q(x) - q_0(x) - f(x))^2,  ratio = area of the copy / area of the fresh one

The residual keeps the output's scale out of the question: regressing unit-scale targets from zero would call every
critic ill whose values are large. Predicting nothing new costs 1, and 2 caps what divergence can cost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.patient import Patient, States, keyed

ROWS = 1024
"""Replay rows that a probe wants; more tell no more."""
BATCH, RATE, CAP = 128, 1e-3, 2.0
FEATURES = 256
"""Cosines that a random function is made of."""


@dataclass(frozen=True)
class Probe:
    """What a probe found.

    Attributes:
        members: ratio of every member of the ensemble, one for a single network; NaN where something was not finite.
        areas: of the copy, per member.
        fresh_areas: of the fresh network, per member.
        setting: key, steps, functions and rows, which another probe must share to be compared.
        updates: what it cost, in optimizer steps.
    """

    members: tuple[float, ...]
    areas: tuple[float, ...]
    fresh_areas: tuple[float, ...]
    setting: tuple[int, int, int, int]
    updates: int

    @property
    def ratio(self) -> float:
        """Mean of the members' ratios."""
        return sum(self.members) / len(self.members)

    @property
    def worst(self) -> float:
        """Ratio of the member that learns most slowly; NaN if any is."""
        return max(self.members, key=lambda ratio: math.inf if math.isnan(ratio) else ratio)


def probe(
    patient: Patient,
    states: States,
    key: int,
    steps: int = 300,
    functions: int = 3,
    *,
    targets: Tensor | None = None,
    reference: Probe | None = None,
) -> Probe:
    """Measure how fast a copy of the patient's module learns, relative to a fresh network.

    The patient is untouched: parameters, buffers, gradients, modes and torch's random states. Members of an ensemble
    learn side by side, each from its own loss. Norms are re-projected after every step; batch norms use the batch.

    Args:
        patient: whose module is probed.
        states: the network's inputs, rows first; about `ROWS` of them, from replay.
        key: of the fresh network, the functions and the batches.
        steps: of Adam at 1e-3 on batches of 128 rows.
        functions: random functions, the area being their mean.
        targets: learn these instead, (rows,) or (rows, outputs), such as held-out TD targets; errors are then in
            units of their variance, and ``functions`` only draw batches anew.
        reference: an earlier probe of the same setting on the same states (and targets), whose fresh network is taken
            again; it halves the cost.

    Raises:
        ConfigurationError: no states, targets of another length, or a reference of another setting.
    """
    rows = len(states[0]) if states else 0
    if not rows or any(len(part) != rows for part in states):
        raise ConfigurationError(
            f"the probe got {rows} states; expected the network's inputs with equal rows, about 1024"
        )
    if targets is not None and len(targets) != rows:
        raise ConfigurationError(f"the probe got {len(targets)} targets for {rows} states; expected one for each")
    setting = (key, steps, functions, rows)
    if reference is not None and reference.setting != setting:
        raise ConfigurationError(
            f"the reference was probed with (key, steps, functions, rows) = {reference.setting}; expected {setting}"
        )
    with keyed(patient.module, key), torch.enable_grad():
        areas = _areas(patient, lambda: copy.deepcopy(patient.module), states, targets, setting)
        if reference is None:
            fresh = _areas(patient, lambda: patient.fresh(key), states, targets, setting)
        else:
            fresh = torch.tensor(reference.fresh_areas, dtype=torch.float64)
    return Probe(
        members=tuple((areas / fresh).tolist()),
        areas=tuple(areas.tolist()),
        fresh_areas=tuple(fresh.tolist()),
        setting=setting,
        updates=steps * functions * (2 if reference is None else 1),
    )


def smooth_functions(states: States, outputs: int, count: int, rng: torch.Generator) -> list[Tensor]:
    """Random smooth functions on states, (rows, outputs) each, of mean 0 and variance 1 over the rows.

    Sums of random cosines, which approach a Gaussian process whose length is the standardised states' typical size
    (Rahimi and Recht, "Random features for large-scale kernel machines", 2007).
    """
    flat = torch.cat([part.detach().double().flatten(1) for part in states], -1).cpu()
    size = flat.std(0, correction=0)
    x = (flat - flat.mean(0)) / torch.where(size > 1e-6 * (1 + flat.mean(0).abs()), size, torch.inf)
    found = []
    for _ in range(count):
        frequencies = torch.randn(x.shape[1], FEATURES, generator=rng, dtype=torch.float64) / math.sqrt(x.shape[1])
        phases = 2 * math.pi * torch.rand(FEATURES, generator=rng, dtype=torch.float64)
        mixture = torch.randn(FEATURES, outputs, generator=rng, dtype=torch.float64)
        values = torch.cos(x @ frequencies + phases) @ mixture
        values = (values - values.mean(0)) / values.std(0, correction=0)
        found.append(values.to(states[0].device, torch.float32))
    return found


def _areas(
    patient: Patient,
    make: Callable[[], nn.Module],
    states: States,
    targets: Tensor | None,
    setting: tuple[int, int, int, int],
) -> Tensor:
    """Mean area over the functions, (members,) in float64, each learnt by a new network of ``make``."""
    key, steps, functions, rows = setting
    rng = torch.Generator().manual_seed(key)
    with torch.no_grad():
        start = patient.outputs(make(), states, True)
    if targets is None:
        goals = [start + function for function in smooth_functions(states, start.shape[-1], functions, rng)]
        unit = start.new_ones(())
    else:
        wanted = targets.reshape(rows, -1).to(start)
        goals, unit = [wanted.expand_as(start)] * functions, wanted.var(0, correction=0).mean()
    areas = []
    for goal in goals:
        picks = torch.randint(rows, (steps, min(BATCH, rows)), generator=rng).to(start.device)
        areas.append(_learn(patient, make(), states, goal, unit, picks))
    return torch.stack(areas).mean(0).cpu()


def _learn(patient: Patient, network: nn.Module, states: States, goal: Tensor, unit: Tensor, picks: Tensor) -> Tensor:
    """Train on ``goal`` (members, rows, outputs); the mean over steps of each member's capped loss, (members,)."""
    parameters: list[Tensor] = [parameter for parameter in network.parameters() if parameter.requires_grad]
    step = _adam(parameters)
    project = patient.bound(network)
    total = goal.new_zeros(len(goal), dtype=torch.float64)
    for pick in picks:
        outputs = patient.outputs(network, tuple(part[pick] for part in states), True)
        losses = (outputs - goal[:, pick]).square().mean((-1, -2)) / unit
        step(torch.autograd.grad(losses.sum(), parameters, materialize_grads=True))
        project()
        total += losses.detach().clamp(max=CAP)
    return total / len(picks)


def _adam(parameters: list[Tensor]) -> Callable[[Sequence[Tensor]], None]:
    """A step along gradients, with the bits of ``torch.optim.Adam(parameters, RATE, fused=True)``.

    Making the first of that class imports torch's compiler: 2 seconds and 90 MB in the middle of somebody's training.
    """
    first, second = ([torch.zeros_like(parameter) for parameter in parameters] for _ in range(2))
    counters = [torch.zeros((), device=parameter.device) for parameter in parameters]

    @torch.no_grad()
    def step(gradients: Sequence[Tensor]) -> None:
        adam(
            parameters,
            [gradient.contiguous() for gradient in gradients],
            first,
            second,
            [],
            counters,
            fused=True,
            lr=RATE,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    return step


def in_words(ratio: float) -> str:
    """How fast a patient with a probe's ratio learns: ``38 % more slowly than a fresh network``."""
    if not math.isfinite(ratio):
        return "nothing: its numbers are not finite"
    if ratio >= 2:
        return f"{ratio:.1f} times as slowly as a fresh network"
    if abs(ratio - 1) < 0.05:
        return "as fast as a fresh network"
    return f"{abs(ratio - 1):.0%} {'more slowly' if ratio > 1 else 'faster'} than a fresh network".replace("%", " %")

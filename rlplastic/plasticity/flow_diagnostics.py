"""What a flow-matching critic does with its steps: four diagnostics of "What does flow matching bring to TD learning?".

The paper (arXiv 2603.04333) explains flow critics by *recovery*, later Euler steps that repair errors of earlier ones,
and by features that stay *plastic* since they were trained at all times of a path. Each is a function of callables and
tensors here:

1. `value_errors` after each step, and `recovery` where an old copy took the first steps;
2. `feature_plasticity`: can the head alone keep up with new targets?
3. `target_noise`: what noise U[-M, M] in the targets costs;
4. `feature_norms` by time, `endpoint_variance` over noises, and `path_curvature` E|v(t) - v(0)|: near 0 the flow is a
   monolithic critic in disguise.

z has shape (members, noises, rows), or what broadcasts to it, as in the critic that is looked at.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.activations import Layer
from rlplastic.plasticity.patient import unbounded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Step = Callable[[Tensor, int], Tensor]
"""One Euler step: z after k steps, and k, to z after k + 1."""
Perturb = Callable[[Tensor], Tensor]
"""Rewards to noisy ones."""
Curve = Tensor | Sequence[float]
"""Numbers to draw one after the other."""


@torch.no_grad()
def value_errors(points: Sequence[Tensor], returns: Tensor) -> Tensor:
    """Mean absolute error of the value after each step, (K,), float64.

    Args:
        points: z after 0, 1, …, K steps; the value is their mean over noises.
        returns: Monte-Carlo returns (rows,) of the same states and actions.
    """
    values = [z.double().mean(-2) for z in points[1:]]
    return torch.stack([(value - returns.double()).abs().mean() for value in values])


@torch.no_grad()
def recovery(step: Step, old: Step, source: Tensor, steps: int, returns: Tensor) -> Tensor:
    """Error of the value when an old copy took the first k of K steps, for k = 0..K: (K + 1,), float64.

    Flat until the last steps where the flow recovers; straight from the new to the old error where it does not.

    Args:
        step: of the critic.
        old: of an earlier copy of it.
        source: where paths begin.
        steps: K.
        returns: Monte-Carlo returns (rows,).
    """
    errors = []
    for handed_over in range(steps + 1):
        z = source
        for index in range(steps):
            z = old(z, index) if index < handed_over else step(z, index)
        errors.append(value_errors([source, z], returns)[0])
    return torch.stack(errors)


def feature_plasticity(
    module: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    trainable: Sequence[str],
    updates: int,
    rate: float,
    bound: Callable[[nn.Module], Callable[[], None]] = unbounded,
) -> Tensor:
    """Losses of a copy of which only some layers learn on, (updates + 1,), float64; the module stays as it is.

    Features that are good for later targets let the head follow these; what stays is what frozen features cannot say.

    Args:
        module: to copy.
        loss: of the copy, for update number k; both kinds of critic must be given the same targets.
        trainable: names of the modules that learn, such as the last hidden layer and the head; "": all of it.
        updates: Adam steps.
        rate: their learning rate.
        bound: makes of the copy what bounds its norms after every step, as `Patient.bound` does.

    Raises:
        ConfigurationError: the module has no parameters below one of the names.
    """
    learner = copy.deepcopy(module)
    for parameter in learner.parameters():
        parameter.requires_grad_(False)
    for name in trainable:
        prefix = f"{name}." if name else ""
        own = [p for entry, p in learner.named_parameters() if f"{entry}.".startswith(prefix)]
        if not own:
            raise ConfigurationError(f"no parameter lies below {name!r}; expected names of its modules")
        for parameter in own:
            parameter.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], lr=rate)
    project = bound(learner)
    losses = []
    for index in range(updates):
        optimizer.zero_grad()
        value = loss(learner, index)
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        project()
        losses.append(value.detach())
    with torch.no_grad():
        losses.append(loss(learner, updates))
    return torch.stack(losses).double()


def target_noise(train: Callable[[Perturb], float], magnitudes: Sequence[float], seed: int = 0) -> Tensor:
    """Error of a critic by the size M of noise U[-M, M] in its targets, (magnitudes,), float64.

    A reward is a summand of the target, so noise on rewards is noise on targets, for critics of any kind.

    Args:
        train: trains a critic anew, passing every batch of rewards through what it is given, and returns its error.
        magnitudes: the M.
        seed: of the noise, the same for all of them.
    """

    def noisy(magnitude: float) -> Perturb:
        rng = torch.Generator().manual_seed(seed)

        def perturb(reward: Tensor) -> Tensor:
            uniform = torch.rand(reward.shape, generator=rng, dtype=reward.dtype).to(reward.device)
            return reward + magnitude * (2 * uniform - 1)

        return perturb

    return torch.tensor([train(noisy(magnitude)) for magnitude in magnitudes], dtype=torch.float64)


@torch.no_grad()
def feature_norms(read: Callable[[float], Mapping[str, Layer]], times: Sequence[float]) -> dict[str, Tensor]:
    """Mean Euclidean norm of every layer's rows at each time, (times,) by layer, float64.

    Args:
        read: hidden layers at a time in [0, 1], such as a `rlplastic.plasticity.activations.ModuleReader`.
        times: in [0, 1].
    """
    norms = [{name: layer.values.double().norm(dim=-1).mean() for name, layer in read(time).items()} for time in times]
    return {name: torch.stack([at_time[name] for at_time in norms]) for name in norms[0]}


@torch.no_grad()
def endpoint_variance(ends: Tensor) -> Tensor:
    """Variance of the end points over noises, mean over rows: (members,) of (members, noises, rows), float64."""
    return ends.double().var(-2, correction=0).mean(-1)


@torch.no_grad()
def path_curvature(points: Sequence[Tensor]) -> Tensor:
    """E|v(k/K) - v(0)| for k = 0..K-1 along paths of K Euler steps, (K,), float64; 0 for straight ones.

    Args:
        points: z after 0, 1, …, K steps, whose differences times K are the velocities.
    """
    steps = len(points) - 1
    velocities = [(after.double() - before.double()) * steps for before, after in itertools.pairwise(points)]
    return torch.stack([(velocity - velocities[0]).abs().mean() for velocity in velocities])


@dataclass(frozen=True)
class FlowReport:
    """Results to draw; those that are None are left out.

    value_errors, recovery and curvature: as the functions give them; plasticity and noise: by the critic's name;
    magnitudes: of the noise; norms: by layer, at times k/K for k = 0..K-1.
    """

    value_errors: Curve | None = None
    recovery: Curve | None = None
    plasticity: Mapping[str, Curve] | None = None
    noise: Mapping[str, Curve] | None = None
    magnitudes: Sequence[float] = ()
    norms: Mapping[str, Curve] | None = None
    curvature: Curve | None = None
    every: int = 1
    """Updates between two losses of ``plasticity``."""


def figure(report: FlowReport) -> Figure:
    """One panel for each diagnostic that the report has, side by side.

    Raises:
        ConfigurationError: the report is empty.
    """
    from matplotlib.figure import Figure

    panels = _panels(report)
    if not panels:
        raise ConfigurationError("the report of flow diagnostics is empty; expected at least one result to draw")
    drawn = Figure(figsize=(4 * len(panels), 3.2), layout="constrained")
    for axes, (title, x_label, y_label, lines) in zip(
        drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for name, (x, y) in lines.items():
            axes.plot(x, y, marker="o" if len(x) < 20 else None, label=name)
        axes.set(title=title, xlabel=x_label, ylabel=y_label)
        if len(lines) > 1:
            axes.legend()
    return drawn


Lines = dict[str, tuple[Sequence[float], Curve]]
"""x and y of each, by name."""
Panel = tuple[str, str, str, Lines]
"""Title, labels of the axes, and lines by name."""


def _panels(report: FlowReport) -> list[Panel]:
    panels: list[Panel] = []
    errors: Lines = {}
    if report.value_errors is not None:
        errors["after k steps"] = range(1, len(report.value_errors) + 1), report.value_errors
    if report.recovery is not None:
        errors["first k by an old copy"] = range(len(report.recovery)), report.recovery
    if errors:
        panels.append(("recovery", "k", "error of the value", errors))
    if report.plasticity is not None:
        losses: Lines = {
            name: (range(0, len(curve) * report.every, report.every), curve)
            for name, curve in report.plasticity.items()
        }
        panels.append(("features frozen", "update of the head", "loss or error", losses))
    if report.noise is not None:
        costs: Lines = {name: (report.magnitudes, curve) for name, curve in report.noise.items()}
        panels.append(("noise in targets", "M", "error of the value", costs))
    if report.norms is not None:
        norms: Lines = {name: (_times(curve), curve) for name, curve in report.norms.items()}
        panels.append(("norms of features", "t", "mean norm", norms))
    if report.curvature is not None:
        panels.append(("curvature", "t", "E|v(t) - v(0)|", {"": (_times(report.curvature), report.curvature)}))
    return panels


def _times(values: Curve) -> Sequence[float]:
    """k/K for k = 0..K-1."""
    return [index / len(values) for index in range(len(values))]

"""Flow-matching critics (floq, arXiv 2509.06863): Q(s, a) is where a learned ordinary differential equation ends.

A velocity v(t, z | s, a) moves a number z from noise at t = 0 to the value at t = 1:

    z_0 ~ U[-kappa c, kappa c]                                    c: the support; kappa: the share that noise covers
    z <- z + v(k/K, z) / K,   k = 0..K-1                          reading: K Euler steps, averaged over noises
    y = r + discount mean_i [ Q'_i(s', a'_i) - alpha log pi(a'_i|s') ]    m noises z_0, each with an a' of its own
    (v(t, (1 - t) z_0 + t y) - (y - z_0))^2                       loss: m fresh noises and times t ~ U[0, 1] per row

The entropy term is SAC's, and y is clipped to [-c, c]. Values are scaled returns. The actor never differentiates
through the reading: it climbs a scalar critic that is regressed onto it, or a single Euler step.

Shapes: z is (M, m, B), or (m, B) or (m, 1) where members or rows share it: all members, noises and rows are one pass.
A `Velocity` takes z and a time that broadcasts to it, and returns (M, m, B).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlplastic.config import FlowCriticConfig

BINS = 50
"""Of the code of z [floq]."""
SIGMA = 16.0
"""Standard deviation of the code, in bin widths [floq]."""
MARGIN = 0.1
"""The code reaches this much further than the support, in supports: Euler steps overshoot a little."""
FREQUENCIES = {
    "cosines": [math.pi * k for k in range(64)],
    "cosine": [1.0],
    "none": [],
}
"""Angular frequencies of the cosines that tell a network the time, by `critic.time_embedding`: as the paper says; as
its released code does; and nothing."""

Velocity = Callable[[Tensor, Tensor], Tensor]


class Field(Protocol):
    """An agent's network of velocities: a module with ``given``."""

    @property
    def given(self) -> Callable[..., Velocity]:
        """Of observations, actions and the agent's own modes: the velocity there."""
        ...


class FlowNoise(NamedTuple):
    """Everything random of one critic loss."""

    action: Tensor
    """Standard normal, (m, B, A): each target noise has an a' of its own."""
    target: Tensor
    """Where the integration of the target begins, (m, B) or (m, 1)."""
    source: Tensor
    """z_0 of the loss, (m, B)."""
    time: Tensor
    """t of the loss, (m, B)."""
    reading: Tensor
    """Where the integration of Q(s, a) begins, (m, B) or (m, 1)."""


class Encoding(nn.Module):
    """z and t as a network reads them: an HL-Gauss code (arXiv 2403.03950) and cosines.

    Args:
        support: values lie in [-support, support].
        time_embedding: one of `FREQUENCIES`.
        dim: where features lie in the results, counted from the end: -1 behind z's dimensions, -3 before (m, B).
    """

    edges: Tensor
    frequencies: Tensor

    def __init__(self, support: float, time_embedding: str, dim: int) -> None:
        super().__init__()
        self._dim = dim
        reach = support * (1 + MARGIN)
        frequencies = torch.tensor(FREQUENCIES[time_embedding])
        self.num_times = len(frequencies)
        self.register_buffer("edges", self._along(torch.linspace(-reach, reach, BINS + 1)), persistent=False)
        self.register_buffer("frequencies", self._along(frequencies), persistent=False)

    def _along(self, features: Tensor) -> Tensor:
        return features.view(-1, *(1 for _ in range(-self._dim - 1)))

    def code(self, z: Tensor) -> Tensor:
        """Mass of N(z, sigma^2) in every bin, `BINS` features that sum to 1; z is cut off to the range of the bins.

        With (…, m, B) the code is (…, m, B, BINS), or (…, BINS, m, B).
        """
        first, last = self.edges.select(self._dim, 0), self.edges.select(self._dim, BINS)
        per_deviation = BINS / (math.sqrt(2) * SIGMA * (last - first))
        inside = torch.maximum(torch.minimum(z, last), first) * per_deviation
        cumulative = torch.erf(self.edges * per_deviation - inside.unsqueeze(self._dim))
        ends = cumulative.select(self._dim, BINS) - cumulative.select(self._dim, 0)  # what the masses sum to
        return cumulative.diff(dim=self._dim) / ends.unsqueeze(self._dim)

    def time(self, time: Tensor) -> Tensor:
        """Cosines of ``time``, (m, B) or (1, 1), with features where a code has them."""
        return torch.cos(self.frequencies * time.unsqueeze(self._dim))


class FlowCritic(nn.Module):
    """An ensemble of flows, and the scalar critics that are regressed onto them.

    Args:
        field: the agent's `VelocityField`.
        distilled: the agent's scalar `Critic`, or None where the actor climbs one Euler step.
        settings: of the flow.
    """

    bank: Tensor
    """Noises (m, 1) that come in pairs z, -z: what `forward` and one Euler step always begin with."""

    def __init__(self, field: Field, distilled: nn.Module | None, settings: FlowCriticConfig) -> None:
        super().__init__()
        self.field, self.distilled, self.settings = field, distilled, settings
        self.support, self.reach = settings.support, settings.coverage * settings.support
        half = torch.rand(settings.noises // 2, 1)
        self.register_buffer("bank", self.reach * torch.cat((half, torch.zeros(settings.noises % 2, 1), -half)))

    def forward(self, observation: Tensor, action: Tensor, *modes: bool) -> Tensor:
        """Q of every member, (members, B): the mean end point over the bank, the same in every call."""
        return self.trajectory(self.field.given(observation, action, *modes), self.bank)[-1].mean(-2)

    def value(self, observation: Tensor, action: Tensor, *modes: bool) -> Tensor:
        """What an actor climbs, (B,); the same noises for all actions, or they would rank them."""
        if self.distilled is not None:
            return over_members(self.distilled(observation, action, *modes), self.settings.actor_members)
        velocity = self.field.given(observation, action, *modes)
        return over_members(self.trajectory(velocity, self.bank, 1)[-1].mean(-2), self.settings.actor_members)

    def trajectory(self, output: Velocity, source: Tensor, steps: int | None = None) -> list[Tensor]:
        """z at times 0, 1/K, …, 1 from ``source``; K is ``steps``, or the setting."""
        steps = steps or self.settings.steps
        points = [source]
        for step in range(steps):
            points.append(self.euler_step(output, points[-1], step, steps))
        return points

    def euler_step(self, output: Velocity, z: Tensor, step: int, steps: int) -> Tensor:
        """From z at time step/steps to z one step later.

        With ``prediction=endpoint`` outputs are ends z_1 of the path, and (z_1 - z) / (1 - t) is the velocity.
        """
        moved = output(z, z.new_full((1, 1), step / steps))
        if self.settings.prediction == "endpoint":
            moved = (moved - z) / (1 - step / steps)
        return z + moved / steps

    def losses(self, output: Velocity, source: Tensor, time: Tensor, target: Tensor) -> Tensor:
        """Squared errors (members, B) on the straight paths from ``source`` to ``target`` (B,), mean over noises."""
        aim = target - source if self.settings.prediction == "velocity" else target
        return (output((1 - time) * source + time * target, time) - aim).square().mean(-2)

    def target(self, endpoints: Tensor, reward: Tensor, discount: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
        """The clipped target (B,), and what it was before it was clipped.

        Args:
            endpoints: (members, m, B) of the target field at (s', a'_i).
            reward: (B,), scaled.
            discount: (B,), 0 if terminated.
            bonus: (m, B), -alpha log pi(a'_i|s').
        """
        soft = (over_members(endpoints, self.settings.target_members) + bonus).mean(0)
        target = reward + discount * soft
        return target.clamp(-self.support, self.support), target

    def noise(self, rows: int, action_dim: int, rng: torch.Generator) -> FlowNoise:
        """Draw everything random of one loss on ``rows`` rows from ``rng``."""
        noises, device = self.settings.noises, self.bank.device
        action = torch.randn(noises, rows, action_dim, generator=rng, device=device)
        target, source, time, reading = torch.rand(4, noises, rows, generator=rng, device=device).unbind()
        if self.settings.noise == "bank":
            return FlowNoise(action, self.bank, self._spread(source), time, self.bank)
        return FlowNoise(action, self._spread(target), self._spread(source), time, self._spread(reading))

    def _spread(self, uniform: Tensor) -> Tensor:
        return self.reach * (2 * uniform - 1)


def over_members(values: Tensor, which: str) -> Tensor:
    """The smallest or the mean of (members, …) over members."""
    return values.amin(0) if which == "min" else values.mean(0)

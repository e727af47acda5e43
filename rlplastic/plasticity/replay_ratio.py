"""How many gradient updates a transition is worth, decided from measurements: rules as pure state machines on numbers.

At the end of every window of environment steps a rule is given what was read of the critic, and answers with a ratio
and the reason.

`PlateauRule` is the published one (Ma et al., "Revisiting Plasticity in Visual Reinforcement Learning", arXiv
2310.07418): a low ratio until the fraction of active units moved by at most 0.001 from one window to the next, then a
high one, once and for good. Its findings stand behind both rules: early loss of plasticity cannot be repaired later,
late loss is benign. It needs a signal that moves: with a batch norm before every rectifier the fraction of active units
stays near one half, and the rule fires at its first comparison.

`ContinuousRule` is ours. Of any signals x, each smoothed to a level f and compared with a reference m:

    f <- f + (x - f) / memory
    e = 3 sqrt(v / (2 memory - 1))         three standard errors of a level, where v is the noise of a reading:
    v: mean of (x - x_before)^2 / 2        over up to 4 memory windows before this one
    w = s (f - m)                          s = +1 where larger is worse, else -1
    d = w' / max(|m|, floor)               w' is w, nearer to 0 by e, and 0 within e
    ratio <- min(high, ratio * step)       if max d < calm
    ratio <- max(low, ratio / step)        if max d > alarm
    m <- m + s w'                          if w' < 0
    m <- m + (f - m) / memory              if w > 0, but only while ratio = low

So it starts low, rises while nothing is worse than the best it was, falls while something is, and may rise again.
Between ``calm`` and ``alarm`` it holds: a change of direction takes a change of the signals by the difference of the
two. A level that is worse is accepted only if it stays so at the least ratio, where updates are not to blame: a
reference that always followed would forget what the ratio does, and let it creep up to its bound. What noise explains
is no change, neither for better nor for worse: the best of many noisy levels lies below those that follow, and a signal
that moves by more than ``alarm`` between two windows would hold the ratio at its least for ever. Noise is read from
neighbouring windows, where a trend hardly shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from rlplastic.errors import ConfigurationError

Source = Literal["forward", "ranks", "gradients", "td_error"]


@dataclass(frozen=True)
class Signal:
    """What is read, and how a change of it is understood.

    Args:
        metric: its name among the results of `rlplastic.plasticity.measure`, or in TD errors.
        source: what gives it: a tier, one backward pass, or TD errors on held-out and training transitions.
        low_is_worse: the direction that is read as loss.
        floor: the least that a change is divided by: signals that are shares of units start from 0.
    """

    metric: str
    source: Source
    low_is_worse: bool = False
    floor: float = 1e-12


SHARE = 0.1
"""Floor of shares of units: one dormant unit among a thousand is no alarm."""
SIGNALS: dict[str, Signal] = {
    "fau": Signal("active_fraction", "forward", low_is_worse=True, floor=SHARE),
    "dormant": Signal("dormant", "forward", floor=SHARE),
    "dead": Signal("dead", "forward", floor=SHARE),
    "linearised": Signal("linearised", "forward", floor=SHARE),
    "duplicates": Signal("duplicates", "forward", floor=SHARE),
    "weight_norm": Signal("weight_norm", "forward"),
    "angular_speed": Signal("angular_speed", "forward", low_is_worse=True),
    "logit_entropy": Signal("logit_entropy", "forward", low_is_worse=True),
    "effective_rank": Signal("effective_rank", "ranks", low_is_worse=True),
    "srank": Signal("srank_0.01", "ranks", low_is_worse=True),
    "stable_rank": Signal("stable_rank", "ranks", low_is_worse=True),
    "geometric_stability": Signal("geometric_stability", "ranks", low_is_worse=True, floor=SHARE),
    "gradient_dormant": Signal("gradient_dormant", "gradients", floor=SHARE),
    "held_out_td_error": Signal("held_out", "td_error"),
    "td_gap": Signal("gap", "td_error", floor=1.0),  # a share of the training error already
}
"""Every signal by its name: fau is the fraction of active units, td_gap the gap of TD errors over that in training."""


@dataclass(frozen=True)
class Decision:
    """What a rule decided at the end of a window.

    ratio: from now on; move: +1, 0 or -1, the way it went; reason: a sentence; worse: by how much each signal got worse
    (d above; for `PlateauRule` how far it moved), without those that could not be compared.
    """

    ratio: float
    move: int
    reason: str
    worse: Mapping[str, float]


class Rule(Protocol):
    """A state machine that is asked once per window."""

    ratio: float

    def decide(self, readings: Mapping[str, float]) -> Decision:
        """The ratio from now on; signals that are missing or not finite were not available in this window."""
        ...

    def rebase(self) -> None:
        """The network was edited: readings from before say nothing of those to come; the ratio stays."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """All of its state, as JSON can hold it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, bit for bit."""
        ...


class PlateauRule:
    """``low`` until the signal moved by at most ``tolerance`` from one window to the next; then ``high`` for good.

    Args:
        signal: which reading.
        low: first ratio; published 0.5.
        high: second ratio; published 2.
        tolerance: published 0.001.
    """

    def __init__(self, signal: str = "fau", low: float = 0.5, high: float = 2.0, tolerance: float = 1e-3) -> None:
        self.signal, self.low, self.high, self.tolerance = signal, low, high, tolerance
        self.ratio = low
        self._fired = False
        self._previous: float | None = None

    def decide(self, readings: Mapping[str, float]) -> Decision:
        """See `Rule.decide`; only neighbouring windows are compared."""
        value = readings.get(self.signal, math.nan)
        before, self._previous = self._previous, value if math.isfinite(value) else None
        if self._fired:
            return Decision(self.ratio, 0, "the plateau was reached, and the ratio stays", {})
        if before is None or self._previous is None:
            return Decision(self.ratio, 0, f"{self.signal} has no two neighbouring readings yet", {})
        moved = abs(value - before)
        told = f"{self.signal} moved by {moved:.2g} in a window"
        if not moved <= self.tolerance:
            return Decision(self.ratio, 0, f"{told}, more than {self.tolerance:g}", {self.signal: moved})
        self._fired, self.ratio = True, self.high
        return Decision(self.ratio, 1, f"{told}, at most {self.tolerance:g}: a plateau", {self.signal: moved})

    def rebase(self) -> None:
        """See `Rule.rebase`; a rule that fired has fired for good."""
        self._previous = None

    def state_dict(self) -> dict[str, Any]:
        """See `Rule.state_dict`."""
        return {"fired": self._fired, "previous": self._previous}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Rule.load_state_dict`."""
        self._fired, self._previous = state["fired"], state["previous"]
        self.ratio = self.high if self._fired else self.low


NOISE = 3.0
"""Standard errors of a level that noise may have done."""


class Noise(NamedTuple):
    """What is known of a signal's noise: the last value, and half the mean square of so many differences."""

    last: float
    variance: float
    differences: int

    def after(self, value: float, memory: float) -> Noise:
        """With one more value; the mean goes back ``memory`` differences."""
        seen = self.differences + 1
        variance = self.variance + ((value - self.last) ** 2 / 2 - self.variance) / min(seen, memory)
        return Noise(value, variance, seen)


class ContinuousRule:
    """Rises in small steps while no signal is worse than its reference, and falls while one is; see above.

    Args:
        low: the first and the least ratio.
        high: the most.
        step: factor of one move, above 1.
        calm: it rises while no signal is worse by this relative amount.
        alarm: it falls while one is worse by more than this, which is at least ``calm``.
        memory: windows that levels go back, at least 1.

    Raises:
        ConfigurationError: the numbers contradict each other.
    """

    def __init__(
        self,
        low: float,
        high: float,
        step: float = 1.05,
        calm: float = 0.05,
        alarm: float = 0.1,
        memory: float = 5.0,
    ) -> None:
        if not (0 < low <= high and step > 1 and calm <= alarm and memory >= 1):
            raise ConfigurationError(
                f"low={low:g}, high={high:g}, step={step:g}, calm={calm:g}, alarm={alarm:g} and memory={memory:g} do "
                "not go together; expected 0 < low <= high, step > 1, calm <= alarm and memory >= 1"
            )
        self.low, self.high, self.step = low, high, step
        self.calm, self.alarm, self.memory = calm, alarm, memory
        self.ratio = low
        self._levels: dict[str, float] = {}
        self._references: dict[str, float] = {}
        self._noises: dict[str, Noise] = {}

    def decide(self, readings: Mapping[str, float]) -> Decision:
        """See `Rule.decide`; the first reading of a signal is what its reference begins with, and moves nothing."""
        worse: dict[str, float] = {}
        for name, value in readings.items():
            if math.isfinite(value):
                known = name in self._references
                change = self._take(name, value)
                worse |= {name: change} if known else {}
        if not worse:
            return Decision(self.ratio, 0, "no signal can be compared yet", worse)
        name = max(worse, key=lambda each: worse[each])
        before, alarmed = self.ratio, worse[name] > self.alarm
        calm = not alarmed and worse[name] < self.calm
        where = "above alarm" if alarmed else "below calm" if calm else "between calm and alarm"
        told = f"{name} is {worse[name]:.1%} worse than its reference, {where}"
        if worse[name] <= 0:
            told = "no signal is worse than at its best by more than its noise"
        if alarmed:
            self.ratio = max(self.low, before / self.step)
        elif calm:
            self.ratio = min(self.high, before * self.step)
        if self.ratio == before and (alarmed or calm):
            told += f", and {before:g} is the {'least' if alarmed else 'most'}"
        return Decision(self.ratio, (self.ratio > before) - (self.ratio < before), told, worse)

    def _take(self, name: str, value: float) -> float:
        """Move the level and the reference of a signal; returns by how much it is worse than the reference was."""
        signal = SIGNALS[name]
        level = self._levels.get(name, value)
        level += (value - level) / self.memory
        reference = self._references.get(name, level)
        sign = -1 if signal.low_is_worse else 1
        worse = sign * (level - reference)
        noise = self._noises.get(name, Noise(value, 0.0, 0))
        allowed = NOISE * math.sqrt(noise.variance / (2 * self.memory - 1))
        beyond = math.copysign(max(abs(worse) - allowed, 0.0), worse)
        change = beyond / max(abs(reference), signal.floor)
        if worse <= 0:
            reference += sign * beyond
        elif self.ratio == self.low:
            reference += (level - reference) / self.memory
        self._levels[name], self._references[name] = level, reference
        self._noises[name] = noise.after(value, 4 * self.memory) if name in self._noises else noise
        return change

    def rebase(self) -> None:
        """See `Rule.rebase`; the next reading is what references begin with."""
        self._levels, self._references, self._noises = {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """See `Rule.state_dict`."""
        return {
            "ratio": self.ratio,
            "levels": dict(self._levels),
            "references": dict(self._references),
            "noises": {name: list(noise) for name, noise in self._noises.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Rule.load_state_dict`."""
        self.ratio = state["ratio"]
        self._levels, self._references = dict(state["levels"]), dict(state["references"])
        self._noises = {name: Noise(*noise) for name, noise in state.get("noises", {}).items()}  # none in older ones

"""When to intervene, and why: screen -> probe -> act -> verify, then commit or roll back.

No passive metric has been shown to time an intervention, and a reset of a healthy network is pure harm. So cheap
metrics only raise alarms (`screen`); a trainability probe decides whether a network is ill (`probe`); the smallest
intervention that heals a discarded copy is chosen (`act`) and carried out on a *branch*, a copy of the learner that
learns from the same batches with the same noise while the untouched learner goes on acting; both are judged on targets
that neither of them made (`verify`). Better or equal is committed, and taken back if the return does not recover; all
else is dropped.

The four functions are pure; `rlplastic.plasticity.decision_loop` calls them in that order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.interventions import INTERVENTIONS, Intervention
from rlplastic.plasticity.patient import Patient, copy_of
from rlplastic.plasticity.probe import Probe, in_words
from rlplastic.plasticity.probe import probe as measure_probe
from rlplastic.plasticity.representation import rank_correlation

AGENT_RESET = "agent_reset"
"""A rung of the ladder: a full reset of all networks at once. A policy that followed an ill critic is as far astray,
and its temperature with it: on HalfCheetah and Walker2d a fresh critic alone did not help (docs/experiments.md)."""
CHANCE = 3.0
"""Rank correlations up to this many of their standard errors, 1 / sqrt(rows), say nothing: rows of a replay follow each
other, so that two errors would be too few."""
FURTHER = 0.7
"""After a false alarm the metric must get worse by this factor before it may raise another."""


@dataclass(frozen=True)
class Screen:
    """When a metric raises an alarm: the factors by which it may differ from its references."""

    low_is_ill: bool
    fresh: float
    """From a fresh network's on the same batch; a run can be ill before it has had a healthy phase."""
    own: float
    """From the worst of the run's own early phase."""


SCREENS: dict[str, Screen] = {
    "effective_rank": Screen(low_is_ill=True, fresh=0.18, own=0.4),
    "weight_norm": Screen(low_is_ill=False, fresh=3.0, own=3.0),
}
"""By metric; calibrated on `benchmarks/illnesses`. Healthy critics kept 0.2 of a fresh network's rank and more. Ill
ones had 3.1 times its weights and more, healthy ones up to 5: a false alarm costs a probe, a missed one the run."""


RUNAWAY = 5.0
"""A `value_bias` beyond this raises an alarm: healthy critics of four tasks stayed below 2.7, runaway ones had 7.5 to
millions (docs/experiments.md). A fresh network is no reference: its values are near 0 and mean nothing."""


@dataclass(frozen=True)
class Rules:
    """What the monitor goes by; `rlplastic.plasticity_config` says each in a sentence. Cadences are in updates."""

    forward_every: int = 1_000
    ranks_every: int = 10_000
    probe_every: int = 50_000
    probe_steps: int = 300
    probe_functions: int = 3
    ill: float = 1.5
    ill_gap: float = 0.1
    healthy: float = 1.2
    ladder: tuple[str, ...] = (
        "optimizer_reset",
        "redo",
        "last_layer_reset",
        "shrink_and_perturb",
        AGENT_RESET,
    )
    max_interventions: int = 4
    budget: float = 0.15
    planned_updates: int | None = None
    verify_updates: int = 2_000
    verify_rounds: int = 4
    value_margin: float = 0.1
    rank_margin: float = 0.05
    return_margin: float = 0.2
    recovery_updates: int = 5_000
    cooldown: int = 5_000

    def __post_init__(self) -> None:
        if unknown := [name for name in self.ladder if name not in rungs()]:
            raise ConfigurationError(f"{unknown[0]!r} is no intervention; expected some of {', '.join(rungs())}")


def rungs() -> list[str]:
    """What a ladder may be made of."""
    return [*INTERVENTIONS, AGENT_RESET]


def intervention_of(rung: str) -> Intervention:
    """What is done to each network that a rung treats."""
    return INTERVENTIONS["full_reset" if rung == AGENT_RESET else rung]


# Screen


@dataclass(frozen=True)
class Alarm:
    """A metric beyond its limit."""

    metric: str
    value: float
    limit: float
    reference: str
    """What the limit comes from: ``a fresh network``, ``its early phase`` or ``the size of returns``."""

    @property
    def module(self) -> str:
        """``critic`` of ``plasticity/critic/all/weight_norm``."""
        return self.metric.split("/")[1]


def screen(
    measured: Mapping[str, float],
    fresh: Mapping[str, float],
    early: Mapping[str, float],
    tolerated: Mapping[str, float],
) -> list[Alarm]:
    """Cheap alarms; only what is named here is looked at, and only where it is informative.

    Args:
        measured: informative metrics by name (`rlplastic.plasticity.measure`).
        fresh: the same of fresh networks on the same batch.
        early: the worst value of each in the run's early phase, once that is over.
        tolerated: values that turned out to be false alarms.
    """
    alarms = []
    for metric, value in measured.items():
        if metric.endswith("/value_bias"):
            limit = max(RUNAWAY, tolerated.get(metric, 0.0) / FURTHER)
            if value > limit:  # NaN, where all returns are 0, is not
                alarms.append(Alarm(metric, value, limit, "the size of returns"))
            continue
        rule = rule_of(metric)
        if rule is None or metric not in fresh:
            continue
        limits = {"a fresh network": rule.fresh * fresh[metric]}
        if metric in early:
            limits["its early phase"] = rule.own * early[metric]
        strictest = max if rule.low_is_ill else min
        reference = strictest(limits, key=lambda name: limits[name])
        limit = limits[reference]
        if metric in tolerated:
            further = tolerated[metric] * (FURTHER if rule.low_is_ill else 1 / FURTHER)
            limit = min(limit, further) if rule.low_is_ill else max(limit, further)
        inside = value >= limit if rule.low_is_ill else value <= limit
        if not inside:  # NaN is not
            alarms.append(Alarm(metric, value, limit, reference))
    return alarms


def rule_of(metric: str) -> Screen | None:
    """The rule for ``plasticity/<module>/<layer>/<metric>``; norms are those of whole modules, means over members."""
    *_, layer, name = metric.split("/")
    return None if name == "weight_norm" and layer != "all" else SCREENS.get(name)


def worst_of(metric: str, readings: list[float]) -> float:
    """The reading of a metric that is nearest to illness."""
    rule = rule_of(metric)
    assert rule is not None, "only what can raise an alarm has a worst"
    return min(readings) if rule.low_is_ill else max(readings)


# Probe


def probe(patients: Mapping[str, Patient], key: int, rules: Rules) -> dict[str, Probe]:
    """How fast each network learns beside a fresh one, on its own replay states; none of them is touched."""
    return {
        name: measure_probe(patient, patient.states, key, rules.probe_steps, rules.probe_functions)
        for name, patient in patients.items()
    }


def is_ill(found: Probe, rules: Rules) -> bool:
    """Whether a member learns too slowly; one that met a NaN counts as ill.

    By ratio and by area: where both networks learn nearly all at once, as categorical critics do, the ratio of two
    small areas says nothing.
    """
    areas = zip(found.members, found.areas, found.fresh_areas, strict=True)
    return any(not (ratio <= rules.ill or area - fresh <= rules.ill_gap) for ratio, area, fresh in areas)


# Act


@dataclass(frozen=True)
class Attempt:
    """An intervention tried on a discarded copy."""

    intervention: str
    ratio: float | None
    """Of the treated copy, worst member; None where there was none."""
    remark: str = ""


def act(
    patient: Patient, ill: Probe, key: int, rules: Rules, dropped: Collection[str] = ()
) -> tuple[str | None, list[Attempt], int]:
    """The smallest intervention of the ladder that brings a discarded copy below ``rules.healthy``.

    One function of the probe is enough here: the branch is probed with all of them later.

    Args:
        patient: which is ill; it is not touched.
        ill: its probe.
        key: of the interventions' randomness; the same key repeats on the branch what was tried here.
        rules: the ladder and the bound.
        dropped: interventions that healed copies, but whose branches were no good.

    Returns:
        Its name, or None if none suffices; what was tried; the cost in optimizer steps.
    """
    attempts: list[Attempt] = []
    reference: Probe | None = None
    cost = 0
    for name in rules.ladder:
        if name in dropped:
            attempts.append(Attempt(name, None, "its branch was dropped before"))
            continue
        candidate = copy_of(patient)
        try:
            applied = intervention_of(name)(candidate, key)
        except ConfigurationError as error:
            attempts.append(Attempt(name, None, f"does not apply: {error}"))
            continue
        if not applied.touched:  # a probe starts with an optimizer of its own, so it cannot see such an intervention
            attempts.append(Attempt(name, ill.worst, "no weight changes"))
            continue
        tried = measure_probe(candidate, candidate.states, key, rules.probe_steps, 1, reference=reference)
        reference = reference or tried
        cost += applied.updates + tried.updates
        attempts.append(Attempt(name, tried.worst))
        if tried.worst <= rules.healthy:
            return name, attempts, cost
    return None, attempts, cost


# Verify


@dataclass(frozen=True)
class Evidence:
    """Twin and branch on common targets: what both say of the same transitions, which neither of them judged.

    Args:
        twin: values (rows,) of the untouched critic, mean over members.
        branch: those of the branch's.
        returns: (rows,) discounted returns of the data, bootstrapped where they are cut by the critic from before.
        frozen: (rows,) one-step targets of the target network from before the intervention.
        source: where the transitions come from.
        policy: value by that network of the twin's and the branch's actions, where the policy was treated.
        unaided: (rows,) the returns bootstrapped with their own mean, in which no critic has a say; None where none
            was cut.
    """

    twin: Tensor
    branch: Tensor
    returns: Tensor
    frozen: Tensor
    source: str
    policy: tuple[float, float] | None = None
    unaided: Tensor | None = None


def unaided_returns(reward: Tensor, discount: Tensor) -> Tensor:
    """Discounted sums of rewards, and where they were cut the mean of what this gives for all rows.

    Args:
        reward: (rows,) what was summed.
        discount: (rows,) of what follows, 0 where the episode terminated.

    Returns:
        (rows,) reward + discount m, whose mean is m = mean(reward) / (1 - mean(discount)).
    """
    following = reward.double().mean() / (1 - discount.double().mean())
    return reward + discount * following.to(reward.dtype)


@dataclass(frozen=True)
class Standing:
    """How a critic stands to the common targets; errors are mean absolute ones in deviations of the target."""

    rank_correlation: float
    return_error: float
    frozen_error: float


@dataclass(frozen=True)
class Verdict:
    """Whether a branch may take the twin's place."""

    accepted: bool
    better: bool
    """Beyond the margins; equal is accepted too, since the branch learns faster."""
    objections: tuple[str, ...]
    twin: Standing
    branch: Standing
    ratio: float
    """Of the branch's probe, worst member."""
    frozen_counts: bool
    """Whether the frozen network explains returns better than their mean does; only then is it a judge."""
    source: str

    @property
    def gain(self) -> float:
        """How much smaller the branch's error against returns is, as a share of the twin's (taken as 0.01 at least)."""
        return 1 - self.branch.return_error / max(self.twin.return_error, 0.01)


def standing(values: Tensor, returns: Tensor, frozen: Tensor) -> Standing:
    """See `Standing`; NaN for the rank correlation of constant values."""

    def error(target: Tensor) -> float:
        spread = target.double().std(correction=0).clamp(min=1e-12)
        return float((values.double() - target.double()).abs().mean() / spread)

    return Standing(float(rank_correlation(values, returns)), error(returns), error(frozen))


def verify(evidence: Evidence, found: Probe, rules: Rules) -> Verdict:
    """Judge a branch against its untouched twin: its probe, ranks of returns, errors on common targets.

    Never by a branch's own target, which a critic copied from it would meet perfectly. The frozen target binds both to
    what the critic knew before, beyond the returns of old policies; an ill critic's knows nothing, and then does not
    count, neither alone nor at the end of returns that were cut. A twin that orders transitions by chance has no order
    that a branch could lose.
    """
    unaided = evidence.returns if evidence.unaided is None else evidence.unaided
    missed = (evidence.frozen.double() - unaided.double()).square().mean()
    frozen_counts = bool(missed < unaided.double().var(correction=0))
    returns = evidence.returns if frozen_counts else unaided
    twin = standing(evidence.twin, returns, evidence.frozen)
    branch = standing(evidence.branch, returns, evidence.frozen)
    chance = CHANCE / math.sqrt(len(returns))
    margin, objections = rules.value_margin, []
    if not found.worst <= rules.healthy:
        objections.append(f"it learns {in_words(found.worst)}")
    if math.isnan(branch.rank_correlation):
        objections.append("it gives all transitions the same value")
    elif twin.rank_correlation > chance and branch.rank_correlation < twin.rank_correlation - rules.rank_margin:
        objections.append("it orders transitions worse by their returns")
    if not branch.return_error <= twin.return_error + margin:
        objections.append("it is further from the returns")
    if frozen_counts and not branch.frozen_error <= twin.frozen_error + margin:
        objections.append("it is further from the frozen target")
    if frozen_counts and evidence.policy is not None:
        least = evidence.policy[0] - margin * float(evidence.returns.std())
        if not evidence.policy[1] >= least:
            objections.append("its policy is worth less by the frozen target")
    better = branch.return_error < twin.return_error - margin or (
        branch.rank_correlation > twin.rank_correlation + rules.rank_margin
    )
    return Verdict(
        accepted=not objections,
        better=better and not objections,
        objections=tuple(objections),
        twin=twin,
        branch=branch,
        ratio=found.worst,
        frozen_counts=frozen_counts,
        source=evidence.source,
    )

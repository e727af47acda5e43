"""The decision loop: when each of the monitor's four functions is called, what for, and what follows.

    watching -> (alarm, or the cadence) probe -> ill: act -> branch -> verify -> commit -> recovery window -> watching
                                          |                     |                            |
                                          healthy: watching     worse: dropped               return lost: taken back

`PlasticityMonitor` knows modules and callables only: whoever trains hands in a `Host` and calls `after_update` and
`episode`. It draws nothing, reads no clock, and where it may not act it changes nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Generic, Literal, Protocol, TypeVar

from rlplastic.plasticity import wording
from rlplastic.plasticity.interventions import INTERVENTIONS
from rlplastic.plasticity.monitor import (
    AGENT_RESET,
    Alarm,
    Evidence,
    Rules,
    act,
    intervention_of,
    is_ill,
    probe,
    rule_of,
    screen,
    verify,
    worst_of,
)
from rlplastic.plasticity.patient import Patient
from rlplastic.plasticity.probe import Probe
from rlplastic.plasticity.recovery import Recovery

L = TypeVar("L")
"""A learner: whatever the host trains."""
Mode = Literal["watch", "full", "scheduled"]
CALIBRATION = 5
"""Readings of a metric that make up the early phase of a run."""
RECENT = 20
"""Training episodes whose mean return is that of the moment."""


class Host(Protocol[L]):
    """What the monitor asks of whoever trains."""

    def measure(self, tier: Literal["forward", "ranks"], updates: int) -> tuple[dict[str, float], dict[str, float]]:
        """Informative metrics of the live networks, and of fresh ones on the same batch."""
        ...

    def patients(self, learner: L | None, updates: int) -> Mapping[str, Patient]:
        """The networks of a branch, or of the live learner, with replay states of this update."""
        ...

    def probe_cost(self, module: str) -> float:
        """What one optimizer step of a probe costs, in updates."""
        ...

    def branch(self) -> L:
        """A copy that is trained beside the live learner from now on, until `adopt` or `drop`."""
        ...

    def evidence(self, branch: L, treated: Collection[str]) -> Evidence:
        """What live learner and branch say of common targets, made when the branch was; ``treated`` names patients."""
        ...

    def adopt(self, branch: L) -> None:
        """Put the branch into the live learner's place, in place; what was there can be brought back."""
        ...

    def take_back(self) -> None:
        """Bring back what was there before `adopt`."""
        ...

    def drop(self) -> None:
        """Forget the branch, or what was there before `adopt`."""
        ...

    def rebase(self) -> None:
        """The live networks were edited: references to earlier weights start from now."""
        ...

    def tell(self, event: Mapping[str, Any], sentence: str) -> None:
        """Record a decision with its evidence."""
        ...


@dataclass
class Case(Generic[L]):
    """An intervention that is being verified on a branch."""

    branch: L
    patient: str
    intervention: str
    ratio: float
    """Of the ill network's probe."""
    since: int
    due: int
    """The update at which the branch is judged."""
    rounds: int = 1


def _treated(rung: str, patient: str, patients: Mapping[str, Patient]) -> tuple[str, ...]:
    """The networks that a rung treats when one of them is ill."""
    return tuple(patients) if rung == AGENT_RESET else (patient,)


class PlasticityMonitor(Generic[L]):
    """Watches a learner, and acts on it as far as its mode allows.

    Args:
        host: see `Host`.
        rules: thresholds, cadences, budget.
        mode: ``watch`` only screens; ``full`` goes all the way; ``scheduled`` intervenes at given updates, unasked.
        key: names and numbers to the key of a random draw.
        schedule: for ``scheduled``: the intervention, and whether it is due at an update.
    """

    def __init__(
        self,
        host: Host[L],
        rules: Rules,
        mode: Mode,
        key: Callable[..., int],
        schedule: tuple[str, Callable[[int], bool]] | None = None,
    ) -> None:
        self.host, self.rules, self.mode, self._key, self._schedule = host, rules, mode, key, schedule
        self.case: Case[L] | None = None
        self.recovery: Recovery | None = None
        self.interventions = self.false_alarms = self.examinations = 0
        self.spent = 0.0
        """On probes and branches, in updates."""
        self._resting_until = 0
        self._raised: set[str] = set()
        self._early: dict[str, list[float]] = {}
        self._tolerated: dict[str, float] = {}
        self._dropped: list[str] = []
        """Interventions whose branches were no good, since the last one that was."""
        self._recent: deque[float] = deque(maxlen=RECENT)

    # What the host calls

    def after_update(self, updates: int, waiting: bool = False) -> None:
        """Do what is due after the ``updates``-th update of the live learner and, if there is one, of the branch.

        While the learner is ``waiting`` for new transitions, whatever makes it ill on those it has is still at work and
        no return would tell of a treatment: it is read, but not probed.
        """
        if self._schedule is not None and self._schedule[1](updates):
            self._intervene_as_scheduled(self._schedule[0], updates)
        if self.case is not None:
            self.spent += 1
            if updates >= self.case.due:
                self._judge(self.case, updates)
        if self.recovery is not None and self.recovery.is_over(updates):
            self._settle(self.recovery, updates)
        alarms = self._look(updates)
        probing_is_due = updates % self.rules.probe_every == 0
        if self.mode == "full" and not waiting and self._is_idle(updates) and (alarms or probing_is_due):
            self._examine(updates, alarms)

    def episode(self, updates: int, value: float) -> None:
        """A training episode ended with this return."""
        self._recent.append(value)
        if self.recovery is not None:
            self.recovery.episode(updates, value)

    # Screen

    def _look(self, updates: int) -> list[Alarm]:
        """The alarms of the tiers that are due; new ones are told."""
        alarms: list[Alarm] = []
        for tier, every in (("forward", self.rules.forward_every), ("ranks", self.rules.ranks_every)):
            if updates % every:
                continue
            measured, fresh = self.host.measure(tier, updates)  # type: ignore[arg-type]
            early = {name: worst_of(name, seen) for name, seen in self._early.items() if len(seen) == CALIBRATION}
            found = screen(measured, fresh, early, self._tolerated)
            self._calibrate(measured)
            beyond = {alarm.metric for alarm in found}
            for alarm in found:
                if alarm.metric not in self._raised:
                    self._tell("alarm", updates, wording.alarm(alarm, self.mode == "full"), **asdict(alarm))
            self._raised = (self._raised - measured.keys()) | beyond
            alarms += found
        return alarms

    def _calibrate(self, measured: Mapping[str, float]) -> None:
        """Keep the first readings of what can raise an alarm."""
        for name, value in measured.items():
            if rule_of(name) is not None and math.isfinite(value):
                seen = self._early.setdefault(name, [])
                if len(seen) < CALIBRATION:
                    seen.append(value)

    # Probe

    def _examine(self, updates: int, alarms: list[Alarm]) -> None:
        """Probe the networks that raised an alarm, or all of them at the cadence; then act on the worst, if ill."""
        patients = self.host.patients(None, updates)
        wanted = {alarm.module for alarm in alarms} or set(patients)
        patients = {name: patient for name, patient in patients.items() if name in wanted}
        cost = sum(self._probe_cost(name) for name in patients)
        if not self._affords(cost, updates):
            self._rest(updates)
            self._tell("unaffordable", updates, "no probe: the budget for probes and branches is used up")
            return
        found = probe(patients, self._key("probe", updates), self.rules)
        self.spent += cost
        self.examinations += bool(alarms)
        ill = [name for name, result in found.items() if is_ill(result, self.rules)]
        if alarms and not ill:
            self.false_alarms += 1
            self._tolerated |= {alarm.metric: alarm.value for alarm in alarms if math.isfinite(alarm.value)}
        for name, result in found.items():
            self._tell(
                "probe",
                updates,
                wording.probed(name, result.worst, name in ill, bool(alarms)),
                patient=name,
                ratio=result.ratio,
                worst=result.worst,
                members=result.members,
                areas=result.areas,
                fresh_areas=result.fresh_areas,
                alarms=[alarm.metric for alarm in alarms],
                false_alarm=bool(alarms) and not ill,
                false_alarm_rate=self.false_alarms / max(self.examinations, 1),
            )
        if not ill:
            self._rest(updates)
        elif self.interventions >= self.rules.max_interventions:
            self._rest(updates)
            self._tell("forbidden", updates, f"the {ill[0]} is left as it is: no intervention is allowed any more")
        else:
            worst = max(ill, key=lambda name: math.inf if math.isnan(found[name].worst) else found[name].worst)
            self._act(worst, patients[worst], found[worst], updates)

    # Act

    def _act(self, name: str, patient: Patient, found: Probe, updates: int) -> None:
        """Choose on discarded copies, then carry out on a branch."""
        key = self._key("intervention", updates)
        trials = (len(self.rules.ladder) + 1) * self.rules.probe_steps * self.host.probe_cost(name)
        if not self._affords(trials + self.rules.verify_updates + self._probe_cost(name), updates):
            self._rest(updates)
            self._tell("unaffordable", updates, f"the {name} is left as it is: the budget for treating it is used up")
            return
        chosen, attempts, cost = act(patient, found, key, self.rules, self._dropped)
        self.spent += cost * self.host.probe_cost(name)
        tried = [asdict(attempt) for attempt in attempts]
        if chosen is None:
            self._rest(updates)
            self._tell("no_cure", updates, wording.no_cure(name, attempts), patient=name, tried=tried)
            return
        branch = self.host.branch()
        patients = self.host.patients(branch, updates)
        treated = _treated(chosen, name, patients)
        applied = [intervention_of(chosen)(patients[network], key).evidence() for network in treated]
        self.case = Case(branch, name, chosen, found.worst, updates, updates + self.rules.verify_updates)
        self._tell(
            "branch",
            updates,
            f"a {wording.treatment(chosen, name)} is tried on a branch for {self.rules.verify_updates:,} updates; the "
            "untouched learner goes on acting",
            tried=tried,
            applied=applied,
        )

    # Verify

    def _judge(self, case: Case[L], updates: int) -> None:
        """Commit, go on, or drop."""
        patients = self.host.patients(case.branch, updates)
        patient = {case.patient: patients[case.patient]}
        found = probe(patient, self._key("verification", updates), self.rules)[case.patient]
        self.spent += self._probe_cost(case.patient)
        treated = _treated(case.intervention, case.patient, patients)
        verdict = verify(self.host.evidence(case.branch, treated), found, self.rules)
        # What fell ill again will not get well by more of the same; a larger intervention may.
        longer = case.rounds < self.rules.verify_rounds and not is_ill(found, self.rules)
        longer = longer and self._affords(self.rules.verify_updates, updates)
        outcome = "committed" if verdict.accepted else "extended" if longer else "dropped"
        self._tell(
            outcome,
            updates,
            wording.judged(outcome, case.patient, case.intervention, case.ratio, verdict),
            patient=case.patient,
            intervention=case.intervention,
            updates_on_branch=updates - case.since,
            ill_ratio=case.ratio,
            gain=verdict.gain,
            **asdict(verdict),
        )
        if outcome == "extended":
            case.rounds += 1
            case.due = updates + self.rules.verify_updates
            return
        self.case = None
        if outcome == "dropped":
            self._dropped.append(case.intervention)
            self.host.drop()
            if case.intervention == self.rules.ladder[-1]:  # otherwise the next alarm may try the next rung
                self._rest(updates)
            return
        self.interventions += 1
        before = fmean(self._recent) if self._recent else None
        self.recovery = Recovery(updates, self.rules.recovery_updates, before, self.rules.return_margin)
        self.host.adopt(case.branch)
        self._start_anew()

    def _settle(self, recovery: Recovery, updates: int) -> None:
        """The end of the window after a commit: keep it, or take it back."""
        self.recovery = None
        self._rest(updates)
        kept = recovery.recovered
        report = recovery.report()
        # Nothing acts by the untouched twin any more, so what it would have returned is not known.
        self._tell(
            "kept" if kept else "taken_back", updates, wording.settled(kept, report), regret_against_twin=None, **report
        )
        if kept:
            self.host.drop()
        else:
            self.host.take_back()
            self._start_anew()

    # Scheduled

    def _intervene_as_scheduled(self, name: str, updates: int) -> None:
        """On all networks at once and in place, asking nobody: the baseline."""
        for patient, view in self.host.patients(None, updates).items():
            applied = INTERVENTIONS[name](view, self._key("scheduled", updates))
            sentence = f"{wording.intervention(name)} of the {patient}, as scheduled"
            self._tell("scheduled", updates, sentence, applied=applied.evidence())
        self.interventions += 1
        self._start_anew()

    # Budget and rest

    def _affords(self, cost: float, updates: int) -> bool:
        """Whether probes and branches stay within their share of the planned updates, or of those done."""
        return self.spent + cost <= self.rules.budget * (self.rules.planned_updates or updates)

    def _probe_cost(self, name: str) -> float:
        """Of a probe with all functions and its fresh network, in updates."""
        return 2 * self.rules.probe_steps * self.rules.probe_functions * self.host.probe_cost(name)

    def _is_idle(self, updates: int) -> bool:
        return self.case is None and self.recovery is None and updates >= self._resting_until

    def _rest(self, updates: int) -> None:
        self._resting_until = updates + self.rules.cooldown

    def _start_anew(self) -> None:
        """The live networks were edited: their early phase begins again, and what was tolerated is not any more."""
        self._early, self._tolerated, self._raised, self._dropped = {}, {}, set(), []
        self.host.rebase()

    def _tell(self, event: str, updates: int, sentence: str, **evidence: Any) -> None:  # noqa: ANN401
        spent = {"spent_updates": self.spent, "interventions": self.interventions}
        self.host.tell({"event": event, "updates": updates, **spent, **evidence}, sentence)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and words; the branch's weights are the host's to save. JSON may hold None for a NaN of it."""
        case = None
        if self.case is not None:
            case = {name: value for name, value in vars(self.case).items() if name != "branch"}
        return {
            "case": case,
            "recovery": None if self.recovery is None else self.recovery.state_dict(),
            "interventions": self.interventions,
            "false_alarms": self.false_alarms,
            "examinations": self.examinations,
            "spent": self.spent,
            "resting_until": self._resting_until,
            "raised": sorted(self._raised),
            "early": self._early,
            "tolerated": self._tolerated,
            "dropped": self._dropped,
            "recent": list(self._recent),
        }

    def load_state_dict(self, state: Mapping[str, Any], branch: L | None) -> None:
        """Continue from `state_dict`, with the branch that was being verified, if any."""
        self.case = None
        if state["case"] is not None:
            assert branch is not None, "a case comes with its branch"
            ratio = state["case"]["ratio"]
            self.case = Case(branch, **{**state["case"], "ratio": math.nan if ratio is None else ratio})
        self.recovery = None if state["recovery"] is None else Recovery.load(state["recovery"])
        self.interventions, self.false_alarms = state["interventions"], state["false_alarms"]
        self.examinations, self.spent = state["examinations"], state["spent"]
        self._resting_until, self._raised = state["resting_until"], set(state["raised"])
        self._early = {name: list(values) for name, values in state["early"].items()}
        self._tolerated, self._dropped = dict(state["tolerated"]), list(state["dropped"])
        self._recent = deque(state["recent"], maxlen=RECENT)

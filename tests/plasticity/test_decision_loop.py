"""The decision loop on a host of plain numbers: what follows what, what it costs, what is told and remembered."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Literal

import pytest
import torch
from torch import nn

from rlplastic.plasticity import decision_loop
from rlplastic.plasticity.decision_loop import PlasticityMonitor
from rlplastic.plasticity.monitor import Evidence, Rules
from rlplastic.plasticity.patient import Patient
from rlplastic.plasticity.probe import Probe

RULES = Rules(
    forward_every=10,
    ranks_every=20,
    probe_every=100,
    probe_steps=1,
    probe_functions=1,
    ladder=("full_reset",),
    max_interventions=2,
    budget=1000.0,
    verify_updates=30,
    verify_rounds=2,
    recovery_updates=50,
    cooldown=40,
)
NORM = "plasticity/critic/all/weight_norm"
RETURNS = torch.arange(100.0)


def fresh(key: int) -> nn.Module:
    torch.manual_seed(key)
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))


class Toy:
    """A host whose learner is one network, ill while ``ill``; a branch is as good as ``branch_values``."""

    def __init__(self) -> None:
        self.ill, self.norm = False, 1.0
        self.branch_ratio, self.branch_values = 1.0, RETURNS.clone()
        self.live = fresh(0)
        self.treated: tuple[str, ...] = ()
        self.calls: list[str] = []
        self.events: list[dict[str, Any]] = []

    def measure(self, tier: Literal["forward", "ranks"], updates: int) -> tuple[dict[str, float], dict[str, float]]:
        return ({NORM: self.norm}, {NORM: 1.0}) if tier == "forward" else ({}, {})

    def patients(self, learner: nn.Module | None, updates: int) -> Mapping[str, Patient]:
        module = self.live if learner is None else learner
        states = (torch.linspace(-1, 1, 64).reshape(32, 2),)
        return {"critic": Patient("critic", module, torch.optim.Adam(module.parameters()), fresh, states)}

    def probe_cost(self, module: str) -> float:
        return 0.5

    def branch(self) -> nn.Module:
        self.calls.append("branch")
        return fresh(1)

    def evidence(self, branch: nn.Module, treated: Collection[str]) -> Evidence:
        self.treated = tuple(treated)
        return Evidence(RETURNS, self.branch_values, RETURNS, RETURNS, "a toy")

    def adopt(self, branch: nn.Module) -> None:
        self.calls.append("adopt")
        self.ill = False

    def take_back(self) -> None:
        self.calls.append("take back")

    def drop(self) -> None:
        self.calls.append("drop")

    def rebase(self) -> None:
        self.calls.append("rebase")

    def tell(self, event: Mapping[str, Any], sentence: str) -> None:
        self.events.append({**event, "sentence": sentence})

    @property
    def told(self) -> list[tuple[str, int]]:
        return [(event["event"], event["updates"]) for event in self.events]


def key(*parts: str | int) -> int:
    return sum(map(ord, json.dumps(parts)))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A host, and probes that answer by what it says of itself instead of training networks."""
    host = Toy()

    def probe(patients: Mapping[str, Patient], key: int, rules: Rules) -> dict[str, Probe]:
        (patient,) = patients.values()
        ratio = (3.0 if host.ill else 1.0) if patient.module is host.live else host.branch_ratio
        return {"critic": Probe((ratio,), (ratio,), (1.0,), (key, 1, 1, 32), 2)}

    monkeypatch.setattr(decision_loop, "probe", probe)
    monkeypatch.setattr(decision_loop, "act", lambda patient, ill, key, rules, dropped: (rules.ladder[0], [], 1))
    return host


def monitor_of(host: Toy, rules: Rules = RULES, mode: Any = "full", **options: Any) -> PlasticityMonitor[nn.Module]:
    return PlasticityMonitor(host, rules, mode, key, **options)


def go(monitor: PlasticityMonitor[nn.Module], start: int, stop: int) -> None:
    for updates in range(start, stop):
        monitor.after_update(updates)


def changed(rules: Rules = RULES, **values: Any) -> Rules:
    return Rules(**{**vars(rules), **values})


def test_a_healthy_run_is_probed_at_its_cadence_and_left_alone(toy: Toy) -> None:
    go(monitor_of(toy), 1, 301)
    assert toy.told == [("probe", 100), ("probe", 200), ("probe", 300)]
    assert toy.calls == []


def test_watching_tells_a_new_alarm_once_and_never_probes(toy: Toy) -> None:
    monitor = monitor_of(toy, mode="watch")
    toy.ill, toy.norm = True, 20.0
    go(monitor, 1, 101)
    toy.norm = 1.0
    go(monitor, 101, 111)
    toy.norm = 20.0
    go(monitor, 111, 200)
    assert toy.told == [("alarm", 10), ("alarm", 120)]
    assert "`python -m rlplastic.diagnose` tells" in toy.events[0]["sentence"], "no probe will follow"
    assert monitor.spent == 0 and toy.calls == []


def test_an_alarm_leads_to_a_probe_a_branch_a_verification_and_a_commit(toy: Toy) -> None:
    toy.ill, toy.norm = True, 20.0
    monitor = monitor_of(toy)
    go(monitor, 1, 41)
    assert toy.told == [("alarm", 10), ("probe", 10), ("branch", 10), ("committed", 40), ("alarm", 40)]
    assert "a probe tells" in toy.events[0]["sentence"]
    assert toy.calls == ["branch", "adopt", "rebase"]
    assert monitor.interventions == 1 and monitor.case is None and monitor.recovery is not None


def test_the_intervention_reaches_the_branch_and_never_the_live_network(toy: Toy) -> None:
    toy.ill, toy.norm = True, 20.0
    before = [parameter.clone() for parameter in toy.live.parameters()]
    monitor = monitor_of(toy)
    go(monitor, 1, 11)
    assert monitor.case is not None
    treated = [parameter.clone() for parameter in monitor.case.branch.parameters()]
    assert all(torch.equal(now, then) for now, then in zip(toy.live.parameters(), before, strict=True))
    assert not any(torch.equal(now, then) for now, then in zip(treated, fresh(1).parameters(), strict=True))


def test_a_probe_that_finds_health_makes_the_alarm_a_false_one_and_the_metric_less_touchy(toy: Toy) -> None:
    monitor = monitor_of(toy)
    toy.norm = 20.0
    go(monitor, 1, 101)
    probes = [event for event in toy.events if event["event"] == "probe"]
    assert [event["updates"] for event in probes] == [10, 100]
    assert probes[0]["false_alarm"] and probes[0]["false_alarm_rate"] == 1.0
    assert not probes[1]["false_alarm"] and probes[1]["alarms"] == [], "that one came at the cadence"
    assert toy.calls == []


def test_a_worse_branch_is_given_more_time_and_then_dropped(toy: Toy) -> None:
    toy.ill, toy.norm, toy.branch_values = True, 20.0, torch.zeros(100)
    monitor = monitor_of(toy)
    go(monitor, 1, 100)
    assert toy.told[2:5] == [("branch", 10), ("extended", 40), ("dropped", 70)]
    assert toy.calls == ["branch", "drop"] and monitor.interventions == 0


def test_a_branch_that_fell_ill_again_is_dropped_at_once_and_the_next_alarm_tries_the_next_rung(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = ("shrink_and_perturb", "full_reset")
    monkeypatch.setattr(decision_loop, "act", lambda *given: ((*ladder, None)[len(given[-1])], [], 1))
    toy.ill, toy.norm, toy.branch_ratio = True, 20.0, 3.0
    go(monitor_of(toy, changed(ladder=ladder)), 1, 121)
    assert [told for told in toy.told if told[0] != "probe"] == [
        ("alarm", 10),
        ("branch", 10),
        ("dropped", 40),
        ("branch", 40),
        ("dropped", 70),
        ("no_cure", 110),
    ], "after the last rung it rests"


def test_a_reset_of_the_agent_treats_all_its_networks_when_one_of_them_is_ill(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor = fresh(2)

    def patients(learner: nn.Module | None, updates: int) -> Mapping[str, Patient]:
        found = Toy.patients(toy, learner, updates)
        if learner is None:
            return found
        states = (torch.linspace(-1, 1, 64).reshape(32, 2),)
        return {**found, "actor": Patient("actor", actor, torch.optim.Adam(actor.parameters()), fresh, states)}

    monkeypatch.setattr(toy, "patients", patients)
    toy.ill, toy.norm = True, 20.0
    monitor = monitor_of(toy, changed(ladder=("agent_reset",)))
    go(monitor, 1, 41)
    (branch,) = [event for event in toy.events if event["event"] == "branch"]
    assert [applied["patient"] for applied in branch["applied"]] == ["critic", "actor"]
    assert "full reset of all networks" in branch["sentence"]
    assert not any(torch.equal(now, then) for now, then in zip(actor.parameters(), fresh(2).parameters(), strict=True))
    assert toy.treated == ("critic", "actor") and toy.told[-2][0] == "committed"


def test_an_intervention_whose_branch_was_dropped_is_not_tried_again_before_another_was_good(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_left(
        patient: Patient, ill: Probe, key: int, rules: Rules, dropped: list[str]
    ) -> tuple[str | None, list[Any], int]:
        return next((name for name in rules.ladder if name not in dropped), None), [], 1

    monkeypatch.setattr(decision_loop, "act", first_left)
    toy.ill, toy.norm, toy.branch_values = True, 20.0, torch.zeros(100)
    monitor = monitor_of(toy, changed(ladder=("shrink_and_perturb", "full_reset"), verify_rounds=1))
    go(monitor, 1, 260)
    branches = [event["applied"][0]["name"] for event in toy.events if event["event"] == "branch"]
    assert branches == ["shrink_and_perturb", "full_reset"]
    assert toy.told[-1][0] == "no_cure"


def test_after_a_decision_nothing_is_decided_until_the_cooldown_is_over(toy: Toy) -> None:
    toy.ill, toy.norm, toy.branch_values = True, 20.0, torch.zeros(100)
    go(monitor_of(toy), 1, 112)
    assert [updates for event, updates in toy.told if event == "probe"] == [10, 110], "dropped at 70, resting until 110"


def test_while_no_transitions_come_in_it_raises_alarms_and_treats_nothing(toy: Toy) -> None:
    toy.ill, toy.norm = True, 20.0
    monitor = monitor_of(toy)
    for updates in range(1, 106):
        monitor.after_update(updates, waiting=updates <= 100)
    assert toy.told == [("alarm", 10)] and monitor.spent == 0
    go(monitor, 106, 111)
    assert toy.told[1:] == [("probe", 110), ("branch", 110)]


def test_a_return_that_does_not_come_back_takes_the_intervention_back(toy: Toy) -> None:
    toy.ill, toy.norm = True, 20.0
    monitor = monitor_of(toy)
    for updates in range(1, 101):
        monitor.episode(updates, 100.0 if updates <= 40 else 50.0)
        monitor.after_update(updates)
    (end,) = [event for event in toy.events if event["event"] == "taken_back"]
    assert end["updates"] == 90 and end["return_before"] == 100.0 and end["return_after"] == 50.0
    assert toy.calls == ["branch", "adopt", "rebase", "take back", "rebase"]


def test_a_return_that_comes_back_keeps_the_intervention_and_reports_the_dip(toy: Toy) -> None:
    toy.ill, toy.norm = True, 20.0
    monitor = monitor_of(toy)
    for updates in range(1, 91):
        monitor.episode(updates, 100.0 if updates <= 40 or updates > 60 else 50.0)
        monitor.after_update(updates)
    (end,) = [event for event in toy.events if event["event"] == "kept"]
    assert end["dip_depth"] == 50.0 and end["dip_area"] == 50.0 * 20 and end["updates_to_recover"] == 25
    assert end["regret_against_twin"] is None
    assert toy.calls == ["branch", "adopt", "rebase", "drop"]


def test_where_no_intervention_is_allowed_it_probes_and_leaves_ill_networks_as_they_are(toy: Toy) -> None:
    toy.ill, toy.norm = True, 20.0
    go(monitor_of(toy, changed(max_interventions=0)), 1, 30)
    assert toy.told == [("alarm", 10), ("probe", 10), ("forbidden", 10)]
    assert toy.calls == []


def test_interventions_end_with_their_number(toy: Toy) -> None:
    monitor = monitor_of(toy)
    for updates in range(1, 800):
        toy.ill, toy.norm = True, 20.0
        monitor.after_update(updates)
    assert monitor.interventions == 2
    assert toy.calls.count("adopt") == 2
    assert toy.told[-1][0] == "forbidden"


def test_probes_and_branches_stay_within_their_share_of_the_planned_updates(toy: Toy) -> None:
    """A probe costs 2 steps of 0.5 updates; treating at most 2 trial steps, 30 updates and another probe."""
    toy.ill, toy.norm = True, 20.0
    poor = monitor_of(toy, changed(budget=0.01, planned_updates=99))
    go(poor, 1, 300)
    assert {event for event, _ in toy.told} == {"alarm", "unaffordable"} and poor.spent == 0
    toy.events.clear()
    enough_to_look = monitor_of(toy, changed(budget=0.02, planned_updates=1000))
    go(enough_to_look, 1, 20)
    assert toy.told == [("alarm", 10), ("probe", 10), ("unaffordable", 10)] and enough_to_look.spent == 1
    toy.events.clear()
    rich = monitor_of(toy, changed(budget=0.035, planned_updates=1000))
    go(rich, 1, 41)
    assert toy.told[3] == ("committed", 40)
    assert rich.spent == 1 + 0.5 + 30 + 1


def test_without_planned_updates_the_share_is_that_of_the_updates_done(toy: Toy) -> None:
    toy.ill, toy.norm = True, 20.0
    go(monitor_of(toy, changed(budget=0.05, cooldown=1)), 1, 41)
    assert next(told for told in toy.told if told[0] == "probe") == ("probe", 20)


def test_a_schedule_is_followed_whether_anything_is_ill_or_not(toy: Toy) -> None:
    before = [parameter.clone() for parameter in toy.live.parameters()]
    monitor = monitor_of(toy, mode="scheduled", schedule=("full_reset", lambda updates: updates % 25 == 0))
    go(monitor, 1, 60)
    assert toy.told == [("scheduled", 25), ("scheduled", 50)] and toy.calls == ["rebase", "rebase"]
    assert not any(torch.equal(now, then) for now, then in zip(toy.live.parameters(), before, strict=True))


def test_references_of_the_early_phase_begin_again_after_a_commit(toy: Toy) -> None:
    monitor = monitor_of(toy)
    go(monitor, 1, 61)
    assert monitor.state_dict()["early"] == {NORM: [1.0] * decision_loop.CALIBRATION}
    toy.ill, toy.norm = True, 5.0
    go(monitor, 61, 101)
    assert ("alarm", 70) in toy.told, "five times its early phase, though not six times a fresh network"
    assert monitor.state_dict()["early"] == {NORM: [5.0]}


@pytest.mark.parametrize("cut", [15, 45, 75, 95, 130])
def test_a_monitor_that_is_saved_and_loaded_goes_on_as_if_nothing_had_been(toy: Toy, cut: int) -> None:
    """Cut while verifying, while extended, in the recovery window, and while resting."""

    def play(monitor: PlasticityMonitor[nn.Module], start: int, stop: int) -> None:
        for updates in range(start, stop):
            toy.branch_values = RETURNS if updates > 60 else torch.zeros(100)
            if updates % 3 == 0:
                monitor.episode(updates, float(updates % 7))
            monitor.after_update(updates)

    toy.ill, toy.norm = True, 20.0
    whole = monitor_of(toy)
    play(whole, 1, 200)
    expected, told = whole.state_dict(), list(toy.events)
    toy.ill, toy.events = True, []
    first = monitor_of(toy)
    play(first, 1, cut)
    second = monitor_of(toy)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    second.load_state_dict(state, None if first.case is None else first.case.branch)
    play(second, cut, 200)
    assert second.state_dict() == expected
    assert str(toy.events) == str(told)

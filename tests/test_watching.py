"""The monitor in training: where it may not act it changes no bit, and where it acts a killed run goes on alike."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file
from small_runs import SMALL, command, final_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlplastic import train_agent
from rlplastic.composition import compose
from rlplastic.config import Config
from rlplastic.errors import ConfigurationError
from rlplastic.machine import probe_machine
from rlplastic.plasticity.monitor import Rules
from rlplastic.plasticity_config import MonitorConfig
from rlplastic.presets import resolve
from rlplastic.session import planned_updates
from rlplastic.watching import rules_of, schedule_of

PLANNED = 100
"""Updates of `SMALL`: cadences shrink to 5 (forward), 20 (ranks) and 50 (probes)."""
PROBING = ["monitor=full", "monitor.probe_steps=5", "monitor.budget=100"]
ILL = ["monitor.ill=0.001", "monitor.ill_gap=-2"]
FORBIDDEN = [*PROBING, *ILL, "monitor.max_interventions=0"]
TREATING = [*PROBING, *ILL, "monitor.healthy=1000", "monitor.value_margin=1000", "monitor.rank_margin=2"]
"""Every network is ill, and every branch is good enough."""
RUN = [override for override in SMALL if override != "monitor=off"]
AGENTS = {"flashsac": [], "sac": ["agent=sac"]}


def trained(folder: Path, *overrides: str) -> dict[str, object]:
    train_agent([*RUN, f"runs={folder}", "name=run", *overrides], quiet=True)
    return final_state(folder / "run")


def learned(state: dict[str, object]) -> dict[str, object]:
    """All but the monitor's own state."""
    return {name: value for name, value in state.items() if not name.startswith("monitor.")}


def findings(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "plasticity.jsonl").read_text().splitlines()]


def events(folder: Path) -> list[str]:
    return [finding["event"] for finding in findings(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_watching_and_probing_change_no_bit_of_a_run(tmp_path: Path, agent: str) -> None:
    off = trained(tmp_path / "off", *AGENTS[agent], "monitor=off")
    assert not (tmp_path / "off" / "run" / "plasticity.jsonl").exists()
    watched = trained(tmp_path / "watch", *AGENTS[agent])
    assert learned(watched) == off
    assert set(events(tmp_path / "watch")) <= {"measurement", "alarm"}
    probed = trained(tmp_path / "full", *AGENTS[agent], *FORBIDDEN)
    assert learned(probed) == off
    assert {"measurement", "probe", "forbidden"} <= set(events(tmp_path / "full"))


@pytest.mark.slow
@pytest.mark.parametrize("agent", AGENTS)
def test_a_run_that_is_killed_while_verifying_or_recovering_ends_as_if_it_had_not_been(
    tmp_path: Path, agent: str
) -> None:
    """A kill is what lies behind a checkpoint, taken away: the same command then goes on from there."""
    options = [*AGENTS[agent], *TREATING, "monitor.verify_updates=15", "monitor.recovery_updates=20"]
    options += ["checkpoint.every=20", "checkpoint.keep=100", "evaluation.every=0", "replay.holdout=0.3"]
    whole = trained(tmp_path, *options)
    run = tmp_path / "run"
    log = (run / "plasticity.jsonl").read_text()
    told = {finding["event"]: finding["step"] for finding in findings(tmp_path)}
    assert {"branch", "committed", "kept"} <= told.keys()
    states = {path: json.loads((path / "monitor.json").read_text())["monitor"] for path in checkpoints(run)}
    verifying = [path for path, state in states.items() if state["case"] is not None]
    recovering = [path for path, state in states.items() if state["recovery"] is not None]
    for number, checkpoint in enumerate((verifying[1], recovering[1])):
        cut = tmp_path / f"cut {number}"
        shutil.copytree(run, cut / "run")
        for later in checkpoints(cut / "run"):
            if later.name > checkpoint.name:
                shutil.rmtree(later)
        resumed = trained(cut, *options)
        assert resumed == whole
        assert (cut / "run" / "plasticity.jsonl").read_text() == log


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"))


def test_a_monitor_that_only_watches_is_no_part_of_a_runs_identity_and_one_that_acts_is(tmp_path: Path) -> None:
    short = ["env_steps=240", "evaluation.every=0"]
    trained(tmp_path, *short, "monitor=off")
    trained(tmp_path, "env_steps=260", "evaluation.every=0", "monitor=watch", "monitor.forward_every=2")
    assert events(tmp_path), "it watches from where it went on"
    with pytest.raises(ConfigurationError, match="another configuration"):
        trained(tmp_path, "env_steps=280", "evaluation.every=0", "monitor=full")


def test_a_run_from_before_there_was_a_monitor_goes_on(tmp_path: Path) -> None:
    trained(tmp_path, "env_steps=240", "evaluation.every=0", "monitor=off")
    file = tmp_path / "run" / "config.yaml"
    stored = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(stored, dict)
    stored["monitor"] = {"mode": "off"}
    del stored["priming_updates"], stored["adaptive"], stored["env"]["randomise"]
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(stored)))
    with pytest.raises(ConfigurationError, match="priming_updates"):
        trained(tmp_path, "env_steps=260", "evaluation.every=0", "priming_updates=5")
    trained(tmp_path, "env_steps=260", "evaluation.every=0")


def test_findings_lie_in_one_log_as_curves_and_as_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["env_steps=450", "evaluation.every=0", "agent=sac", "monitor.histograms=true", *FORBIDDEN]
    train_agent([*RUN, f"runs={tmp_path}", "name=run", *options])
    lines = findings(tmp_path)
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    first = lines[0]
    assert first["event"] == "measurement" and first["tier"] == "forward" and first["updates"] == 3
    assert first["held_out_td_error"].startswith("unavailable")
    assert "plasticity/critic/all/weight_norm" in first["values"]
    assert "plasticity/frozen/critic/all/dormant" in first["values"]
    accumulator = EventAccumulator(str(tmp_path / "run")).Reload()
    tags = accumulator.Tags()
    assert {"plasticity/critic/all/weight_norm", "plasticity/decisions/worst"} <= set(tags["scalars"])
    assert "plasticity/weights/critic.head.weight" in tags["histograms"]
    assert any(tag.startswith("plasticity/decisions") for tag in tags["tensors"])
    assert "the critic learns" in capsys.readouterr().out


def test_held_out_episodes_give_the_held_out_error_and_its_gap(tmp_path: Path) -> None:
    trained(tmp_path, "env_steps=500", "evaluation.every=0", "replay.holdout=0.5", "agent=sac")
    last = [finding for finding in findings(tmp_path) if finding.get("tier") == "forward"][-1]
    assert last["held_out_td_error"] == "measured"
    assert {f"plasticity/critic/all/held_out_td_{what}" for what in ("error", "gap")} <= last["values"].keys()


# Cadences and schedules


def config_of(*overrides: str) -> Config:
    return resolve(compose([*RUN, *overrides]), probe_machine("cpu"))[0]


def test_rules_for_any_loop_have_the_defaults_of_a_run() -> None:
    rules = vars(Rules())
    settings = {name: value for name, value in vars(MonitorConfig()).items() if name in rules and value is not None}
    assert {name: rules[name] for name in settings} == settings | {"ladder": tuple(settings["ladder"])}
    unlimited = rules_of(MonitorConfig(), None)
    assert unlimited == Rules()


def test_cadences_shrink_to_a_twentieth_a_fifth_and_a_half_of_a_short_run() -> None:
    settings = config_of().monitor
    short, long, open_ended = (rules_of(settings, planned) for planned in (1_000, 10_000_000, None))
    assert (short.forward_every, short.ranks_every, short.probe_every) == (50, 200, 500)
    assert (long.forward_every, long.ranks_every, long.probe_every) == (1_000, 10_000, 50_000)
    assert (open_ended.forward_every, open_ended.planned_updates) == (1_000, None)
    assert rules_of(settings, 1).forward_every == 1


def test_updates_are_planned_from_the_budget_the_pace_and_the_priming() -> None:
    assert planned_updates(config_of()) == PLANNED
    assert planned_updates(config_of("priming_updates=50")) == PLANNED + 50
    assert planned_updates(config_of("env_steps=null", "max_minutes=1")) is None


def test_scheduled_interventions_come_every_so_often_or_as_often_at_random() -> None:
    every = schedule_of(config_of("monitor=scheduled", "monitor.scheduled_every=30").monitor, 0, PLANNED)
    assert [updates for updates in range(1, 101) if every(updates)] == [30, 60, 90]
    settings = config_of("monitor=scheduled", "monitor.scheduled_count=3").monitor
    moments = [[u for u in range(1, 101) if due(u)] for due in (schedule_of(settings, s, PLANNED) for s in (0, 0, 1))]
    assert moments[0] == moments[1] != moments[2]
    assert [len(found) for found in moments] == [3, 3, 3]


def test_a_scheduled_run_resets_both_networks_in_place(tmp_path: Path) -> None:
    options = ["monitor=scheduled", "monitor.scheduled_every=20", "env_steps=300", "evaluation.every=0", "agent=sac"]
    trained(tmp_path, *options)
    done = [finding for finding in findings(tmp_path) if finding["event"] == "scheduled"]
    assert [(line["updates"], line["applied"]["patient"]) for line in done] == [(20, "actor"), (20, "critic")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("monitor.ladder=[full_rest]", "full_reset"),
        ("monitor.scheduled_intervention=prayer", "is not a choice"),
        ("monitor.mode=act", "is not a choice"),
        ("monitor.budget=-1", "expected a number of 0 or more"),
        ("monitor.forward_every=0", "expected a number above 0"),
        ("priming_updates=-5", "expected a number of 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        config_of(override)


def test_random_moments_need_a_number_of_planned_updates() -> None:
    with pytest.raises(ConfigurationError, match="env_steps"):
        config_of("monitor=scheduled", "monitor.scheduled_count=3", "env_steps=null", "max_minutes=1")


# Priming


@pytest.mark.parametrize("overlap", ["true", "false"])
def test_priming_updates_come_on_the_first_transitions_before_the_environments_go_on(
    tmp_path: Path, overlap: str
) -> None:
    options = ["env_steps=400", "evaluation.every=0", "agent=sac", f"overlap={overlap}", "monitor.ranks_every=1000"]
    state = trained(tmp_path, *options, "priming_updates=250")
    measured = [(finding["updates"], finding["step"]) for finding in findings(tmp_path) if finding["tier"] == "forward"]
    assert [step for updates, step in measured if updates <= 250] == [200] * 16
    assert all(step > 200 for updates, step in measured if updates > 250)
    assert state["progress"]["primed"] == 250  # type: ignore[index]
    done = load_file(checkpoints(tmp_path / "run")[-1] / "agent.safetensors")["updates"]
    assert int(done) == 250 + (49 if overlap == "true" else 50), "with overlap the last credit is not used"


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_is_primed_goes_on_alike(tmp_path: Path) -> None:
    options = ["agent=sac", "env_steps=300", "evaluation.every=0", "priming_updates=1500", "monitor.forward_every=500"]
    whole = trained(tmp_path / "whole", *options)
    arguments = command(*RUN, f"runs={tmp_path / 'cut'}", "name=run", *options)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "cut" / "run" / "plasticity.jsonl"
    while not log.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    (checkpoint,) = checkpoints(tmp_path / "cut" / "run")[-1:]
    primed = json.loads((checkpoint / "progress.json").read_text())["primed"]
    assert 0 < primed < 1500
    assert trained(tmp_path / "cut", *options) == whole

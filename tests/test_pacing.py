"""The adaptive replay ratio in a run: reading changes nothing but through the ratio, which resumes bit for bit."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, Popen

import pytest
from small_runs import SMALL, command, final_state, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlplastic import train_agent
from rlplastic.agents import subjects
from rlplastic.composition import compose
from rlplastic.errors import ConfigurationError
from rlplastic.machine import Machine
from rlplastic.pacing import Pacer
from rlplastic.plasticity import measure
from rlplastic.plasticity.replay_ratio import SIGNALS, Decision
from rlplastic.presets import resolve

ADAPTIVE = ["replay_ratio=adaptive", "adaptive.window=50", "evaluation.every=0"]
ALL = f"adaptive.signal={','.join(SIGNALS)}"
SHORT = [*SMALL, *ADAPTIVE, "env_steps=500", "monitor=off"]


def resolved(*overrides: str):
    machine = Machine("a processor", 2, "2.13.0", "cpu", "cpu", True, "/usr/bin/g++")
    return resolve(compose(overrides), machine)[0]


def trained(folder: Path, *overrides: str) -> dict[str, object]:
    train_agent([*SHORT, f"runs={folder}", "name=run", *overrides], quiet=True)
    return final_state(folder / "run")


def learned(state: dict[str, object]) -> dict[str, object]:
    """All that training left, without what belongs to the pacer and without evaluations."""
    return {name: value for name, value in state.items() if not name.startswith(("pacer", "eval"))}


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Pacer, int, Decision]]:
    """Every pacer that decided in this process, the transitions then, and what it decided."""
    decisions: list[tuple[Pacer, int, Decision]] = []
    after = Pacer.after

    def record(pacer: Pacer, progress, added: int) -> Decision | None:
        decision = after(pacer, progress, added)
        if decision is not None:
            decisions.append((pacer, progress.transitions, decision))
        return decision

    monkeypatch.setattr(Pacer, "after", record)
    return decisions


AGENTS = pytest.mark.parametrize("agent", ["flashsac", pytest.param("sac", marks=pytest.mark.slow)])


@AGENTS
def test_reading_all_signals_changes_nothing_but_through_the_ratio(tmp_path: Path, agent: str) -> None:
    options = [f"agent={agent}", "replay.holdout=0.4"]
    still = trained(tmp_path / "a", *options, ALL, "adaptive.low=0.3", "adaptive.high=0.3")
    fixed = [*SMALL, "env_steps=500", "monitor=off", "evaluation.every=0", *options, "replay_ratio=0.3"]
    train_agent([*fixed, f"runs={tmp_path}", "name=run"], quiet=True)
    assert learned(still) == learned(final_state(tmp_path / "run"))


@AGENTS
def test_an_adaptive_run_in_halves_equals_a_whole_one(tmp_path: Path, agent: str, spied: list) -> None:
    options = [f"agent={agent}", "replay.holdout=0.4", ALL, "schedule=horizon", "schedule.horizon=1000"]
    options += ["adaptive.alarm=0.06", "adaptive.step=1.2"]  # so that it goes up and down
    trained(tmp_path / "halves", "env_steps=320", *options)
    halves = trained(tmp_path / "halves", *options)
    moves, spied[:] = [decision for _, _, decision in spied], []
    whole = trained(tmp_path / "whole", *options)
    assert moves == [decision for _, _, decision in spied] and len({decision.move for decision in moves}) > 1
    assert any(name.startswith("pacer.") for name in whole)
    assert {**halves, "eval.csv": ""} == {**whole, "eval.csv": ""}


@pytest.mark.slow
def test_an_adaptive_run_that_was_killed_and_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    arguments = [*SHORT, "name=run", "checkpoint.every=60"]
    process = Popen(command(*arguments, f"runs={tmp_path}"), stdout=DEVNULL, stderr=DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/checkpoints/step_*3[0-9][0-9]")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = run(*arguments, f"runs={tmp_path}")
    assert resumed.returncode == 0, resumed.stderr
    assert final_state(tmp_path / "run") == trained(tmp_path / "whole", "checkpoint.every=60")


def test_readings_are_what_measure_gives_on_the_pacers_own_draws(tmp_path: Path, spied: list) -> None:
    trained(tmp_path, "agent=sac", "replay.holdout=0.4", ALL)
    pacer = spied[-1][0]
    readings = pacer._read(77)
    agent = pacer.agent
    # The entropy is one of categorical critics; and nothing was learned since the last reading.
    assert set(readings) == set(SIGNALS) - {"logit_entropy", "angular_speed"}
    assert "angular_speed" in pacer.readings
    inputs = subjects.inputs_of(agent, pacer._trained.sample(77, agent.reward_scale))
    critic = subjects.subjects(agent)["critic"]
    found = measure(critic, inputs, "forward") | measure(critic, inputs, "expensive") | measure(critic, inputs, "ranks")
    assert readings["fau"] == found["plasticity/critic/all/active_fraction"]
    assert readings["gradient_dormant"] == found["plasticity/critic/all/gradient_dormant"]
    assert readings["effective_rank"] == found["plasticity/critic/trunk.3/effective_rank"]
    held_out = subjects.inputs_of(agent, pacer._held_out.sample(77, agent.reward_scale))
    inside, outside = (float(subjects.td_losses(agent, each).mean().detach()) for each in (inputs, held_out))
    assert readings["held_out_td_error"] == outside
    assert readings["td_gap"] == pytest.approx((outside - inside) / inside)


def test_updates_follow_the_ratio_of_each_window(tmp_path: Path, spied: list) -> None:
    result = train_agent([*SHORT, f"runs={tmp_path}", "name=run"], quiet=True)
    at = [0, *(transitions for _, transitions, _ in spied), 500]
    ratios = [0.5, *(decision.ratio for *_, decision in spied)]
    owed = sum(
        ratio * max(stop - max(start, 200), 0) for ratio, start, stop in zip(ratios, at[:-1], at[1:], strict=True)
    )
    assert len(spied) >= 3 and max(ratios) > 0.5
    # Of the overlapped last vector step, updates are not due any more.
    assert owed - 4 * max(ratios) - 1 <= result.updates <= owed


def test_every_decision_is_logged_with_its_signals_and_its_reason(tmp_path: Path, spied: list) -> None:
    trained(tmp_path, "adaptive.signal=gradient_dormant", "tracking.every=50")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0})
    events.Reload()
    ratios = {event.step: event.value for event in events.Scalars("pace/move")}
    assert ratios == {step: decision.move for _, step, decision in spied}
    texts = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("plasticity/decisions/text_summary")
    }
    assert all(decision.reason in texts[step] and f"{decision.ratio:.4g}" in texts[step] for _, step, decision in spied)
    assert [event.value for event in events.Scalars("pace/gradient_dormant")][-1] == pytest.approx(
        spied[-1][0].readings["gradient_dormant"]
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "plasticity.jsonl").read_text().splitlines()]
    assert [(line["step"], line["ratio"], line["reason"]) for line in lines] == [
        (step, decision.ratio, decision.reason) for _, step, decision in spied
    ]
    assert lines[-1]["readings"] == spied[-1][0].readings
    updates = [event.value for event in events.Scalars("train/updates_per_transition")]
    samples = [event.value for event in events.Scalars("train/samples_per_transition")]
    assert samples == pytest.approx([16 * value for value in updates]) and updates[-1] > 0.4


@pytest.mark.parametrize("envs", [2, 8])
def test_samples_per_transition_do_not_depend_on_the_number_of_environments(tmp_path: Path, envs: int) -> None:
    train_agent(
        [
            *SMALL,
            "env_steps=400",
            "monitor=off",
            f"env.num_envs={envs}",
            "tracking.every=100",
            f"runs={tmp_path}",
            "name=run",
            "evaluation.every=0",
        ],
        quiet=True,
    )
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert events.Scalars("train/samples_per_transition")[-1].value == pytest.approx(16 * 0.25, rel=0.05)


def test_the_budget_schedule_follows_the_budget_and_the_horizon_the_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlplastic.agents.flashsac import update

    rates: list[float] = []
    step: Callable = update.critic_step
    monkeypatch.setattr(update, "critic_step", lambda *a: (rates.append(a[3]), step(*a))[1])

    def last_rate(folder: str, *options: str) -> tuple[float, int]:
        rates.clear()
        arguments = [*SMALL, "env_steps=400", "monitor=off", "evaluation.every=0"]
        train_agent([*arguments, f"runs={tmp_path}", f"name={folder}", *options], quiet=True)
        return rates[-1], len(rates)

    twice = [*ADAPTIVE, "adaptive.rule=plateau", "adaptive.tolerance=1", "adaptive.low=0.25", "adaptive.high=1"]
    slow, fast = last_rate("a", "replay_ratio=0.25"), last_rate("b", *twice)
    assert fast[1] > 2 * slow[1] and fast[0] == slow[0], "by the budget the number of updates does not matter"
    horizon = ["schedule=horizon", "schedule.horizon=100"]
    slow, fast = last_rate("c", "replay_ratio=0.25", *horizon), last_rate("d", *twice, *horizon)
    assert slow[0] > fast[0] == 1.5e-4, "by the horizon a higher ratio reaches the end of the cosine, and stays there"


# Configuration


def test_open_settings_are_the_published_ones_for_the_published_rule() -> None:
    for agent in ("flashsac", "sac"):
        config = resolved("replay_ratio=adaptive", "adaptive.rule=plateau", f"agent={agent}")
        adaptive = config.adaptive
        assert (adaptive.low, adaptive.high, adaptive.tolerance, adaptive.signal) == (0.5, 2.0, 1e-3, "fau")
        assert config.replay.holdout == 0 and config.first_replay_ratio == 0.5


def test_open_settings_of_the_continuous_rule_start_from_the_usual_ratio_and_hold_episodes_out() -> None:
    config = resolved("replay_ratio=adaptive", "agent=sac")
    assert (config.adaptive.low, config.adaptive.high, config.replay.holdout) == (1.0, 4.0, 0.05)
    assert config.adaptive.signal == "gradient_dormant,td_gap"
    assert resolved("replay_ratio=adaptive", "replay.holdout=0").adaptive.signal == "gradient_dormant"
    assert resolved().replay.holdout == 0 and resolved().first_replay_ratio == 0.5
    assert resolved("replay_ratio=2").first_replay_ratio == 2


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("replay_ratio=fast", "replay_ratio=fast is not a choice; expected a number above 0, or adaptive"),
        (
            "adaptive.low=1",
            "settings adaptive.* are those of replay_ratio=adaptive, but this run has none; leave the one out",
        ),
        ("replay_ratio=adaptive adaptive.signal=fua", "adaptive.signal='fua' is not a signal; did you mean 'fau'"),
        ("replay_ratio=adaptive adaptive.signal=fau,dead adaptive.rule=plateau", "reads one signal"),
        ("replay_ratio=adaptive adaptive.signal=td_gap replay.holdout=0", "needs held-out episodes"),
        ("replay_ratio=adaptive adaptive.low=3 adaptive.high=2", "settings of adaptive: low=3, high=2"),
        ("replay_ratio=adaptive adaptive.step=1", "expected 0 < low <= high, step > 1"),
        ("replay_ratio=adaptive adaptive.rule=random", "adaptive.rule='random' is not a choice"),
        ("replay_ratio=adaptive adaptive.window=0", "adaptive.window=0 is out of range"),
        ("replay_ratio=true", "replay_ratio=true was refused"),
    ],
)
def test_a_mistake_is_refused_in_one_sentence(overrides: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        resolved(*overrides.split())
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_batch_norm_keeps_the_published_signal_flat_so_that_the_rule_fires_early(
    tmp_path: Path, spied: list, capsys: pytest.CaptureFixture
) -> None:
    """On plain networks the fraction of active units moves by tenths, and the rule waits."""
    options = ["env=hopper", "preset=debug", "env_steps=3000", "threads=1", "env.threads=1", "evaluation.every=0"]
    options += [
        "monitor=off",
        "agent.critic_width=32",
        "replay_ratio=adaptive",
        "adaptive.rule=plateau",
        "adaptive.window=500",
    ]
    seen: dict[str, tuple[list[float], list[float]]] = {}
    for agent in ("flashsac", "sac"):
        spied.clear()
        readings: list[float] = []
        after = Pacer._read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pacer, "_read", lambda p, d, a=after, r=readings: (v := a(p, d), r.append(v["fau"]))[0])
            train_agent([*options, f"agent={agent}", f"runs={tmp_path}"], quiet=True)
        seen[agent] = readings, [decision.ratio for *_, decision in spied]
    assert all(abs(fraction - 0.5) < 0.03 for fraction in seen["flashsac"][0])
    assert max(seen["sac"][0]) - min(seen["sac"][0]) > 0.1
    assert seen["flashsac"][1][-1] == 2.0 and seen["sac"][1][-1] == 0.5
    assert "adaptive.signal=fau says nothing on this critic" in capsys.readouterr().err


@pytest.mark.slow
def test_after_an_intervention_signals_are_compared_anew_and_the_ratio_stays(tmp_path: Path, spied: list) -> None:
    options = [option for option in SHORT if option != "monitor=off"]
    options += ["monitor=scheduled", "monitor.scheduled_every=30", "adaptive.signal=angular_speed,weight_norm"]
    train_agent([*options, f"runs={tmp_path}", "name=run"], quiet=True)
    findings = [json.loads(line) for line in (tmp_path / "run" / "plasticity.jsonl").read_text().splitlines()]
    told = [finding["event"] for finding in findings if finding["event"] in ("scheduled", "replay_ratio")]
    decisions = iter(decision for _, _, decision in spied)
    ratio, after_an_edit = None, False
    for event in told:
        if event == "scheduled":
            after_an_edit = True
            continue
        decision = next(decisions)
        if after_an_edit and ratio is not None:
            assert not decision.worse and decision.ratio == ratio
        ratio, after_an_edit = decision.ratio, False
    assert any(decision.worse for _, _, decision in spied) and told.index("replay_ratio") < told.index("scheduled")

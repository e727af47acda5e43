"""The monitor on the illness and on the trap: a primed SAC is cured on Hopper and left alone on Pendulum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlplastic import train_agent

SETTINGS = [
    *("agent=sac", "env.backend=gymnasium", "env.num_envs=1", "replay.batch_size=128", "replay.minimum=500"),
    *("replay_ratio=1", "compile=off", "threads=1", "evaluation.every=0", "evaluation.final_episodes=2", "name=run"),
    *("monitor=full", "monitor.budget=0.5", "monitor.verify_updates=1000", "monitor.recovery_updates=3000"),
]


def findings(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    train_agent([*SETTINGS, f"runs={folder}", *overrides], quiet=True)
    return [json.loads(line) for line in (folder / "run" / "plasticity.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_critic_that_was_primed_on_hopper_is_found_treated_verified_and_kept(tmp_path: Path) -> None:
    found = findings(
        tmp_path,
        *("env=hopper", "agent.critic_width=128", "agent.actor_width=128", "env_steps=5500", "priming_updates=9500"),
    )
    by_event = {finding["event"]: finding for finding in reversed(found)}  # the first of each
    assert {"alarm", "probe", "branch", "committed", "kept"} <= by_event.keys()
    ill = [f for f in found if f["event"] == "probe" and f["patient"] == "critic" and f["worst"] > 1.5]
    assert ill
    verdict = by_event["committed"]
    assert verdict["patient"] == "critic" and verdict["ratio"] < 1.2
    assert verdict["branch"]["return_error"] < 0.5 * verdict["twin"]["return_error"]
    assert verdict["branch"]["rank_correlation"] > verdict["twin"]["rank_correlation"] - 0.05


@pytest.mark.slow
def test_a_critic_that_was_primed_on_pendulum_is_left_alone(tmp_path: Path) -> None:
    found = findings(
        tmp_path,
        *("env=pendulum", "agent.critic_width=64", "agent.actor_width=64", "env_steps=1500", "priming_updates=9500"),
    )
    assert {finding["event"] for finding in found} <= {"measurement", "alarm", "probe"}
    probes = [finding["worst"] for finding in found if finding["event"] == "probe"]
    assert probes and max(probes) < 1.5

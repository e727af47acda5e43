"""A new run that starts from an old one takes exactly what was asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from small_runs import SMALL, final_state

from rlplastic import train_agent
from rlplastic.errors import ConfigurationError


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_agent([*SMALL, f"runs={tmp_path_factory.mktemp('old')}", "name=run"], quiet=True).path


def started(folder: Path, old: Path, *overrides: str) -> dict[str, object]:
    """The state after one vector step, before any update."""
    few = [
        "env_steps=4",
        "replay.minimum=200",
        "checkpoint.every=4",
        "evaluation.every=0",
        "evaluation.final_episodes=1",
    ]
    path = train_agent([*SMALL, *few, f"runs={folder}", "name=new", f"init_from={old}", *overrides], quiet=True).path
    return final_state(path)


def test_networks_are_taken_and_optimizers_are_not(tmp_path: Path, old: Path) -> None:
    before, after = final_state(old), started(tmp_path, old)
    for network in ("actor.", "critic.", "target_critic."):
        names = [name for name in before if name.startswith(f"agent.{network}")]
        assert names and all(after[name] == before[name] for name in names)
    zero = hashlib.sha256(np.zeros((), np.float32).tobytes()).hexdigest()
    steps = [name for name in after if name.startswith("agent.optimizer.") and name.endswith(".step")]
    assert steps and {after[name] for name in steps} == {zero} and {before[name] for name in steps} != {zero}


def test_only_what_was_asked_for_is_taken(tmp_path: Path, old: Path) -> None:
    before, after = final_state(old), started(tmp_path, old, "init_what=critic")
    assert after["agent.critic.head.bias"] == before["agent.critic.head.bias"]
    assert after["agent.actor.head.mean.weight"] != before["agent.actor.head.mean.weight"]


def test_with_an_actor_exploration_follows_it_from_the_first_step(tmp_path: Path, old: Path) -> None:
    def first_actions(name: str, what: str) -> object:
        started(tmp_path / name, old, f"init_what={what}")
        (segment, *_) = (tmp_path / name / "new" / "checkpoints" / "segments").glob("*.safetensors")
        return load_file(segment)["actions"][0].tolist()

    assert first_actions("a", "actor") != first_actions("c", "critic")


def test_a_replay_is_taken_and_learning_starts_at_once(tmp_path: Path, old: Path) -> None:
    overrides = [*SMALL, f"runs={tmp_path}", "name=new", f"init_from={old}", "init_what=actor,critic,replay"]
    result = train_agent([*overrides, "env_steps=40", "checkpoint.every=8"], quiet=True)
    assert result.updates == pytest.approx(0.25 * 40, abs=1)
    resumed = train_agent([*overrides, "env_steps=80", "checkpoint.every=8"], quiet=True)
    assert resumed.updates == pytest.approx(0.25 * 80, abs=1)


def test_a_run_that_does_not_fit_is_refused_in_one_sentence(tmp_path: Path, old: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not fit this run") as caught:
        started(tmp_path, old, "agent.critic_width=16")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="has no checkpoint"):
        started(tmp_path / "b", tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="did you mean 'actor'"):
        started(tmp_path / "c", old, "init_what=acter")
    with pytest.raises(ConfigurationError, match="does not fit this run"):
        started(tmp_path / "d", old, "init_what=replay", "env.num_envs=2")

"""A NaN anywhere stops the run with exit code 3, the culprit's name and the evidence."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.errors import NonFiniteError
from rlplastic.guards import Guard
from rlplastic.progress import Progress
from rlplastic.replay.ring import ReplayRing
from rlplastic.replay.sample import Sampler

ACTION = np.zeros((2, 1), np.float32)


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    ring = ReplayRing(100, 2, {"policy": 3}, 1, AutoresetMode.NEXT_STEP)
    ring.begin({"policy": np.zeros((2, 3), np.float32)})
    for index in range(10):
        ring.add(np.zeros((2, 1), np.float32), step(float(index)), np.ones(2, bool))
    return Guard(tmp_path, ring, Progress(transitions=20, vector_steps=10))


def step(value: float, reward: float = 0.0) -> Step:
    observation = {"policy": np.full((2, 3), value, np.float32)}
    flags = np.zeros(2, bool)
    return Step(observation, np.full(2, reward, np.float32), flags, flags, {})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_observation_or_reward_is_named_with_its_environment(guard: Guard, bad: float) -> None:
    answer = step(1.0)
    answer.observation["policy"][1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"observation 'policy' of environments \[1\] is not finite at step 20"):
        guard.check_step(answer, ACTION)
    answer = step(1.0)
    answer.reward[0] = bad
    with pytest.raises(NonFiniteError, match=r"reward of environments \[0\]"):
        guard.check_step(answer, ACTION)


def test_large_finite_numbers_whose_sum_overflows_are_not_refused(guard: Guard) -> None:
    guard.check_step(step(3e38), ACTION)


def test_a_non_finite_loss_is_named_with_its_update_and_dumps_batch_and_transitions(guard: Guard) -> None:
    batch = Sampler(guard.replay, 4, 1, 0.9, seed=0).sample(0)
    guard.check_update({"loss/critic": torch.tensor(1.0)}, batch, 7)
    with pytest.raises(NonFiniteError, match=r"loss/actor is not finite .*update 8") as caught:
        guard.check_update({"loss/critic": torch.tensor(1.0), "loss/actor": torch.tensor(torch.nan)}, batch, 8)
    assert caught.value.exit_code == 3
    (dump,) = guard._directory.glob("non_finite_*")
    assert str(dump) in str(caught.value)
    assert json.loads((dump / "report.json").read_text())["transitions"] == 20
    torch.testing.assert_close(load_file(dump / "batch.safetensors")["observation.policy"], batch.observation["policy"])
    assert load_file(dump / "transitions.safetensors")["observation.policy"].shape == (20, 3)


def test_the_offending_step_and_its_action_are_in_the_dump(guard: Guard) -> None:
    answer = step(1.0)
    answer.observation["policy"][1, 2] = np.nan
    with pytest.raises(NonFiniteError):
        guard.check_step(answer, ACTION + 0.5)
    (file,) = guard._directory.glob("non_finite_*/evidence.safetensors")
    evidence = load_file(file)
    assert evidence["policy"].isnan().sum() == 1
    assert evidence["action"].tolist() == [[0.5], [0.5]]


def test_a_final_observation_counts_only_where_an_episode_ended(guard: Guard) -> None:
    answer = step(1.0)
    answer.info["final_observation"] = {"policy": np.full((2, 3), np.nan, np.float32)}
    guard.check_step(answer, ACTION)
    answer.truncated[1] = True
    with pytest.raises(NonFiniteError, match=r"final observation 'policy' of environments \[1\]"):
        guard.check_step(answer, ACTION)


def test_evidence_that_cannot_be_written_does_not_hide_the_error(guard: Guard) -> None:
    guard._directory = guard._directory / "missing" / "folder"
    with pytest.raises(NonFiniteError, match="the evidence could not be written"):
        guard.stop("loss/critic", "a test")


def test_the_message_promises_a_checkpoint_only_if_there_is_one(guard: Guard) -> None:
    with pytest.raises(NonFiniteError, match="there is no checkpoint yet") as caught:
        guard.stop("loss/critic", "a test")
    assert "in place" not in str(caught.value)
    (guard._directory / "checkpoints" / ".staging_step_000000000020").mkdir(parents=True)
    with pytest.raises(NonFiniteError, match="there is no checkpoint yet"):
        guard.stop("loss/critic", "a test")
    (guard._directory / "checkpoints" / "step_000000000010").mkdir()
    with pytest.raises(NonFiniteError, match="the last checkpoint is in place") as caught:
        guard.stop("loss/critic", "a test")
    assert "resume=fresh" not in str(caught.value)

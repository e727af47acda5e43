"""Whole runs on a GPU: they resume bit for bit, learn, and export what they trained. Skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import SMALL, final_state, run

from rlplastic import train_agent
from rlplastic.evaluation import Evaluation

pytestmark = pytest.mark.gpu
ON_GPU = [*SMALL, "device=cuda", "schedule=horizon", "schedule.horizon=1000", "evaluation.every=0"]
FAST = {
    "triton": ["kernels=triton"],
    "tensors of torch": ["kernels=torch"],
    "several steps, held-out episodes": ["kernels=triton", "agent.n_step=3", "replay.holdout=0.4"],
    "bfloat16, compiled": ["precision=bf16", "compile=on"],
    "recorded": ["cuda_graphs=true"],
    "recorded, compiled": ["cuda_graphs=true", "compile=on", "precision=bf16"],
    "plain SAC": ["agent=sac", "agent.layer_norm=true"],
    "flow": ["critic=flow", "critic.steps=2", "critic.noises=2"],
    "page-locked replay": ["replay.device=pinned"],
    "8-bit observations": ["replay.observation_dtype=int8"],
    "priorities": ["replay.prioritised=true"],
    "a simulator in torch": ["env=torch", "env.task=examples.torch_pendulum:make"],
}


def trained(folder: Path, *overrides: str) -> dict[str, object]:
    train_agent([*ON_GPU, f"runs={folder}", "name=run", *overrides], quiet=True)
    state = final_state(folder / "run")
    state.pop("eval.csv")  # the first half ends with an evaluation of its own
    return state


@pytest.mark.parametrize("name", FAST)
def test_a_run_on_a_gpu_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    trained(tmp_path / "halves", *FAST[name], "env_steps=300")
    assert trained(tmp_path / "halves", *FAST[name]) == trained(tmp_path / "whole", *FAST[name])


def test_a_policy_trained_on_a_gpu_solves_pendulum_and_leaves_as_the_same_function(tmp_path: Path) -> None:
    options = ["env=pendulum", "env_steps=16000", "device=cuda", "cuda_graphs=true", "env.num_envs=4", "threads=1"]
    sizes = ["agent.critic_width=64", "agent.actor_width=32", "replay.batch_size=256", "replay.minimum=1000"]
    rates = ["replay_ratio=0.5", "agent.learning_rate=1e-3", "agent.target_rate=0.02", "compile=off"]
    result = train_agent([*options, *sizes, *rates, f"runs={tmp_path}", "name=run"], quiet=True)
    assert isinstance(result.evaluation, Evaluation) and result.evaluation.mean > -250
    done = run(f"run={result.path}", verb="export")
    assert done.returncode == 0, done.stderr
    assert json.loads((result.path / "export" / "policy.json").read_text())

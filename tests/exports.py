"""Exports for the tests: actors of chosen sizes as if trained, saved, exported, and files changed afterwards."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from omegaconf import OmegaConf

from rlplastic.agents.flashsac.networks import Actor as FlashSACActor
from rlplastic.agents.sac.networks import Actor as SACActor
from rlplastic.checkpoint import CheckpointStore
from rlplastic.config import Config, EnvConfig, SACConfig, ScalarCriticConfig
from rlplastic.deploy.document import Document
from rlplastic.envs import make_envs
from rlplastic.evaluation import evaluate
from rlplastic.exporting import build
from rlplastic.exporting.assemble import document_of
from rlplastic.exporting.graph import metadata_of
from rlplastic.exporting.proofs import real_observations
from rlplastic.exporting.task_facts import task_facts
from rlplastic.exporting.verification import Original, verify
from rlplastic.policy import load_policy

PENDULUM = EnvConfig(family="classic", task="Pendulum-v1")
HOPPER = EnvConfig(family="mujoco", task="Hopper-v5")


def flashsac_actor(observations: int, actions: int, width: int = 8, blocks: int = 2, seed: int = 0) -> FlashSACActor:
    """With statistics, norms and biases as after training."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    actor = FlashSACActor(observations, actions, width, blocks)
    with torch.no_grad():
        for name, value in actor.state_dict().items():
            noise = torch.rand(value.shape, generator=rng)
            if name.endswith("running_var"):
                value.add_(noise)
            elif name.endswith(("running_mean", "beta", "gamma", "gain", "bias")):
                value.add_(noise - 0.5)
    return actor


def sac_actor(observations: int, actions: int, layer_norm: bool, seed: int = 0) -> SACActor:
    torch.manual_seed(seed)
    actor = SACActor(observations, actions, 8, 2, layer_norm)
    with torch.no_grad():
        for name, value in actor.state_dict().items():
            if name.endswith("gain"):
                value.add_(torch.rand(value.shape) - 0.5)
    return actor


def save(run: Path, actor: FlashSACActor | SACActor, env: EnvConfig) -> Path:
    """A run directory with a checkpoint of this actor."""
    config = Config(env=env)
    if isinstance(actor, SACActor):
        config = replace(config, agent=SACConfig(), critic=ScalarCriticConfig())
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    state = {f"actor.{name}": value for name, value in actor.state_dict().items()}
    CheckpointStore(run / "checkpoints", keep=1).save(1000, tensors={"agent": state}, documents={})
    return run


def run_of(folder: Path, env: EnvConfig) -> Path:
    """A run of a small FlashSAC actor that fits the task."""
    envs = make_envs(env, seed=0, role="eval", num_envs=1)
    envs.close()
    return save(folder, flashsac_actor(envs.observation_dims["policy"], envs.action_dim), env)


def original_of(run: Path, episodes: int = 2) -> Original:
    policy = load_policy(run)
    evaluation = evaluate(policy.act, policy.env, seed=0, episodes=episodes)
    return Original(policy, task_facts(policy.env), real_observations(policy, 0, 128), evaluation, seed=0)


def staged(folder: Path, original: Original) -> Path:
    """The files of an export, not verified."""
    document = document_of(original.policy, original.facts, original.evaluation, original.seed)
    build.stage(folder, document, original, with_torchscript=False)
    return folder


def rewrite(folder: Path, document: Document) -> None:
    """Give both files of an export another document, consistently: only the task can tell that it is wrong."""
    (folder / "policy.json").write_text(document.to_json())
    model = onnx.load(folder / "policy.onnx")
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata_of(document))
    onnx.save(model, folder / "policy.onnx")


def failures(folder: Path, original: Original) -> dict[str, str]:
    """What was measured by the checks that failed."""
    return {check.name: check.measured for check in verify(folder, original) if check.passed is False}


def bent(values: tuple[Any, ...], first: int, second: int) -> tuple[Any, ...]:
    """The values with two of them exchanged."""
    changed = list(values)
    changed[first], changed[second] = changed[second], changed[first]
    return tuple(changed)


def rows(count: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)

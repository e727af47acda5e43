"""A policy loaded from a run directory acts exactly as the agent that was saved."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.sac import SAC
from rlplastic.checkpoint import CheckpointStore
from rlplastic.config import (
    CategoricalCriticConfig,
    Config,
    EnvConfig,
    FlashSACConfig,
    FlowCriticConfig,
    SACConfig,
    ScalarCriticConfig,
)
from rlplastic.errors import CheckpointError, ConfigurationError
from rlplastic.policy import load_policy, read_config


def agent_of(dims: dict[str, int], actions: int, width: int, blocks: int, seed: int = 0) -> FlashSAC:
    config = FlashSACConfig(critic_width=8, actor_width=width, num_blocks=blocks, gamma=0.99)
    agent = FlashSAC(dims, actions, 1, config, CategoricalCriticConfig(num_atoms=5), seed=seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # statistics as after training
        for name, value in agent.learner.actor.named_buffers():
            value.add_(torch.rand(value.shape, generator=rng) if name.endswith("var") else 0.3)
    return agent


def save(run: Path, agent: FlashSAC | SAC, step: int = 100, config: Config | None = None) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config or Config()))))
    return CheckpointStore(run / "checkpoints", keep=5).save(step, {"agent": agent.state_dict()}, {"progress": {}}).path


@pytest.mark.parametrize(
    ("dims", "actions", "width", "blocks"),
    [({"policy": 3}, 1, 8, 2), ({"policy": 11, "critic": 20}, 4, 16, 1), ({"policy": 5}, 2, 8, 12)],
)
def test_loaded_policy_acts_bit_for_bit_as_the_saved_agent(
    tmp_path: Path, dims: dict[str, int], actions: int, width: int, blocks: int
) -> None:
    agent = agent_of(dims, actions, width, blocks)
    save(tmp_path / "run", agent)
    policy = load_policy(tmp_path / "run")
    rng = np.random.default_rng(0)
    observation = {name: (10 * rng.normal(size=(33, dim))).astype(np.float32) for name, dim in dims.items()}
    actions_found = policy.act(observation)
    assert actions_found.dtype == np.float32 and actions_found.shape == (33, actions)
    assert np.abs(actions_found).max() <= 1
    np.testing.assert_array_equal(actions_found, agent.act(observation))
    np.testing.assert_array_equal(policy.act({"policy": observation["policy"]}), actions_found)


def test_a_policy_is_loaded_whatever_its_critic_was(tmp_path: Path) -> None:
    settings, critic = FlashSACConfig(critic_width=8, actor_width=8, gamma=0.99), FlowCriticConfig(noises=2)
    agent = FlashSAC({"policy": 5}, 2, 1, settings, critic)
    config = Config(agent=settings, critic=critic)
    save(tmp_path / "run", agent, config=config)
    policy = load_policy(tmp_path / "run")
    observation = {"policy": np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)}
    np.testing.assert_array_equal(policy.act(observation), agent.act(observation))
    assert policy.config == config


@pytest.mark.parametrize(("depth", "layer_norm"), [(1, False), (3, True)])
def test_a_policy_of_plain_sac_is_loaded_too(tmp_path: Path, depth: int, layer_norm: bool) -> None:
    settings = SACConfig(
        critic_width=8, actor_width=16, actor_depth=depth, layer_norm=layer_norm, gamma=0.99, initial_alpha=1.0
    )
    agent = SAC({"policy": 5}, 2, 1, settings, ScalarCriticConfig())
    config = Config(agent=settings, critic=ScalarCriticConfig())
    save(tmp_path / "run", agent, config=config)
    policy = load_policy(tmp_path / "run")
    observation = {"policy": np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)}
    np.testing.assert_array_equal(policy.act(observation), agent.act(observation))
    assert policy.config == config and policy.observation_dim == 5
    CheckpointStore(tmp_path / "run" / "checkpoints", keep=5).save(200, {"agent": {"updates": torch.tensor(1)}}, {})
    with pytest.raises(CheckpointError, match="holds no actor of agent=sac"):
        load_policy(tmp_path / "run")


def test_newest_checkpoint_is_taken_and_its_step_told(tmp_path: Path) -> None:
    for step in (100, 300, 200):
        save(tmp_path / "run", agent_of({"policy": 3}, 1, 8, 2, seed=step), step)
    policy = load_policy(str(tmp_path / "run"))
    observation = {"policy": np.ones((2, 3), np.float32)}
    expected = agent_of({"policy": 3}, 1, 8, 2, seed=300).act(observation)
    assert policy.step == 300
    np.testing.assert_array_equal(policy.act(observation), expected)


def test_configuration_comes_back_typed_with_the_environment(tmp_path: Path) -> None:
    env = EnvConfig(family="dmc", task="humanoid-run", num_envs=16, gamma=0.97, kwargs={"frame_skip": 2})
    config = Config(env=env, seed=7, replay_ratio=0.25)
    save(tmp_path / "run", agent_of({"policy": 3}, 1, 8, 2), config=config)
    policy = load_policy(tmp_path / "run")
    assert policy.config == config and policy.env == env
    assert read_config(tmp_path / "run") == config


def test_loading_and_acting_leave_the_global_generator_alone(tmp_path: Path) -> None:
    save(tmp_path / "run", agent_of({"policy": 3}, 1, 8, 2))
    before = torch.get_rng_state()
    load_policy(tmp_path / "run").act({"policy": np.ones((2, 3), np.float32)})
    assert torch.equal(torch.get_rng_state(), before)


def test_acting_changes_no_statistics_and_needs_no_gradients(tmp_path: Path) -> None:
    save(tmp_path / "run", agent_of({"policy": 3}, 1, 8, 2))
    policy = load_policy(tmp_path / "run")
    before = {name: value.clone() for name, value in policy.actor.state_dict().items()}
    policy.act({"policy": 5 * np.ones((4, 3), np.float32)})
    assert all(torch.equal(value, before[name]) for name, value in policy.actor.state_dict().items())
    assert not any(parameter.requires_grad for parameter in policy.actor.parameters())


def test_observation_of_another_width_is_refused_in_one_sentence(tmp_path: Path) -> None:
    save(tmp_path / "run", agent_of({"policy": 3}, 1, 8, 2))
    with pytest.raises(ConfigurationError, match=r"shape \(2, 4\); expected \(N, 3\)"):
        load_policy(tmp_path / "run").act({"policy": np.ones((2, 4), np.float32)})


def test_missing_run_names_its_neighbours(tmp_path: Path) -> None:
    save(tmp_path / "humanoid_flashsac_seed0", agent_of({"policy": 3}, 1, 8, 2))
    with pytest.raises(ConfigurationError, match=r"does not exist.*did you mean '.*/humanoid_flashsac_seed0'"):
        load_policy(tmp_path / "humanoid_flashsac_seed")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "checkpoints").mkdir()  # of a run whose configuration is lost
    with pytest.raises(ConfigurationError, match=r"holds no config\.yaml.*valid names: \S+/humanoid_flashsac_seed0$"):
        load_policy(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="is a file; expected a run directory"):
        load_policy(tmp_path / "file")


def test_names_of_runs_are_told_as_they_are_typed_and_folders_that_are_no_runs_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "runs" / "hopper_seed0", agent_of({"policy": 3}, 1, 8, 2))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_text("seed: 0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "empty").mkdir()
    told = {"runs/hopper_seed": "did you mean 'runs/hopper_seed0'?", "runs": "valid names: runs/hopper_seed0"}
    told["runs/empty"] = told["runs"]
    for given, hint in told.items():
        with pytest.raises(ConfigurationError) as caught:
            load_policy(given)
        assert str(caught.value).endswith(f"; {hint}")
    with pytest.raises(ConfigurationError, match=r"as made by rlplastic\.train$"):
        load_policy("hopper_seed0")


def test_run_without_a_checkpoint_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(Config()))))
    with pytest.raises(ConfigurationError, match="no checkpoint yet"):
        load_policy(tmp_path)


@pytest.mark.parametrize("text", ["env: [", "just words", "no_such_section: 1", "seed: never"])
def test_unreadable_configuration_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    save(tmp_path, agent_of({"policy": 3}, 1, 8, 2))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=r"config\.yaml cannot be read"):
        load_policy(tmp_path)


def test_damaged_checkpoint_falls_back_to_the_one_before_with_a_warning(tmp_path: Path) -> None:
    save(tmp_path, agent_of({"policy": 3}, 1, 8, 2), 100)
    newest = save(tmp_path, agent_of({"policy": 3}, 1, 8, 2), 200) / "agent.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    warnings: list[str] = []
    assert load_policy(tmp_path, warn=warnings.append).step == 100
    assert len(warnings) == 1 and "step_000000000200" in warnings[0]


def test_run_with_nothing_but_damaged_checkpoints_is_a_checkpoint_error(tmp_path: Path) -> None:
    path = save(tmp_path, agent_of({"policy": 3}, 1, 8, 2)) / "agent.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(CheckpointError):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    "missing", ["actor.head.mean_bias", "actor.trunk.embed.weight", "actor.trunk.blocks.0.expand.weight"]
)
def test_checkpoint_without_a_flashsac_actor_is_a_checkpoint_error(tmp_path: Path, missing: str) -> None:
    agent = agent_of({"policy": 3}, 1, 8, 2)
    state = {name: value for name, value in agent.state_dict().items() if name != missing}
    save(tmp_path, agent)
    CheckpointStore(tmp_path / "checkpoints", keep=5).save(200, {"agent": state}, {})
    with pytest.raises(CheckpointError, match="holds no actor of agent=flashsac"):
        load_policy(tmp_path)
    CheckpointStore(tmp_path / "checkpoints", keep=5).save(300, {"other": state}, {})
    with pytest.raises(CheckpointError, match="agent"):
        load_policy(tmp_path)


@pytest.mark.parametrize("device", ["tpu", "cuda:97", "cpu:x"])
def test_unusable_device_is_a_configuration_error(tmp_path: Path, device: str) -> None:
    save(tmp_path, agent_of({"policy": 3}, 1, 8, 2))
    with pytest.raises(ConfigurationError, match=f"device={device}"):
        load_policy(tmp_path, device)

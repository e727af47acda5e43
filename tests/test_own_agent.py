"""An agent from another package is trained, resumed, evaluated and exported like ours: `examples/own_agent`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import SMALL, command, final_state
from torch import nn

from rlplastic.agents import AGENTS, adopt
from rlplastic.config import VARIANTS
from rlplastic.diagnosis import diagnose_run
from rlplastic.errors import ConfigurationError
from rlplastic.exporting.fold import Affine, LayerNorm, Relu, fold
from rlplastic.policy import load_policy
from rlplastic.training import train_agent

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_agent"
CONFIGS = EXAMPLE / "configs"
TD3 = [*SMALL, "agent=td3", "name=run"]


def forget() -> None:
    AGENTS.pop("td3", None)
    VARIANTS["agent"].pop("td3", None)


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example's folder is on Python's path; its agent is unknown before and afterwards."""
    forget()
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield
    forget()


def trained(runs: Path, *overrides: str) -> dict[str, object]:
    result = train_agent([*TD3, *overrides, f"runs={runs}"], config_dir=CONFIGS, quiet=True)
    assert result.updates > 0
    return final_state(result.path)


@pytest.mark.usefixtures("outside")
def test_a_run_that_stopped_half_way_resumes_bit_for_bit(tmp_path: Path) -> None:
    trained(tmp_path / "halves", "env_steps=300")
    halves, whole = trained(tmp_path / "halves"), trained(tmp_path / "whole")
    halves.pop("eval.csv"), whole.pop("eval.csv")
    assert "agent.optimizer.actor.0.exp_avg" in whole
    assert halves == whole


@pytest.mark.usefixtures("outside")
def test_a_run_needs_the_package_of_its_agent_and_nothing_else_to_be_read_back(tmp_path: Path) -> None:
    trained(tmp_path)
    forget()
    policy = load_policy(tmp_path / "run")
    observation = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    mean, log_std = policy.actor(torch.from_numpy(observation))
    np.testing.assert_array_equal(policy.act({"policy": observation}), torch.tanh(mean).numpy())
    assert (log_std == -torch.inf).all() and policy.observation_dim == 3


def verb(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLE), os.environ.get("PYTHONPATH", "")])}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        command(*arguments, verb=name), capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )


@pytest.mark.slow
def test_every_verb_knows_it(tmp_path: Path) -> None:
    shown = verb("train", "--help", f"--config-dir={CONFIGS}", cwd=tmp_path)
    assert "td3" in shown.stdout
    for name, arguments in {
        "train": [f"--config-dir={CONFIGS}", *TD3],
        "evaluate": ["run=runs/run", "episodes=2"],
        "export": ["run=runs/run", "episodes=2"],
        "play": ["policy=runs/run/export/policy.onnx", "episodes=2"],
        "report": ["runs=runs"],
    }.items():
        done = verb(name, *arguments, cwd=tmp_path)
        assert done.returncode == 0, f"{name}: {done.stderr}"
    evaluated = json.loads((tmp_path / "runs" / "run" / "evaluation.json").read_text())
    assert evaluated["step"] == 600
    again = verb("train", *TD3, f"--config-dir={CONFIGS}", cwd=tmp_path)
    assert "finished at step 600" in " ".join(again.stdout.split())


@pytest.mark.slow
def test_a_sweep_trains_it_beside_one_of_ours(tmp_path: Path) -> None:
    overrides = [part for part in SMALL if part != "env_steps=600"]
    sweep = ["-m", f"--config-dir={CONFIGS}", *overrides, "env_steps=300", "agent=td3,sac"]
    done = verb("train", *sweep, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = sorted(path.parent.name for path in (tmp_path / "runs").glob("*/config.yaml"))
    assert [name.split("_")[1] for name in names] == ["sac", "td3"]


# Mistakes


@pytest.mark.usefixtures("outside")
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["agent.smoothing=1"], "unknown key 'agent.smoothing'; did you mean 'agent.smoothing_std'"),
        (["agent.num_blocks=1"], "agent.num_blocks=1 is a setting of agent=flashsac, but this run has agent=td3"),
        (["agent.reward_scaling=true"], "agent=td3 learns plain values"),
        (["precision=bf16"], "precision=bf16 does not go with agent=td3"),
        (["monitor=full"], "monitor=full reads the networks of agent=flashsac and agent=sac, and TD3 is another"),
        (["replay_ratio=adaptive"], "replay_ratio=adaptive reads the networks"),
    ],
)
def test_a_setting_that_it_does_not_have_is_refused(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    plain = [part for part in TD3 if part != "monitor=off"]
    with pytest.raises(ConfigurationError, match=sentence):
        train_agent([*plain, *overrides, f"runs={tmp_path}"], config_dir=CONFIGS, quiet=True)


@pytest.mark.usefixtures("outside")
def test_diagnosing_its_networks_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, "env_steps=300")
    with pytest.raises(ConfigurationError, match="diagnose run=… reads the networks of agent=flashsac"):
        diagnose_run(tmp_path / "run")


def test_without_its_folder_or_its_package_it_is_not_there(tmp_path: Path) -> None:
    forget()
    with pytest.raises(ConfigurationError, match="agent=td3 is not a choice of agent; valid names: flashsac, sac"):
        train_agent(["agent=td3"])
    with pytest.raises(ConfigurationError, match=r"config_dir=nowhere is no folder; expected one with files such as"):
        train_agent(["agent=td3"], config_dir="nowhere")
    (tmp_path / "agent").mkdir()
    (tmp_path / "agent" / "mine.yaml").write_text("name: mine\npackage: not_there\n")
    with pytest.raises(ConfigurationError, match=r"package='not_there'.*No module named 'not_there'.*PYTHONPATH"):
        train_agent(["agent=mine"], config_dir=tmp_path)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [("", "has no attribute 'AGENT'"), ("AGENT = 3", "AGENT of strange is a int; expected a module")],
)
def test_a_package_without_an_agent_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, sentence: str
) -> None:
    (tmp_path / "strange.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "strange", raising=False)
    with pytest.raises(ConfigurationError, match=sentence):
        adopt("mine", "strange")


@pytest.mark.usefixtures("outside")
def test_it_cannot_take_the_name_of_one_of_ours() -> None:
    with pytest.raises(ConfigurationError, match=r"agent.name=sac of td3 is taken"):
        adopt("sac", "td3")


def test_a_policy_of_torch_layers_is_folded_for_export() -> None:
    actor = nn.Module()
    actor.observation_dim = 3  # type: ignore[assignment]
    actor.mean = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    folded = fold(actor)
    assert [type(layer) for layer in folded.layers] == [Affine, LayerNorm, Relu, Affine]
    assert (folded.observation_dim, folded.action_dim) == (3, 2)
    first, last = folded.layers[0], folded.layers[-1]
    np.testing.assert_array_equal(first.weight, actor.mean[0].weight.detach().double().numpy())
    np.testing.assert_array_equal(last.bias, actor.mean[3].bias.detach().double().numpy())
    linear = nn.Linear(3, 2)
    for layers in ([linear, nn.Tanh()], [linear, nn.ReLU()], [nn.Linear(3, 2, bias=False)], []):
        actor.mean = nn.Sequential(*layers)
        with pytest.raises(ConfigurationError, match=r"cannot be exported; expected .* torch.nn.Sequential of Linear"):
            fold(actor)

"""The verb: the training policy's returns again, perturbed where that can be done, and never with torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from policies import document_of, write_policy

from rlplastic import play
from rlplastic.config import EnvConfig, RandomiseConfig
from rlplastic.deploy import OnnxPolicy
from rlplastic.errors import ConfigurationError
from rlplastic.evaluation import evaluate

XMLS = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets"
HOPPER = EnvConfig(backend="gymnasium", family="mujoco", task="Hopper-v5", num_envs=4)
PENDULUM = EnvConfig(family="classic", task="Pendulum-v1", num_envs=4)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("policies"), {}
    for env in (HOPPER, PENDULUM, dataclasses.replace(HOPPER, backend="envpool")):
        made[f"{env.backend} {env.task}"] = path = folder / env.backend / env.task / "export" / "policy.onnx"
        path.parent.mkdir(parents=True)
        write_policy(path, document_of(env, seed=7))
    return made


def report(*arguments: str, out: Path) -> dict[str, Any]:
    play.main([*arguments, f"out={out}"])
    (file,) = out.glob("*.json")
    document: dict[str, Any] = json.loads(file.read_text())
    file.unlink()
    return document


def evaluated(path: Path, env: EnvConfig, seed: int) -> np.ndarray:
    policy = OnnxPolicy.load(path)
    return evaluate(lambda seen: policy.run(seen["policy"]).raw_actions, env, seed=seed, episodes=3).returns


@pytest.mark.parametrize("env", [HOPPER, PENDULUM], ids=lambda env: env.backend)
def test_episodes_are_those_of_an_evaluation_with_the_seed_of_the_run(
    policies: dict[str, Path], tmp_path: Path, env: EnvConfig
) -> None:
    path = policies[f"{env.backend} {env.task}"]
    for arguments, seed in (([], 7), (["seed=2"], 2)):
        found = report(f"policy={path}", "episodes=3", *arguments, out=tmp_path)
        np.testing.assert_allclose(found["returns"], evaluated(path, env, seed), rtol=1e-5)
        assert found["seed"] == seed and found["cycles"] == sum(found["lengths"])


def test_dynamics_of_an_env_are_perturbed_as_in_training(policies: dict[str, Path], tmp_path: Path) -> None:
    path = policies["gymnasium Hopper-v5"]
    found = report(f"policy={path}", "episodes=3", "perturb.mass=1.3", "perturb.friction=0.5", out=tmp_path)
    ranges = RandomiseConfig(mass=[1.3, 1.3], friction=[0.5, 0.5])
    changed = evaluated(path, dataclasses.replace(HOPPER, randomise=ranges), 7)
    np.testing.assert_allclose(found["returns"], changed, rtol=1e-5)
    assert not np.allclose(changed, evaluated(path, HOPPER, 7))
    assert found["perturbation"]["mass"] == 1.3


def test_envpool_plays_noise_and_delays_only(policies: dict[str, Path], tmp_path: Path) -> None:
    path = policies["envpool Hopper-v5"]
    with pytest.raises(
        ConfigurationError, match=r"perturb.gain edits the robot's model, which .* env.backend=gymnasium"
    ):
        play.main([f"policy={path}", "perturb.gain=2"])
    plain = report(f"policy={path}", "episodes=3", out=tmp_path)["returns"]
    assert report(f"policy={path}", "episodes=3", "perturb.action_delay=2", out=tmp_path)["returns"] != plain
    other = report(f"policy={path}", "episodes=3", "env.backend=gymnasium", "perturb.gain=0.5", out=tmp_path)
    assert other["perturbation"]["gain"] == 0.5


def test_mjcf_is_played_from_the_file_and_the_document(policies: dict[str, Path], tmp_path: Path) -> None:
    arguments = [f"policy={policies['gymnasium Hopper-v5']}", f"mjcf={XMLS / 'hopper.xml'}", "episodes=3"]
    found = report(*arguments, out=tmp_path)
    assert found["score"] == "seconds upright" and found["simulator"] == "hopper"
    np.testing.assert_allclose(found["returns"], np.array(found["lengths"]) * 0.008, rtol=1e-5)
    assert found["returns"] == report(*arguments, out=tmp_path)["returns"], "the same seed, the same bits"
    assert found["returns"] != report(*arguments, "seed=1", out=tmp_path)["returns"]


def test_robustness_writes_a_row_for_every_value_and_a_plot(
    policies: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = policies["envpool Pendulum-v1"]
    found = report(f"policy={path}", "episodes=2", "robustness=true", out=tmp_path)
    assert [row["perturbation"] for row in found["rows"]] == [
        "",
        *["observation_noise"] * 4,
        *["observation_delay"] * 4,
        *["action_delay"] * 4,
    ]
    assert "left out: friction, mass, gain, push" in capsys.readouterr().out
    assert (tmp_path / "Pendulum-v1_robustness.png").exists()


def test_results_lie_beside_an_export_and_never_in_it(policies: dict[str, Path]) -> None:
    path = policies["envpool Pendulum-v1"]
    play.main([f"policy={path}", "episodes=1"])
    assert (path.parent.parent / "play" / "Pendulum-v1.json").exists()
    assert [file.name for file in path.parent.iterdir()] == ["policy.onnx"]


MISTAKES = [
    (["policy=nowhere.onnx"], "nowhere.onnx does not exist"),
    (["perturb.fricton=2"], "did you mean 'perturb.friction'"),
    (["perturb.mass=0"], "mass=0.0 is out of range"),
    (["perturb.action_delay=1.5"], "perturb.action_delay=1.5 was refused"),
    (["env=humanod"], "did you mean 'humanoid'"),
    (["env.bakend=gymnasium"], "did you mean 'env.backend'"),
    (["env=ant"], "Ant-v5 has 105 observations and 8 actions, the policy 11 and 3"),
    (["mjcf=robot.xml"], "mjcf=robot.xml does not exist"),
    (["mjcf=robot.xml", "env=hopper"], "expected one simulator"),
    (["episodes=0"], "episodes=0 is out of range"),
    (["seed=-1"], "seed=-1 is out of range"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES)
def test_a_mistake_is_explained_in_one_sentence(policies: dict[str, Path], arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        play.main([f"policy={policies['gymnasium Hopper-v5']}", *arguments])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it raises ImportError
from rlplastic.play import main
policy, xml, out = sys.argv[1:]
common = [f"policy={policy}", f"out={out}", "episodes=1"]
main(common)
main([*common, f"mjcf={xml}", "seconds=0.5"])
main([*common, "perturb.friction=0.5", "perturb.observation_noise=0.1"])
"""


def test_torch_is_never_imported(policies: dict[str, Path], tmp_path: Path) -> None:
    arguments = [str(policies["gymnasium Hopper-v5"]), str(XMLS / "hopper.xml"), str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["Hopper-v5.json", "hopper.json"]

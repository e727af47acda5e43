"""Names: every short name and every family resolves to a task that the backend has."""

from __future__ import annotations

import os
from pathlib import Path

import envpool
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import rlplastic.envs as envs_package
from rlplastic.config import EnvConfig
from rlplastic.envs import make_envs
from rlplastic.envs.catalogue import DECLARED_TERMS, EXAMPLES, FAMILIES, find_family, resolve, tasks
from rlplastic.errors import ConfigurationError

FOLDER = Path(envs_package.__file__).parent.parent / "configs" / "env"
SHORT_NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
GAMMA = {"myosuite": 0.95, "playground": 0.97}


@pytest.mark.parametrize(
    ("family", "task", "expected"),
    [
        ("mujoco", "Ant-v5", "Ant-v5"),
        ("dmc", "humanoid-run", "HumanoidRun-v1"),
        ("dmc", "ball_in_cup-catch", "BallInCupCatch-v1"),
        ("dmc", "humanoid_CMU-run", "HumanoidCMURun-v1"),
        ("dmc", "lqr-lqr_2_1", "LqrLqr21-v1"),
        ("playground", "G1JoystickFlatTerrain", "MuJoCoPlayground/G1JoystickFlatTerrain-v1"),
        ("metaworld", "reach-v3", "MetaWorld/Reach-v3"),
        ("metaworld", "button-press-topdown-wall-v3", "MetaWorld/ButtonPressTopdownWall-v3"),
        ("myosuite", "myoHandPoseFixed-v0", "MyoSuite/myoHandPoseFixed-v0"),
        ("classic", "Pendulum-v1", "Pendulum-v1"),
    ],
)
def test_a_familys_own_spelling_resolves_to_envpools_id(family: str, task: str, expected: str) -> None:
    assert resolve(family, task) == expected
    assert find_family(task) == family


@pytest.mark.parametrize(
    ("family", "at_least"), [("mujoco", 33), ("dmc", 51), ("playground", 29), ("metaworld", 50), ("myosuite", 398)]
)
def test_every_listed_task_exists_and_none_is_forgotten(family: str, at_least: int) -> None:
    listed = tasks(family)
    assert set(listed.values()) <= set(envpool.list_all_envs())
    assert len(set(listed.values())) == len(listed) >= at_least


@pytest.mark.parametrize(
    ("family", "task", "hint"),
    [
        ("mujoco", "ant-v5", "'Ant-v5'"),
        ("dmc", "humanoid-rn", "'humanoid-run'"),
        ("metaworld", "pick-plac-v3", "'pick-place-v3'"),
        ("dmc", "Ant-v5", "env=mujoco"),
        ("mujco", "Ant-v5", "'mujoco'"),
    ],
)
def test_an_unknown_task_is_answered_with_the_familys_own_nearest_names(family: str, task: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=hint):
        resolve(family, task)


@pytest.mark.parametrize("short", SHORT_NAMES)
def test_every_short_name_composes_and_names_a_task_of_its_family(short: str) -> None:
    ConfigStore.instance().store(group="env", name="env_schema", node=EnvConfig)
    with initialize_config_dir(str(FOLDER.parent), version_base="1.3"):
        config = OmegaConf.to_object(compose(overrides=[f"+env={short}"]).env)
    assert isinstance(config, EnvConfig)
    assert (config.task or EXAMPLES[short]) in tasks(config.family)
    assert bool(config.task) == (short not in FAMILIES)
    assert config.backend == (config.family if config.family in ("gymnasium", "torch") else "envpool")
    assert config.gamma == GAMMA.get(config.family, 0.99)


def test_the_promised_short_names_and_families_are_there() -> None:
    promised = (
        "humanoid ant halfcheetah hopper walker2d swimmer pendulum inverted_pendulum g1 go1 humanoid_run dog_run "
    )
    promised += "cheetah_run walker_run hopper_hop mujoco dmc playground metaworld myosuite gymnasium torch"
    assert set(promised.split()) <= set(SHORT_NAMES)


def _starts(config: EnvConfig, **arguments: object) -> np.ndarray:
    envs = make_envs(config, **arguments)  # type: ignore[arg-type]
    rows = envs.reset()["policy"]
    envs.close()
    return rows


def test_seeds_depend_on_seed_role_rank_and_rebuild_and_on_nothing_else() -> None:
    config = EnvConfig(task="Hopper-v5", num_envs=3, threads=1)
    first = _starts(config, seed=0, role="train")
    np.testing.assert_array_equal(first, _starts(config, seed=0, role="train", num_envs=3))
    np.testing.assert_array_equal(first, _starts(config, seed=0, role="train", num_envs=5)[:3])
    others = [{"seed": 1, "role": "train"}, {"seed": 0, "role": "eval"}]
    others += [{"seed": 0, "role": "train", "rank": 1}, {"seed": 0, "role": "train", "rebuild": 1}]
    rows = np.concatenate([first, *(_starts(config, **other) for other in others)])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_backend_and_family_must_fit() -> None:
    envs = make_envs(EnvConfig(backend="gymnasium", task="Hopper-v5", num_envs=2), seed=0, role="train")
    assert envs.description.startswith("gymnasium") and envs.num_envs == 2
    envs.close()
    for config, hint in (
        (EnvConfig(backend="gymnasium", family="dmc", task="dog-run"), "envpool"),
        (EnvConfig(backend="envpool", family="gymnasium", task="Hopper-v5"), "gymnasium"),
        (EnvConfig(backend="envpol"), "'envpool'"),
        (EnvConfig(backend="torch", task="Hopper-v5"), "env=torch"),
        (EnvConfig(family="torch", task="examples.torch_pendulum:make"), "env=torch"),
        (EnvConfig(backend="torch", family="torch", task="a:b", switch_every=9), "env.backend=gymnasium"),
        (EnvConfig(task="Hopper-v6"), "'Hopper-v5'"),
    ):
        with pytest.raises(ConfigurationError, match=hint):
            make_envs(config, seed=0, role="train", num_envs=1)
    with pytest.raises(ConfigurationError, match="num_envs"):
        make_envs(EnvConfig(), seed=0, role="train")


@pytest.mark.slow
def test_every_dm_control_task_has_the_terms_that_dm_control_declares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "disable"))
    suite = pytest.importorskip("dm_control.suite")
    listed = tasks("dmc")
    assert {f"{domain}-{task}" for domain, task in suite.ALL_TASKS} == set(listed)
    for domain, task in suite.ALL_TASKS:
        declared = {
            name: int(np.prod(spec.shape)) for name, spec in suite.load(domain, task).observation_spec().items()
        }
        space = envpool.make_spec(task_id := listed[f"{domain}-{task}"]).observation_space
        spaces = getattr(space, "spaces", {"observation": space})
        kept = DECLARED_TERMS.get(task_id, tuple(spaces))
        assert [(name, int(np.prod(spaces[name].shape))) for name in kept] == list(declared.items()), task_id

"""A trained policy back from its run directory: the actor of the newest good checkpoint, and nothing else.

Neither an environment nor an agent is built: the sizes of the network are those of the saved tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from torch import Tensor, nn

from rlplastic.agents import AGENTS, adopt
from rlplastic.checkpoint import CheckpointStore
from rlplastic.command_line import reading_yaml
from rlplastic.config import Config, EnvConfig, schema
from rlplastic.envs.base import Observation
from rlplastic.errors import CheckpointError, ConfigurationError, nearest


@dataclass(frozen=True)
class Policy:
    """A policy to act with; made by `load_policy`.

    actor: the network; config: the run's resolved configuration; step: environment transitions it was trained on;
    checkpoint: the directory it was read from.
    """

    actor: nn.Module
    config: Config
    step: int
    device: torch.device
    checkpoint: Path

    @property
    def env(self) -> EnvConfig:
        """The task it was trained on; a simulator in torch runs where the policy is."""
        env = self.config.env
        return replace(env, device=str(self.device)) if env.backend == "torch" else env

    @property
    def observation_dim(self) -> int:
        """Width of the observations it reads."""
        width: object = self.actor.observation_dim
        assert isinstance(width, int), "what every actor owes: `AgentKind.actor_like`"
        return width

    @torch.no_grad()
    def act(self, observation: Observation) -> NDArray[np.float32]:
        """Deterministic actions tanh(mean), (N, A) in [-1, 1], of the observation group ``policy`` (N, D), float32.

        Raises:
            ConfigurationError: the observation has another width than in training.
        """
        if not isinstance(observation, dict) or "policy" not in observation:
            raise ConfigurationError(
                f"the policy was given a {type(observation).__name__} without the group 'policy'; expected "
                "a dictionary such as {'policy': array of shape (N, D)}"
            )
        rows = np.asarray(observation["policy"], np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.observation_dim:
            raise ConfigurationError(
                f"the policy was given observations of shape {rows.shape}; expected (N, {self.observation_dim}) as in "
                "its training: use the run's own task and options"
            )
        mean, _ = self.actor(torch.from_numpy(rows).to(self.device))
        actions: NDArray[np.float32] = torch.tanh(mean).cpu().numpy()
        return actions


def load_policy(
    run: str | Path, device: torch.device | str = "cpu", warn: Callable[[str], None] = lambda sentence: None
) -> Policy:
    """The policy of a run directory, from its newest good checkpoint.

    Args:
        run: the directory, such as ``runs/humanoid``.
        device: where the network is put.
        warn: called with a sentence for each damaged checkpoint that was passed over.

    Raises:
        ConfigurationError: no such run, no checkpoint in it yet, or no such device.
        CheckpointError: every checkpoint is damaged, or holds no actor of the run's agent.
    """
    path = Path(run)
    config = read_config(path)
    place = _checked(device)
    loaded = CheckpointStore(path / "checkpoints", keep=1, warn=warn).newest(segments=False)
    if loaded is None:
        raise ConfigurationError(
            f"{path} has no checkpoint yet; expected one in {path / 'checkpoints'}: let the run save one first"
        )
    actor = _actor(loaded.tensors("agent"), config.agent.name, loaded.path)
    return Policy(actor.to(place).requires_grad_(False), config, loaded.step, place, loaded.path)


_DECIDING = ("agent.name", "agent.package", "critic.kind")
"""What a written configuration's schema follows from."""
WRITTEN = "the configuration that this version of rlplastic writes"


def read_config(run: Path) -> Config:
    """The resolved configuration of a run directory.

    Raises:
        ConfigurationError: there is no such run, its configuration cannot be read, or its agent's package is not there.
    """
    file = run / "config.yaml"
    if not file.is_file():
        # for a folder of runs, such as run=runs, those in it; else those beside the one that was meant
        inside, beside = (
            [path.parent.name for path in place.glob("*/config.yaml") if (path.parent / "checkpoints").is_dir()]
            for place in (run, run.parent)
        )
        folder, name = (run, "") if inside else (run.parent, run.name)
        hint = nearest(name, inside or beside, prefix="" if folder == Path() else f"{folder}/")
        what = "holds no config.yaml" if run.is_dir() else "is a file" if run.exists() else "does not exist"
        raise ConfigurationError(
            f"run={run} {what}; expected a run directory as made by rlplastic.train" + (f"; {hint}" if hint else "")
        )
    with reading_yaml(file, WRITTEN):
        written = OmegaConf.load(file)
        agent, package, critic = (OmegaConf.select(written, key) for key in _DECIDING)
    if package is not None:
        adopt(agent, package)
    with reading_yaml(file, WRITTEN):
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema(agent, critic)), written))
    assert isinstance(config, Config)
    return config


def _actor(tensors: Mapping[str, Tensor], agent: str, path: Path) -> nn.Module:
    """The actor among an agent's tensors, named as in its ``state_dict``."""
    state = {name.removeprefix("actor."): value for name, value in tensors.items() if name.startswith("actor.")}
    try:
        # building draws initial weights; the caller's random stream must not notice
        with torch.random.fork_rng(devices=[]):
            actor = AGENTS[agent].actor_like(state)
        actor.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {path} holds no actor of agent={agent} ({' '.join(str(error).split())[:200]}); "
            "expected a run of it written by this version"
        ) from error
    return actor


def _checked(device: torch.device | str) -> torch.device:
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        known = str(device).startswith(("cpu", "cuda"))  # of others torch lists all that it was ever built for
        raise ConfigurationError(
            f"device={device} cannot be used{f' ({reason})' * known}; expected cpu, cuda or cuda:<index>"
        ) from error
    return place

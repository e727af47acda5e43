"""Where a policy is played: the training backend on a task, or plain MuJoCo on a model from a file."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlplastic.command_line import first_line
from rlplastic.composition import compose, refuse_unknown
from rlplastic.config import EnvConfig, RandomiseConfig
from rlplastic.deploy import Document, OnnxPolicy
from rlplastic.envs import VectorEnv, build_envs
from rlplastic.envs.changes import Clock
from rlplastic.envs.perturbation import NAMES, OF_DYNAMICS, OF_SIGNALS, Perturbation
from rlplastic.errors import ConfigurationError
from rlplastic.evaluation import Evaluation
from rlplastic.playing.rollout import Act, Pace, perturbed, play
from rlplastic.seeding import environment_seeds, key
from rlplastic.video import record, record_with, seconds_per_step


@dataclass(frozen=True)
class Stage:
    """A policy in its simulator.

    name: for titles; unit: of what an episode is scored by; seed: of starts and perturbations; make: the one
    environment of an episode, by its number and the perturbation of its dynamics; names: perturbations that it can
    show; period: seconds of a control step; record: films a policy in an episode, or says why not.
    """

    policy: OnnxPolicy
    name: str
    unit: str
    seed: int
    make: Callable[[int, Perturbation], VectorEnv]
    names: tuple[str, ...]
    period: float
    record: Callable[[Act, Perturbation, Path], str | None]

    def act(self, episode: int, perturbation: Perturbation) -> Act:
        """The policy of one episode behind the perturbation of its signals."""
        return perturbed(self.policy, perturbation, key("play", self.seed, episode))

    def evaluate(self, perturbation: Perturbation, episodes: int, pace: Pace | None = None) -> Evaluation:
        """Play whole episodes, timed where there is a ``pace``; errors as in `play`."""

        def act(episode: int) -> Act:
            plain = self.act(episode, perturbation)
            return plain if pace is None else pace.around(plain)

        return play(lambda episode: self.make(episode, perturbation), act, episodes)

    def film(self, perturbation: Perturbation, path: Path) -> str | None:
        """Record the first episode; returns None, or one line that says why there is no film."""
        return self.record(self.act(0, perturbation), perturbation, path)


def task_stage(policy: OnnxPolicy, overrides: Sequence[str], seed: int, episodes: int) -> Stage:
    """A task, by default the policy's own, without its domain randomisation.

    Episodes start as those of `rlplastic.evaluate` with this seed and number of episodes do.

    Args:
        policy: the exported policy.
        overrides: ``env=…`` and ``env.…=…`` as typed.
        seed: of starts and perturbations.
        episodes: how many can be made.

    Raises:
        ConfigurationError: the task cannot be built, or does not fit the policy.
    """
    env = replace(_env_config(policy.document, overrides), vectorization="sync", autoreset="next_step")
    seeds = environment_seeds(seed, "eval", 0, episodes, 0)
    steps = policy.document.provenance.training_steps

    def under(perturbation: Perturbation) -> EnvConfig:
        changed = [name for name in perturbation.changed() if name in OF_DYNAMICS]
        return replace(env, randomise=RandomiseConfig(**{name: [getattr(perturbation, name)] * 2 for name in changed}))

    def make(episode: int, perturbation: Perturbation) -> VectorEnv:
        return build_envs(under(perturbation), [seeds[episode]], Clock(steps))

    def film(act: Act, perturbation: Perturbation, path: Path) -> str | None:
        return record(act, under(perturbation), path, seed=seed, transitions=steps)

    trial: Any = make(0, Perturbation())
    try:
        widths = trial.observation_dims["policy"], trial.action_dim
        if widths != (policy.observation_dim, policy.action_dim):
            raise ConfigurationError(
                f"{env.task} has {widths[0]} observations and {widths[1]} actions, the policy {policy.observation_dim} "
                f"and {policy.action_dim}; expected the task it was trained on, "
                f"{policy.document.provenance.environment}"
            )
        editable = env.backend == "gymnasium" and hasattr(trial._env.envs[0].unwrapped, "model")
        names = NAMES if editable else OF_SIGNALS
        return Stage(policy, env.task, "return", seed, make, names, seconds_per_step(env, trial), film)
    finally:
        trial.close()


def mjcf_stage(policy: OnnxPolicy, file: str, seed: int, seconds: float, command: Sequence[float]) -> Stage:
    """Plain MuJoCo on a model from a file.

    Args:
        policy: the exported policy.
        file: an MJCF file.
        seed: of starts and perturbations.
        seconds: time limit of an episode.
        command: what the term ``command`` tells the policy.

    Raises:
        ConfigurationError: the file is no model, or does not fit the policy.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")  # read as MuJoCo is imported; needs no display
    from rlplastic.playing.mjcf import MjcfEnv, load_model

    model = load_model(file)

    def make(episode: int, perturbation: Perturbation) -> MjcfEnv:
        return MjcfEnv(
            copy.copy(model),
            policy.document,
            seconds=seconds,
            seed=key("play", seed, episode),
            command=tuple(command),
            perturbation=perturbation,
        )

    def film(act: Act, perturbation: Perturbation, path: Path) -> str | None:
        return record_with(act, make(0, perturbation).camera(), path)

    trial = make(0, Perturbation())
    return Stage(policy, Path(file).stem, trial.score, seed, make, NAMES, trial.period, film)


def _env_config(document: Document, overrides: Sequence[str]) -> EnvConfig:
    """The task of ``env=``, else the policy's own, with what else was asked for."""
    if any(override.startswith("env=") for override in overrides):
        return compose(overrides).env
    refuse_unknown(overrides)
    asked = OmegaConf.from_dotlist([override.removeprefix("env.") for override in overrides])
    try:
        own = OmegaConf.merge(OmegaConf.structured(EnvConfig), document.provenance.configuration["env"], asked)
        config = OmegaConf.to_object(own)
    except (KeyError, OmegaConfBaseException) as error:
        raise ConfigurationError(
            f"the policy's document describes no task that can be built ({first_line(error)}); name one with env=…"
        ) from error
    assert isinstance(config, EnvConfig)
    return config

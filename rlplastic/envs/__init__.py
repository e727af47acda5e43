"""Environments: one contract (`base`), three adapters (envpool, gymnasium, torch), and a checker for your own.

Importing this package imports no simulator.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from rlplastic.envs.base import AutoresetMode, Observation, Step, VectorEnv, step
from rlplastic.envs.changes import Clock, changes
from rlplastic.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from rlplastic.config import EnvConfig

__all__ = ["AutoresetMode", "Observation", "Step", "VectorEnv", "build_envs", "make_envs", "step"]


def make_envs(
    config: EnvConfig,
    *,
    seed: int,
    role: Literal["train", "eval"],
    num_envs: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    rebuild: int = 0,
    transitions: int = 0,
    tensors: bool = False,
) -> VectorEnv:
    """The environments that a configuration describes, with seeds that depend on all arguments.

    Args:
        config: task, backend and options.
        seed: the run's seed.
        role: training and evaluation environments never share a seed.
        num_envs: overrides ``config.num_envs``.
        rank: of this process.
        ranks: how many processes train together, each on as many environments.
        rebuild: how often the environments were built anew before.
        transitions: of the run so far, which say where a task that switches (``config.switch_every``) is.
        tensors: leave what a simulator in torch computes on its device: a ``VectorEnv[Tensor]``.

    Raises:
        ConfigurationError: unknown backend, family, task or option.
        EnvironmentContractError: the task breaks the contract of `rlplastic.envs.base`.
    """
    from rlplastic.seeding import environment_seeds

    count = config.num_envs if num_envs is None else num_envs
    if count is None or count < 1:
        raise ConfigurationError(f"env.num_envs={count} was given; expected a number of at least 1")
    clock = Clock(transitions, pace=count * ranks if role == "train" else 0)
    return build_envs(config, environment_seeds(seed, role, rank, count, rebuild), clock, tensors)


def build_envs(
    config: EnvConfig,
    seeds: list[int],
    clock: Clock = Clock(),  # noqa: B008 - immutable
    tensors: bool = False,
) -> VectorEnv:
    """One environment per construction seed; ``config.num_envs`` is not read. Errors as in `make_envs`."""
    changing = changes(config)
    kwargs = {str(name): value for name, value in config.kwargs.items()}
    if changing and config.backend in ("envpool", "torch"):
        raise ConfigurationError(
            f"{config.backend} lets nobody change its tasks ({', '.join(changing)}); expected env.backend=gymnasium "
            "with env.randomise and env.switch_every: other simulators have noise and pushes of their own in env.kwargs"
        )
    if (config.family == "torch") != (config.backend == "torch"):
        raise ConfigurationError(
            f"the family {config.family} does not go with env.backend={config.backend}; expected env=torch, which sets "
            "both, for a factory in torch"
        )
    if config.backend == "torch":
        from rlplastic.envs.torch_adapter import TorchEnv, find_factory

        factory, device = find_factory(config.task), config.device or "cpu"
        return TorchEnv(factory, seeds, device, kwargs, config.task, arrays=not tensors)
    if config.backend == "envpool":
        if config.family == "gymnasium":
            raise ConfigurationError(
                "the family gymnasium has no envpool tasks; expected env.backend=gymnasium with it"
            )
        from rlplastic.envs.catalogue import resolve
        from rlplastic.envs.envpool_adapter import EnvpoolEnv

        task = resolve(config.family, config.task)
        return EnvpoolEnv(task, len(seeds), seeds, threads=config.threads, kwargs=kwargs)
    if config.backend != "gymnasium":
        raise ConfigurationError(
            f"env.backend={config.backend} is unknown; {nearest(config.backend, ('envpool', 'gymnasium', 'torch'))}"
        )
    if config.family not in ("gymnasium", "mujoco", "classic"):
        raise ConfigurationError(
            f"the family {config.family} is not registered with gymnasium; expected env.backend=envpool, or mujoco, "
            "classic or gymnasium as the family"
        )
    from rlplastic.envs.gymnasium_adapter import GymnasiumEnv

    if not changing:
        return GymnasiumEnv(config.task, len(seeds), seeds, config.vectorization, config.autoreset, kwargs)
    from rlplastic.envs.randomised import make_randomised

    make = partial(make_randomised, config, kwargs, clock)
    envs = GymnasiumEnv.from_factory(make, len(seeds), seeds, config.vectorization, config.autoreset, config.task)
    envs.description += f"; {', '.join(changing)}"
    return envs

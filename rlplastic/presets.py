"""From what was asked to what will run: checks every value, and fills in what is open from the hardware.

Every choice is listed with its reason for the start-up banner. Choices that depend on the machine are saved with the
run and reused on resume, so that resuming gives the same bits (`rlplastic.machine`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rlplastic import pacing
from rlplastic.agents import AGENTS
from rlplastic.agents.base import Setting
from rlplastic.config import VARIANTS, Config
from rlplastic.distributed import world_size
from rlplastic.errors import ConfigurationError, nearest
from rlplastic.kernels import dispatch
from rlplastic.machine import Machine
from rlplastic.plasticity.interventions import INTERVENTIONS
from rlplastic.plasticity.monitor import rungs
from rlplastic.plasticity.replay_ratio import SIGNALS
from rlplastic.plasticity_config import ADAPTIVE
from rlplastic.writers import services

DEFAULT_MINUTES = 10.0
COMPILE_PAYS_MINUTES = 3.0
"""Compiling the update takes 20 to 60 seconds on two cores; shorter runs stay eager."""
COMPILE_PAYS_STEPS = 50_000
LARGE_GPU_GIGABYTES = 24.0
"""From here on a GPU gets the published replay of 10 M transitions (14.7 GB for Humanoid)."""
MACHINE_KEYS = ("device", "threads", "env.threads", "env.device", "precision", "kernels", "compile")
"""Settings that belong to a machine and are chosen anew when a run is taken to another one."""
FEW_CORES = 16
"""Below this a CPU gets small networks and batches."""


@dataclass(frozen=True)
class Choice:
    """One line of the start-up banner."""

    what: str
    value: str
    reason: str
    warning: str = ""
    """What a user should know beyond the reason: an earlier start of this run chose another value."""


def resolve(asked: Config, machine: Machine) -> tuple[Config, list[Choice]]:
    """A configuration without open settings, and why each was set as it is.

    ``machine.settings`` of an earlier start of the same run are reused; a fresh machine's are filled in.

    Raises:
        ConfigurationError: a value is out of range or two values contradict each other.
    """
    config = copy.deepcopy(asked)
    check(config)
    if config.env_steps is None and config.max_minutes is None:
        config.max_minutes = DEFAULT_MINUTES
    settling = _Settling(config, machine)
    settling.hardware()
    settling.sizes()
    _settle_cadences(config)
    check(config)
    _check_sizes(config)
    return config, settling.choices


class _Settling:
    """Fills in open settings one by one and keeps the reasons."""

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config, self.machine = config, machine
        self.choices: list[Choice] = []
        self.on_cpu = machine.device == "cpu"
        self.kind = f"{machine.cores} CPU cores" if self.on_cpu else machine.device_name

    def settle(self, key: str, value: Setting, reason: str, warning: str = "") -> None:
        """Fill in one open (`None` or `auto`) setting; a given one is reported as given."""
        node, name = _locate(self.config, key)
        value, reason = AGENTS[self.config.agent.name].settings.get(key, (value, reason))
        if getattr(node, name) in (None, "auto"):
            then = self.machine.settings.setdefault(key, value)
            if then != value:
                reason = f"as when this run began; a new run would take {value}"
                warning = f"{key}={then}, {reason}: use fresh=true or name=… for one"
            setattr(node, name, then)
        else:
            preset = self.config.preset.name
            reason = "as asked" if preset == "auto" else f"as asked, or by preset={preset}"
        self.choices.append(Choice(key, str(getattr(node, name)), reason, warning))

    def hardware(self) -> None:
        """Device, threads, precision, compilation."""
        config, machine = self.config, self.machine
        self.settle("device", machine.device, "no CUDA device is there" if self.on_cpu else machine.device_name)
        # Two OpenMP threads that share a core with the simulator wait for each other: measured up to 15 times slower.
        spare = f"{self.kind}, one left to the simulation" if self.on_cpu and machine.cores > 1 else self.kind
        self.settle("threads", max(1, machine.cores - 1) if self.on_cpu else 1, spare)
        bf16 = "bfloat16 products in hardware"
        if machine.bf16_hardware:
            self.settle("precision", "bf16", f"{machine.processor if self.on_cpu else machine.device_name} has {bf16}")
        else:
            self.settle("precision", "float32", f"no {bf16}")
        kernels = dispatch.choose(config.kernels, config.device)
        self.settle("kernels", kernels.name, kernels.reason, kernels.warning)
        minutes = config.max_minutes if config.max_minutes is not None else math.inf
        if world_size() > 1 and config.distributed.bn_sync == "forward":
            self.settle("compile", "off", "with distributed.bn_sync=forward a loss sends messages")
        elif self.on_cpu and machine.compiler is None:
            self.settle("compile", "off", "no C++ compiler found (install g++ to train faster)")
        elif minutes < COMPILE_PAYS_MINUTES:
            self.settle("compile", "off", f"compiling would not pay within {minutes:g} minutes")
        elif config.env_steps is not None and config.env_steps < COMPILE_PAYS_STEPS:
            self.settle("compile", "off", f"compiling would not pay within {config.env_steps} steps")
        else:
            self.settle("compile", "on", f"with {machine.compiler}" if self.on_cpu else "for the GPU")

    def sizes(self) -> None:
        """Environments, networks, replay, pace."""
        config, machine = self.config, self.machine
        self.settle("env.num_envs", 8 if self.on_cpu else min(1024, 32 * machine.cores), self.kind)
        envs = config.env.num_envs or 1
        self.settle("env.threads", min(envs, machine.cores), "one per core, at most one per environment")
        if config.env.backend == "torch":
            self.settle("env.device", config.device, "the learner's, so that nothing has to travel")
        small = self.on_cpu and machine.cores < FEW_CORES
        network = "an update must stay cheap on few cores" if small else "published"
        self.settle("agent.critic_width", 64 if small else 256, network)
        self.settle("agent.actor_width", 32 if small else 128, "half the critic's, as published")
        for key, published, faster in (("learning_rate", 3e-4, 3e-3), ("target_rate", 0.01, 0.03)):
            if getattr(config.agent, key) is None:
                rate = (faster, "small networks and few updates bear more") if small else (published, "published")
                self.settle(f"agent.{key}", *rate)
        self.settle("agent.gamma", config.env.gamma, f"published for the {config.env.family} family")
        if config.agent.reward_scaling is None:
            bounded = config.critic.kind != "scalar"
            bounds = "has bounds, which returns must fit" if bounded else "has no bounds"
            self.settle("agent.reward_scaling", bounded, f"critic={config.critic.kind} {bounds}")
        if config.agent.initial_alpha is None:
            scaled = bool(config.agent.reward_scaling)
            self.settle("agent.initial_alpha", 0.01 if scaled else 1.0, f"rewards are {'' if scaled else 'not '}scaled")
        self.settle("replay.batch_size", 256 if small else 2048, self.kind)
        large = not self.on_cpu and machine.device_gigabytes >= LARGE_GPU_GIGABYTES
        where = f"for {machine.device_gigabytes:.0f} GB of GPU memory" if not self.on_cpu else "for CPU simulators"
        self.settle("replay.capacity", 10_000_000 if large else 1_000_000, f"published {where}" if large else where)
        batch, capacity = config.replay.batch_size or 1, config.replay.capacity or 1
        tenth = int(min(config.env_steps or math.inf, capacity)) // 10
        few = self.on_cpu or "env.num_envs" in AGENTS[config.agent.name].settings
        minimum = max(min(5_000 if few else 100_000, tenth), min(batch, capacity))
        self.settle("replay.minimum", minimum, "random transitions before the first update")
        pace = "balances simulation and learning" if self.on_cpu else "two updates per vector step"
        self.settle("replay_ratio", 0.5 if self.on_cpu else 2 / envs, pace)
        self._pace(0.5 if self.on_cpu else 2 / envs)

    def _pace(self, usual: float) -> None:
        """What `replay_ratio=adaptive` reads, and its bounds; ``usual`` is the ratio that this machine would have."""
        config, adaptive = self.config, self.config.adaptive
        if config.replay_ratio != ADAPTIVE:
            config.replay.holdout = config.replay.holdout or 0.0
            return
        if adaptive.rule == "plateau":
            self.settle("adaptive.low", 0.5, "published")
            self.settle("adaptive.signal", "fau", "published: the fraction of active units")
        else:
            otherwise = AGENTS[config.agent.name].settings.get("replay_ratio", (usual, ""))[0]
            self.settle("adaptive.low", otherwise, "the replay ratio that would be chosen otherwise")
            outside = ",td_gap" if config.replay.holdout != 0 else ""
            self.settle("adaptive.signal", f"gradient_dormant{outside}", "informative on networks of every kind")
        self.settle("adaptive.high", 4 * (adaptive.low or 0.0), "four times the least, as published")
        held_out = any(SIGNALS[name].source == "td_error" for name in pacing.signals_of(adaptive))
        why = "for the TD error on what training never samples" if held_out else "no signal needs held-out episodes"
        self.settle("replay.holdout", 0.05 if held_out else 0.0, why)


def _settle_cadences(config: Config) -> None:
    """Cadences are no part of a run's identity, so they follow the budget of this very start."""
    steps, envs, capacity = config.env_steps, config.env.num_envs or 1, config.replay.capacity or 1
    if config.tracking.every is None:
        config.tracking.every = max(1000, 100 * envs)
    if config.evaluation.every is None:
        config.evaluation.every = max(steps // 20, 1000) if steps is not None else max(10_000, 2_000 * envs)
    if config.checkpoint.every is None:
        config.checkpoint.every = max(10_000, 2_000 * envs, capacity // 100)
        if steps is not None:
            config.checkpoint.every = min(config.checkpoint.every, max(steps // 10, 1000))


def _locate(config: Config, key: str) -> tuple[object, str]:
    *path, name = key.split(".")
    node: object = config
    for part in path:
        node = getattr(node, part)
    return node, name


POSITIVE = (
    "env.num_envs",
    "env.threads",
    "env.rebuild_every",
    "env.switch_every",
    "agent.critic_width",
    "agent.actor_width",
    "agent.num_blocks",
    "agent.critic_depth",
    "agent.actor_depth",
    "agent.n_step",
    "agent.learning_rate",
    "agent.final_learning_rate",
    "agent.actor_every",
    "agent.initial_alpha",
    "agent.target_std",
    "agent.noise_repeat_max",
    "critic.num_atoms",
    "critic.support",
    "critic.num_members",
    "critic.steps",
    "critic.noises",
    "critic.coverage",
    "replay.capacity",
    "replay.minimum",
    "replay.batch_size",
    "replay.half_life",
    "schedule.horizon",
    "evaluation.episodes",
    "checkpoint.every",
    "checkpoint.keep",
    "tracking.every",
    "monitor.forward_every",
    "monitor.ranks_every",
    "monitor.probe_every",
    "monitor.probe_steps",
    "monitor.probe_functions",
    "monitor.ill",
    "monitor.healthy",
    "monitor.verify_updates",
    "monitor.verify_rounds",
    "monitor.recovery_updates",
    "monitor.cooldown",
    "monitor.scheduled_every",
    "monitor.scheduled_count",
    "replay_ratio",
    "adaptive.window",
    "adaptive.low",
    "adaptive.high",
    "adaptive.tolerance",
    "env_steps",
    "max_minutes",
    "threads",
    "distributed.timeout",
)
NOT_NEGATIVE = (
    "monitor.max_interventions",
    "monitor.budget",
    "monitor.value_margin",
    "monitor.rank_margin",
    "monitor.return_margin",
    "critic.target_noise",
    "priming_updates",
    "evaluation.every",
    "evaluation.final_episodes",
    "seed",
)
MOST = {
    "threads": 1024,
    "env.threads": 1024,
    "env.num_envs": 100_000,
    "agent.n_step": 1000,
    "agent.critic_width": 16_384,
    "agent.actor_width": 16_384,
    "agent.num_blocks": 100,
    "agent.critic_depth": 100,
    "agent.actor_depth": 100,
    "critic.num_atoms": 10_000,
    "critic.num_members": 100,
    "critic.steps": 1000,
    "critic.noises": 1000,
    "critic.coverage": 1,
    "evaluation.episodes": 10_000,
    "evaluation.final_episodes": 10_000,
}
"""Beyond these a typing error is likelier than an intention, and the machine would hang or run out of memory."""
CHOICES: dict[str, Collection[str]] = {
    "env.backend": ("envpool", "gymnasium", "torch"),
    "env.vectorization": ("sync", "async"),
    "env.autoreset": ("next_step", "same_step", "disabled"),
    "env.switch": ("friction", "observations", "actions"),
    "adaptive.rule": ("continuous", "plateau"),
    "critic.prediction": ("velocity", "endpoint"),
    "critic.time_embedding": ("cosines", "cosine", "none"),
    "critic.noise": ("fresh", "bank"),
    "critic.target_members": ("mean", "min"),
    "critic.reading": ("distilled", "one_step"),
    "critic.actor_members": ("min", "mean"),
    "schedule.kind": ("budget", "horizon"),
    "monitor.mode": ("off", "watch", "full", "scheduled"),
    "monitor.scheduled_intervention": INTERVENTIONS,  # read when it is asked: others may be added
    "distributed.bn_sync": ("running", "forward"),
    "replay.observation_dtype": ("float32", "float16", "bfloat16", "int8"),
    "replay.device": ("learner", "pinned"),
    "kernels": ("auto", "triton", "torch"),
    "precision": ("auto", "float32", "tf32", "bf16"),
    "compile": ("auto", "on", "off"),
    "resume": ("exact", "fresh"),
}


def check(config: Config) -> None:
    """Refuse values out of range, each with one sentence.

    Raises:
        ConfigurationError: naming the key, the value, what was expected.
    """
    pacing.check(config)
    for key in POSITIVE:
        value = _value(config, key)
        if value is not None and value != ADAPTIVE and not (value > 0 and math.isfinite(value)):
            raise ConfigurationError(f"{key}={value} is out of range; expected a number above 0")
    for key, most in MOST.items():
        value = _value(config, key)
        if value is not None and value > most:
            raise ConfigurationError(f"{key}={value} is out of range; expected at most {most:,}")
    for key, valid in CHOICES.items():
        value = _value(config, key)
        if value not in (None, *valid):
            raise ConfigurationError(f"{key}={value!r} is not a choice; {nearest(str(value), valid)}")
    _check_variants(config)
    for key, value in {"agent.gamma": config.agent.gamma, "env.gamma": config.env.gamma}.items():
        if value is not None and not 0 <= value < 1:
            raise ConfigurationError(f"{key}={value} is out of range; expected a discount in [0, 1)")
    if config.agent.target_rate is not None and not 0 < config.agent.target_rate <= 1:
        raise ConfigurationError(f"agent.target_rate={config.agent.target_rate} is out of range; expected (0, 1]")
    for key in ("replay.priority_exponent", "replay.importance_exponent"):
        if not 0 <= _value(config, key) <= 1:
            raise ConfigurationError(f"{key}={_value(config, key)} is out of range; expected a number in [0, 1]")
    if config.replay.holdout is not None and not 0 <= config.replay.holdout <= 0.5:
        raise ConfigurationError(
            f"replay.holdout={config.replay.holdout} is out of range; expected a share of episodes in [0, 0.5]"
        )
    atoms = _value(config, "critic.num_atoms")
    if atoms is not None and atoms < 2:
        raise ConfigurationError(f"critic.num_atoms={atoms} is too few; expected at least 2 atoms")
    decay = _value(config, "agent.weight_decay")
    if decay is not None and not 0 <= decay < math.inf:
        raise ConfigurationError(f"agent.weight_decay={decay} is out of range; expected 0 or more")
    for key in NOT_NEGATIVE:
        value = _value(config, key)
        if value is not None and not 0 <= value < math.inf:
            raise ConfigurationError(f"{key}={value} is out of range; expected a number of 0 or more")
    for name in config.tracking.writers:
        if name not in services.NAMES:
            raise ConfigurationError(f"tracking.writers has {name!r}; {nearest(name, services.NAMES)}")
    services.require(config.tracking.writers)
    for name in config.monitor.ladder:
        if name not in rungs():
            raise ConfigurationError(f"monitor.ladder has {name!r}; {nearest(name, rungs())}")
    if config.monitor.mode == "scheduled" and config.monitor.scheduled_count and config.env_steps is None:
        raise ConfigurationError("monitor.scheduled_count draws among the planned updates; expected env_steps with it")


def _value(config: Config, key: str) -> Any:  # noqa: ANN401 - of whatever type the setting has
    """A setting by its dotted key; None where this run's agent or critic has no such setting."""
    node, name = _locate(config, key)
    return getattr(node, name, None)


def _check_variants(config: Config) -> None:
    """The agent and the critic are those whose settings are there, and go together."""
    for key, node in {"agent.name": config.agent, "critic.kind": config.critic}.items():
        group, _, name = key.partition(".")
        value = getattr(node, name)
        if value not in VARIANTS[group]:
            raise ConfigurationError(f"{key}={value!r} is not a choice; {nearest(str(value), VARIANTS[group])}")
        if not isinstance(node, VARIANTS[group][value]):
            raise ConfigurationError(f"{key}={value} does not change the {group}; expected {group}={value} instead")
    name = config.agent.name
    if config.precision == "bf16" and "precision" in AGENTS[name].settings:
        raise ConfigurationError(f"precision=bf16 does not go with agent={name}; expected float32, or tf32 on a GPU")


def _check_sizes(config: Config) -> None:
    batch, capacity, minimum = config.replay.batch_size, config.replay.capacity, config.replay.minimum
    assert batch is not None and capacity is not None and minimum is not None
    if batch > capacity:
        raise ConfigurationError(
            f"replay.batch_size={batch} is larger than replay.capacity={capacity}; lower the one or raise the other"
        )
    if config.env_steps is not None and minimum >= config.env_steps and config.init_from is None:
        raise ConfigurationError(
            f"env_steps={config.env_steps} ends the run before replay.minimum={minimum} random transitions are there, "
            "so nothing would be learned; raise the one or lower the other"
        )
    if config.env_steps is not None and config.env.num_envs is not None and config.env.num_envs > config.env_steps:
        raise ConfigurationError(
            f"env.num_envs={config.env.num_envs} makes one vector step longer than env_steps={config.env_steps}; lower "
            "env.num_envs or raise env_steps"
        )
    if config.replay.prioritised and config.replay.half_life is not None:
        raise ConfigurationError(
            "replay.prioritised and replay.half_life are two ways to draw; expected one of them, so leave one out"
        )
    if config.replay.device == "pinned" and config.replay.prioritised:
        raise ConfigurationError(
            "replay.prioritised keeps its priorities on the learner's device; expected replay.device=learner with it"
        )
    if config.precision == "tf32" and not config.device.startswith("cuda"):
        raise ConfigurationError(
            f"precision=tf32 is a format of NVIDIA GPUs, but device={config.device}; use float32 or bf16 there"
        )
    if config.replay.device == "pinned" and not config.device.startswith("cuda"):
        raise ConfigurationError(
            f"replay.device=pinned is for a learner on a GPU, but device={config.device}, whose memory is the host's "
            "anyway; leave replay.device out"
        )
    if minimum > capacity:
        raise ConfigurationError(
            f"replay.minimum={minimum} is larger than replay.capacity={capacity}: learning would never start; lower it"
        )

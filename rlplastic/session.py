"""Everything a training run holds, built in one place; saving it, and continuing it bit for bit.

A simulator's state cannot be saved. An exact resume therefore builds the environments from their construction seeds,
steps them through the logged actions since, and compares the last observations bit for bit. `EnvConfig.rebuild_every`
bounds how many steps that can be.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlplastic.agents import parameter_bytes
from rlplastic.agents.base import Agent
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.patients import readable
from rlplastic.agents.sac import SAC
from rlplastic.checkpoint import CheckpointStore, Loaded, SegmentReference
from rlplastic.command_line import first_line
from rlplastic.config import Config
from rlplastic.distributed import ALONE, Group, share_of
from rlplastic.envs import make_envs
from rlplastic.envs.base import Observation, Step, VectorEnv, on_host, step
from rlplastic.envs.episodes import EpisodeStatistics
from rlplastic.errors import CheckpointError, ConfigurationError, NonFiniteError, SegmentMissingError
from rlplastic.evaluation import Evaluation
from rlplastic.guards import Guard
from rlplastic.pacing import Pacer
from rlplastic.plasticity_config import ADAPTIVE
from rlplastic.progress import Budget, MetricMeans, Progress, ReplayRatio, Stopwatch
from rlplastic.replay import Holdout, Prioritisation, ReplayRing, Sampler
from rlplastic.replay.memory import available_memory
from rlplastic.replay.prefetch import PrefetchingSampler
from rlplastic.resources import FIRST_ENVIRONMENT, resident_bytes
from rlplastic.run_directory import RunDirectory
from rlplastic.sharding import ShardedStore
from rlplastic.watching import Watcher

MAX_SEGMENTS = 128
"""Segments a checkpoint may list before the whole replay is written anew as one."""
TIME_LIMITS_BETWEEN_REBUILDS = 20
DEFAULT_TIME_LIMIT = 1000
COMPILED_UPDATES = 2
"""Updates of a process that compile: the first with an actor step and the first without."""
Actions: TypeAlias = NDArray[np.float32] | Tensor
"""(N, A), as the environments take them."""


@dataclass(frozen=True)
class Segment:
    """A saved piece of the replay: where it lies, and what it holds."""

    reference: SegmentReference
    stop: NDArray[np.int64]
    """(N,), the row of each column after its last one."""
    builds: int
    """The environments' build whose actions it holds."""


@dataclass
class Session:
    """The parts of a run; `rlplastic.loop.train` moves them."""

    config: Config
    directory: RunDirectory
    store: CheckpointStore | ShardedStore
    envs: VectorEnv[Any]
    agent: Agent
    replay: ReplayRing
    sampler: Sampler | PrefetchingSampler
    episodes: EpisodeStatistics
    guard: Guard
    budget: Budget
    replay_ratio: ReplayRatio
    progress: Progress
    observation: Observation[Any]
    """What the environments returned last."""
    uniform_until: int
    """Transitions collected with uniform random actions."""
    pacer: Pacer | None = None
    """What moves the replay ratio while the run goes on; None: it stays."""
    watcher: Watcher | None = None
    """The plasticity monitor; None: off."""
    group: Group = ALONE
    """The ranks that train together; the configuration, environments and replay are this one's."""
    final_evaluation: Evaluation | None = None
    """That of the finished run; saved with it, so that rerunning the command can tell it again."""
    metrics: MetricMeans = field(default_factory=MetricMeans)
    watch: Stopwatch = field(default_factory=Stopwatch)
    actions: list[Actions] = field(default_factory=list)
    """Every vector of actions since the environments were built, where they could repeat what it led to."""
    received: tuple[Actions, Step[Any], NDArray[np.bool_]] | None = None
    """The newest actions, answer and (N,) validity, until they are stored: that can wait for the next simulation."""
    first_update: int = 0
    """The agent's updates when this process began."""
    environment_bytes: int = 0
    """What one environment added to the memory of this process, as it was built and reset."""
    _segments: tuple[Segment, ...] = ()
    _saved_actions: int = 0

    @property
    def compiling(self) -> bool:
        """Whether the next update compiles something."""
        return self.config.compile == "on" and self.agent.updates < self.first_update + COMPILED_UPDATES

    @property
    def priming(self) -> bool:
        """Whether updates on the first transitions are owed, for which the environments wait."""
        owed = self.progress.primed < self.config.priming_updates
        return owed and self.progress.transitions >= max(self.replay_ratio.minimum, 1)

    def compare_ranks(self) -> None:
        """Compare checksums of the networks between ranks.

        Raises:
            DistributedError: they differ; naming the first tensor and the step.
        """
        if self.group.size > 1:
            self.group.require_equal(checksums(self.agent.modules), f"at step {self.progress.transitions}")

    def finished_episodes(self) -> tuple[list[float], list[int]]:
        """Returns and lengths of the training episodes of all ranks that ended since the last call."""
        mine = self.episodes.pop_finished()
        of_all = self.group.exchange([mine.returns.tolist(), mine.lengths.tolist()])
        return [x for returns, _ in of_all for x in returns], [x for _, lengths in of_all for x in lengths]

    # Environments

    @property
    def rebuild_is_due(self) -> bool:
        """Whether the environments have been stepped as long as the configuration allows.

        What cannot be repeated is only built anew on request: there is no replay of actions to bound.
        """
        if not (self.envs.deterministic or self.config.env.rebuild_every):
            return False
        return self.progress.vector_steps - self.progress.built_at >= self._rebuild_every

    @property
    def _rebuild_every(self) -> int:
        return self.config.env.rebuild_every or TIME_LIMITS_BETWEEN_REBUILDS * _time_limit(self.envs)

    @property
    def logged_action_bytes(self) -> int:
        """The most that `actions` will hold before the environments are built anew, or the budget is spent."""
        if not self.envs.deterministic:
            return 0
        steps = self._rebuild_every
        if self.config.env_steps is not None:
            steps = min(steps, self.config.env_steps // (self.envs.num_envs * self.group.size))
        return steps * self.envs.num_envs * self.envs.action_dim * 4

    def store_received(self) -> None:
        """Put the newest answer into reward statistics, replay and the log of actions."""
        if self.received is None:
            return
        action, answer, valid = self.received
        self.agent.observe(answer, valid)
        self.replay.add(action, answer, valid)
        if self.envs.deterministic:
            self.actions.append(action)
        self.received = None

    def rebuild(self) -> None:
        """Build the environments anew with the next seeds and start episodes; unfinished ones are dropped."""
        self.store_received()
        self.envs.close()
        self.progress.builds += 1
        self.progress.built_at = self.progress.vector_steps
        self.progress.built_after = self.progress.transitions
        self._build_envs()
        self.observation = self.envs.reset()
        self.guard.check_observation(self.observation)
        self.episodes.restart()
        self.replay.begin(self.observation)
        self.actions, self._saved_actions = [], 0

    def _build_envs(self) -> None:
        self.envs = make_envs(
            self.config.env,
            seed=self.config.seed,
            role="train",
            rank=self.group.rank,
            ranks=self.group.size,
            rebuild=self.progress.builds,
            transitions=self.progress.built_after,
            tensors=True,
        )

    # Saving

    def save(self, log_lengths: dict[str, int], finished: bool = False) -> None:
        """Write a checkpoint of everything; the run is not altered by it.

        Raises:
            CheckpointWriteError: the disk is full or a permission is lost; earlier checkpoints are untouched.
            NonFiniteError: a parameter is not finite; nothing was written.
        """
        self.store_received()
        try:
            self._save(self._live_segments(), log_lengths, finished)
        except SegmentMissingError:
            self._save((), log_lengths, finished)

    def _live_segments(self) -> tuple[Segment, ...]:
        """Segments that still hold a row of the ring or an action since the last build; none if there are too many."""
        oldest = self.replay.written - (self.replay.num_slots - 1)
        builds = self.progress.builds
        live = tuple(s for s in self._segments if (s.stop > oldest).any() or s.builds == builds)
        return live if len(live) < MAX_SEGMENTS else ()

    def _save(self, kept: tuple[Segment, ...], log_lengths: dict[str, int], finished: bool) -> None:
        stop = self.replay.written.copy()
        rows, first_action = (kept[-1].stop, self._saved_actions) if kept else (np.zeros_like(stop), 0)
        segment = {f"replay.{name}": tensor for name, tensor in self.replay.export_rows(rows, stop).items()}
        segment |= {"actions": _stacked(self.actions[first_action:], self.envs)}
        segment |= {"first_action": torch.tensor(first_action), "builds": torch.tensor(self.progress.builds)}
        arrays = {f"episodes.{name}": torch.from_numpy(np.asarray(a)) for name, a in self.episodes.state_dict().items()}
        arrays |= {f"observation.{group}": torch.as_tensor(rows) for group, rows in self.observation.items()}
        documents = {"progress": asdict(self.progress), "logs": log_lengths, "finished": finished}
        if self.final_evaluation is not None:
            documents["evaluation"] = {name: array.tolist() for name, array in vars(self.final_evaluation).items()}
        learned = self.agent.state_dict()
        if self.group.rank:  # the first rank saves what is the same everywhere
            learned = {name: learned[name] for name in self.agent.COLUMNS}
        tensors = {
            "agent": learned,
            "replay_head": self.replay.export_head(),
            "loop": arrays | {f"metrics.{name}": tensor for name, tensor in self.metrics.state_dict().items()},
        }
        if self.watcher is not None and self.group.rank == 0:
            documents["monitor"], tensors["monitor"] = self.watcher.state_dict()
        if self.pacer is not None and self.group.rank == 0:
            documents["pacer"], tensors["pacer"] = self.pacer.state_dict(), self.pacer.tensors()
        try:
            checkpoint = self.store.save(
                self.progress.transitions,
                tensors=tensors,
                documents=documents,
                new_segments=[segment],
                kept_segments=[old.reference for old in kept],
                check_finite=("agent",),
            )
        except NonFiniteError as error:
            self.guard.stop("the learner's state", str(error))
        self._segments = (*kept, Segment(checkpoint.segments[-1], stop, self.progress.builds))
        self._saved_actions = len(self.actions)

    # Resuming

    def restore(self, loaded: Loaded, tell: Callable[[str], None], track: Callable[[Any, str], Iterable[Any]]) -> str:
        """Continue from a checkpoint; returns how, for the banner.

        Args:
            loaded: the checkpoint.
            tell: prints a warning.
            track: wraps an iterable in a progress bar.

        Raises:
            CheckpointError: the checkpoint does not fit this configuration.
        """
        with _of_this_version(loaded):
            for name, value in loaded.documents["progress"].items():
                setattr(self.progress, name, value)
            self.agent.load_state_dict(loaded.tensors("agent"))
            self.first_update = self.agent.updates
            if self.watcher is not None and "monitor" in loaded.groups:
                self.watcher.load_state_dict(loaded.documents["monitor"], loaded.tensors("monitor"))
            if self.pacer is not None:
                self.pacer.load_state_dict(loaded.documents["pacer"], loaded.tensors("pacer"))
        replay = self.replay
        replay.clear()
        actions: dict[int, Actions] = {}
        segments = []
        for reference, segment in zip(loaded.segment_references, loaded.segments(), strict=True):
            replay.import_rows(part(segment, "replay."))
            builds, first = int(segment["builds"]), int(segment["first_action"])
            segments.append(Segment(reference, segment["replay.stop"].numpy(), builds))
            if builds == self.progress.builds:
                actions |= {first + offset: array for offset, array in enumerate(segment["actions"].numpy())}
        replay.import_head(loaded.tensors("replay_head"))
        loop = loaded.tensors("loop")
        self.episodes.load_state_dict({name: value.numpy() for name, value in part(loop, "episodes.").items()})
        self.metrics.load_state_dict(part(loop, "metrics."), self.agent.device)
        self.actions = [actions[index] for index in sorted(actions)]
        self._segments, self._saved_actions = tuple(segments), len(self.actions)
        if loaded.redealt:
            self._segments = ()  # they lie with other columns
            if self.group.rank:
                self.episodes.pop_finished()  # the first rank's, which it logs itself
            tell("this resume is not exact: another number of ranks wrote the checkpoint; fresh episodes are started")
            self.rebuild()
            return "its columns dealt out anew, fresh episodes"
        saved = {group: value.numpy() for group, value in part(loop, "observation.").items()}
        return self._continue_environments(saved, tell, track)

    def _continue_environments(
        self, saved: Observation, tell: Callable[[str], None], track: Callable[[Any, str], Iterable[Any]]
    ) -> str:
        expected = self.progress.vector_steps - self.progress.built_at
        reason = ""
        if self.config.resume == "fresh":
            reason = "resume=fresh was asked for"
        elif not self.envs.deterministic:
            reason = "the environments are not deterministic"
        elif len(self.actions) != expected:
            reason = f"{len(self.actions)} of {expected} actions are logged"
        else:
            self.envs.close()
            self._build_envs()
            self.observation = self.envs.reset()
            for action in track(self.actions, "replaying actions"):
                self.observation = step(self.envs, action).observation
            ended = on_host(self.observation)
            if any(not np.array_equal(ended[group], array) for group, array in saved.items()):
                reason = "the replayed environments ended in other observations than the saved ones"
        if self.group.all(not reason):
            return f"exact: {expected} vector steps replayed, last observations equal bit for bit"
        reason = reason or "another rank cannot go on exactly"
        tell(f"this resume is not exact: {reason}; fresh episodes are started")
        self.rebuild()
        return f"fresh episodes, since {reason}"


def _time_limit(envs: VectorEnv[Any]) -> int:
    """Steps of a full episode."""
    return envs.max_episode_steps or DEFAULT_TIME_LIMIT


@contextmanager
def _of_this_version(loaded: Loaded) -> Iterator[None]:
    """What state misses, or has in another shape, is told as a checkpoint that does not fit."""
    try:
        yield
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{loaded.path} does not fit this version of rlplastic ({type(error).__name__}: {first_line(error)}); go "
            "on with the version that wrote it, or begin anew with fresh=true or another name"
        ) from error


def _stacked(actions: list[Actions], envs: VectorEnv[Any]) -> Tensor:
    if not actions:
        return torch.zeros(0, envs.num_envs, envs.action_dim)
    return torch.stack([torch.as_tensor(action).cpu() for action in actions])


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, named by what follows it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def checksums(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """The sum of the bytes of every parameter and buffer, by name, in one transfer."""
    entries = {f"{key}.{name}": value for key, module in modules.items() for name, value in module.state_dict().items()}
    sums = torch.stack([value.flatten().view(torch.uint8).sum(dtype=torch.int64) for value in entries.values()])
    return dict(zip(entries, sums.tolist(), strict=True))


def named_parts(what: str) -> list[str]:
    """The names in a list separated by commas."""
    return [name.strip() for name in what.split(",")]


def build(
    config: Config,
    directory: RunDirectory,
    make_agent: Callable[..., Agent],
    store: CheckpointStore | ShardedStore,
    group: Group = ALONE,
) -> Session:
    """A new session at step 0, environments reset: this rank's share of what the configuration asks for.

    Raises:
        ConfigurationError: the task is unknown, or the replay does not fit into memory.
    """
    with suppress(ImportError):  # which is told below
        importlib.import_module(config.env.backend)  # whose memory must not count as that of environments
    before = resident_bytes()
    config = share_of(config, group)
    envs = make_envs(config.env, seed=config.seed, role="train", rank=group.rank, ranks=group.size, tensors=True)
    try:
        observation = envs.reset()
        each = max(resident_bytes() - before - FIRST_ENVIRONMENT, 0) // envs.num_envs
        session = _build(config, directory, make_agent, store, group, envs, observation)
        session.environment_bytes = each
        return session
    except BaseException:
        envs.close()
        raise


def _replay(config: Config, envs: VectorEnv[Any], rank: int) -> tuple[ReplayRing, Sampler | PrefetchingSampler]:
    settings = config.replay
    assert settings.capacity and settings.batch_size and config.agent.gamma is not None
    pinned = settings.device == "pinned"
    kernels = "auto" if pinned or config.kernels == "torch" else config.kernels
    ring = ReplayRing(
        settings.capacity,
        envs.num_envs,
        envs.observation_dims,
        envs.action_dim,
        envs.autoreset,
        settings.observation_dtype,
        "cpu" if pinned else config.device,
        holdout=Holdout(settings.holdout, config.seed, rank) if settings.holdout else None,
        prioritised=settings.prioritised,
        kernels=kernels,
        pinned=pinned,
    )
    exponents = Prioritisation(settings.priority_exponent, settings.importance_exponent)
    make = partial(
        Sampler,
        ring,
        settings.batch_size,
        config.agent.n_step,
        config.agent.gamma,
        config.seed,
        rank,
        half_life=settings.half_life,
        prioritisation=exponents if settings.prioritised else None,
        kernels=kernels,
        pinned=pinned,
    )
    return ring, PrefetchingSampler(make, config.device) if pinned else make()


def _build(
    config: Config,
    directory: RunDirectory,
    make_agent: Callable[..., Agent],
    store: CheckpointStore | ShardedStore,
    group: Group,
    envs: VectorEnv[Any],
    observation: Observation[Any],
) -> Session:
    settings = config.replay
    assert settings.minimum
    replay, sampler = _replay(config, envs, group.rank)
    needed, there = (
        parameter_bytes(config, envs.observation_dims, envs.action_dim),
        available_memory(torch.device(config.device)),
    )
    if needed > there:
        raise ConfigurationError(
            f"the networks need {needed / 1e9:.1f} GB but {config.device} has {there / 1e9:.1f} GB left; lower "
            "agent.critic_width, agent.actor_width or the number of their layers"
        )
    agent = make_agent(config, envs.observation_dims, envs.action_dim, group=group)
    taken = named_parts(config.init_what) if config.init_from is not None else []
    minimum = 0 if "replay" in taken else settings.minimum
    progress = Progress()
    watcher = None
    mode = config.monitor.mode
    if mode != "off" and (mode != "watch" or isinstance(agent, FlashSAC | SAC)):
        watcher = Watcher(config, readable(agent, f"monitor={mode}"), replay, planned_updates(config))
    guard = Guard(directory.path, replay, progress)
    guard.check_observation(observation)
    replay.begin(observation)
    pace, pacer = ReplayRatio(config.first_replay_ratio, minimum), None
    if config.replay_ratio == ADAPTIVE:
        pacer = Pacer(config, readable(agent, "replay_ratio=adaptive"), replay, pace, _time_limit(envs))
        if watcher is not None:
            watcher.edited = pacer.rebase
    return Session(
        config=config,
        directory=directory,
        store=store,
        envs=envs,
        agent=agent,
        replay=replay,
        sampler=sampler,
        episodes=EpisodeStatistics(envs.num_envs, envs.autoreset),
        guard=guard,
        budget=Budget(config.env_steps, config.max_minutes),
        replay_ratio=pace,
        pacer=pacer,
        progress=progress,
        observation=observation,
        uniform_until=0 if "actor" in taken else minimum,
        watcher=watcher,
        group=group,
    )


def planned_updates(config: Config) -> int | None:
    """How many updates a resolved configuration asks for, as it begins; None without a budget in steps."""
    assert config.replay.minimum is not None, "resolve the configuration first"
    if config.env_steps is None:
        return None
    return config.priming_updates + int(config.first_replay_ratio * max(config.env_steps - config.replay.minimum, 0))

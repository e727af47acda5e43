"""From overrides to a trained run: composes the configuration, opens the run directory, starts or resumes, trains."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf

from rlplastic import resources, time_profile
from rlplastic.agents import AGENTS, make_agent, working_bytes
from rlplastic.checkpoint import Loaded
from rlplastic.command_line import flatten, override_key
from rlplastic.composition import compose
from rlplastic.config import BUDGETS, HANDLING, Config, schema
from rlplastic.distributed import Group, joined, restarts
from rlplastic.errors import ConfigurationError, telling_of_memory
from rlplastic.evaluation import Evaluation
from rlplastic.initialisation import initialise
from rlplastic.loop import train
from rlplastic.machine import Machine, machine_from, probe_machine
from rlplastic.presets import MACHINE_KEYS, Choice, resolve
from rlplastic.progress import Budget, Progress, Stopwatch
from rlplastic.replay import memory
from rlplastic.reporting import Follower, Reporter
from rlplastic.run_directory import RunDirectory, default_name
from rlplastic.session import Session, build
from rlplastic.sharding import ShardedStore
from rlplastic.terminal import View, banner
from rlplastic.tracking import Tracker
from rlplastic.writers import services

IDENTITY_IGNORES = (*BUDGETS, *HANDLING)
"""Settings that do not make a run a different one: stop conditions, cadences, logging, and where it lies."""

MONITOR = {
    "off": "plasticity is not measured",
    "watch": "plasticity is measured and alarms are told; nothing is changed",
    "full": "what is ill by a probe is treated on a branch, verified, then committed or dropped",
    "scheduled": "interventions come by the calendar, whether anything is ill or not",
}
"""What each mode of the plasticity monitor means, for the banner."""

MEMORY_REMEDY = (
    "end what else takes it and rerun the command, which goes on from the last checkpoint, if any, or ask for less "
    "under another name, such as a smaller replay.capacity, replay.batch_size, env.num_envs or agent.critic_width"
)


@dataclass(frozen=True)
class Result:
    """What a finished run left."""

    path: Path
    transitions: int
    updates: int
    evaluation: Evaluation | None
    """The final evaluation, also if the run had been finished before."""


def train_agent(
    overrides: Sequence[str] = (), *, config_dir: str | Path | None = None, quiet: bool = False, spent: float = 0.0
) -> Result:
    """Train as ``python -m rlplastic.train <overrides>`` does; rerunning resumes.

    Args:
        overrides: ``key=value`` strings, such as ``["env=pendulum", "env_steps=10000"]``.
        config_dir: a folder with choices of your own, such as ``agent/mine.yaml`` for ``agent=mine``.
        quiet: print nothing but warnings.
        spent: seconds that went before this call and count for the profile.

    Raises:
        RlplasticError: one of `rlplastic.errors`, each with one sentence.
    """
    began = time.perf_counter() - spent
    asked = compose(overrides, config_dir)
    name = asked.name or name_of(overrides, asked.seed)
    with joined(asked.device, asked.distributed.timeout) as group:
        view = View(live=asked.tracking.live, quiet=quiet or group.rank > 0)
        machine, changed = _machine(asked, Path(asked.runs) / name)
        config, choices = resolve(asked, machine)
        _require_equal_settings(config, group)
        for sentence in changed + [choice.warning for choice in choices if choice.warning]:
            if group.rank == 0:
                view.warn(sentence)
        alike = _no_difference(Path(asked.runs) / name, config)
        ignore = (*IDENTITY_IGNORES, *(MACHINE_KEYS if changed else ()), *alike)
        run = _open(asked, name, config, ignore, group)
        with run as directory, telling_of_memory(MEMORY_REMEDY):
            directory.write("machine.json", json.dumps(asdict(machine), indent=1))
            return _train(config, choices, directory, view, began, group)


def _open(asked: Config, name: str, config: Config, ignore: Sequence[str], group: Group) -> RunDirectory:
    """The run directory on the first rank, and a folder of its own in it on every other; each is locked."""
    restarted = any(count for (count,) in group.numbers([restarts()]))  # each machine counts its own ranks' ends
    fresh = asked.fresh and not restarted  # a restart goes on with what the first start began
    whole = partial(RunDirectory.open, asked.runs, name, asdict(config), fresh, ignore)
    mine = partial(RunDirectory.open, Path(asked.runs) / name, f"rank_{group.rank}", asdict(config), False, ignore)
    first = group.attempt(whole, group.rank == 0)
    other = group.attempt(mine, group.rank > 0)
    run = first or other
    assert run is not None
    return run


def _require_equal_settings(config: Config, group: Group) -> None:
    """Refuse ranks whose machines chose different settings.

    Raises:
        ConfigurationError: naming the settings.
    """
    settings, *others = group.exchange(flatten(asdict(config)))
    for rank, theirs in enumerate(others, start=1):
        differences = [f"{key}: {value} -> {theirs[key]}" for key, value in settings.items() if value != theirs[key]]
        if differences:
            raise ConfigurationError(
                f"rank {rank} would train with other settings than rank 0 ({'; '.join(differences)}); expected the "
                "same everywhere, so give these settings on the command line"
            )


def _no_difference(path: Path, config: Config) -> list[str]:
    """Settings that make no other run of the one in ``path``: a monitor that only watches, then as now, changes none.

    Settings that did not exist when the run began do not either, at their defaults.
    """
    try:
        stored = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"))
    except Exception:  # of the file or its YAML: `RunDirectory.open` says what is wrong
        return []
    if not isinstance(stored, dict):
        return []
    # What a setting that came later does by default is what the run did before there was such a setting.
    before, now = flatten(stored), flatten(asdict(config))
    defaults = flatten(asdict(schema(config.agent.name, config.critic.kind)))
    alike = [key for key, value in now.items() if key not in before and value == defaults.get(key)]
    passive = ("off", "watch")
    if stored.get("monitor", {}).get("mode", "off") in passive and config.monitor.mode in passive:
        alike.append("monitor")
    return alike


def name_of(overrides: Sequence[str], seed: int) -> str:
    """The default run name of a list of overrides: what neither ends nor watches a run differently is left out."""
    values = {override_key(override): override.partition("=")[2] for override in overrides}
    described = [o for o in overrides if override_key(o).split(".")[0] not in IDENTITY_IGNORES]
    return default_name(values.get("env", "humanoid"), values.get("agent", "flashsac"), seed, described)


def _machine(asked: Config, path: Path) -> tuple[Machine, list[str]]:
    """The machine that this run began on, or this one; differences are refused unless accepted, then told."""
    now = probe_machine(asked.device)
    document = path / "machine.json"
    begun = any((path / "checkpoints").glob("step_*"))
    if asked.fresh or not begun:
        return now, []
    if not document.is_file():
        return now, [f"{document} is gone: settings are chosen anew, and this resume may not be exact"]
    try:
        then = machine_from(json.loads(document.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigurationError(f"{document} cannot be read ({error}); use fresh=true or another name") from error
    differences = then.differs_from(now)
    if not differences:
        now.settings = then.settings
        return now, []
    if not asked.accept_machine:
        raise ConfigurationError(
            f"{path} began on another machine ({'; '.join(differences)}), so its bits cannot be continued exactly; "
            "resume there, or accept it with accept_machine=true"
        )
    now.settings = {key: value for key, value in then.settings.items() if key not in MACHINE_KEYS}
    return now, [f"the machine changed ({'; '.join(differences)}): this resume is not exact"]


def _train(
    config: Config, choices: list[Choice], directory: RunDirectory, view: View, began: float, group: Group
) -> Result:
    from rlplastic import acceleration

    whole = directory.path.parent if group.rank else directory.path
    store = ShardedStore(whole, config.checkpoint.keep, AGENTS[config.agent.name].columns, group, view.warn)
    loaded = store.newest()
    if loaded is not None and loaded.documents["finished"]:
        progress = Progress(**loaded.documents["progress"])
        if Budget(config.env_steps, config.max_minutes).spent(progress):
            return _finished(loaded, directory, view)
    transform = acceleration.apply(config, proven=loaded is not None)
    factory = partial(make_agent, compile=transform, record=acceleration.recorder(config))
    session = build(config, directory, factory, store, group)
    session.watch = Stopwatch(began, acceleration.barrier(config.device) if config.profile else None)
    session.watch.lap("start")
    try:
        if session.envs.max_episode_steps is None:
            view.warn(
                f"{config.env.task} declares no time limit: an evaluation whose episodes never end stops the "
                "run with an error; give it one, such as env.kwargs.max_episode_steps=1000"
            )
        for name, reason in (session.pacer.uninformative if session.pacer else {}).items():
            view.warn(f"adaptive.signal={name} says nothing on this critic ({reason}), and decides nonetheless")
        source = _source(session, loaded, view)
        if group.rank:
            train(session, Follower(session, view))
            return Result(whole, session.progress.transitions, session.agent.updates, None)
        for sentence in directory.cut_back(loaded.documents["logs"] if loaded else {}):
            view.warn(sentence)
        if directory.moved_to is not None:
            view.note(f"the earlier run is now {directory.moved_to}")
        expected = expected_peak(session)
        if not view.quiet:
            memory_row = ("memory", f"{expected / 1e9:.2f} GB", "expected at the peak, replay included")
            banner([("run", str(directory.path), source), *describe(session, choices), memory_row])
        if config.compile == "on":
            view.note("the first updates compile the learner, which takes 20 to 60 seconds on two cores")
        with _tracker(config, directory, view) as tracker, view:
            if loaded is None:
                written = (directory.path / "config.yaml").read_text(encoding="utf-8")
                tracker.text("configuration", f"```yaml\n{written}```", 0)
            reporter = Reporter(session, tracker, view)
            train(session, reporter)
            peak = resources.peak_bytes()  # a film's renderer is no part of training
            if config.tracking.video:
                _record(session, tracker, view)
        _say_where(directory, view)
        view.note(f"peak memory: {peak / 1e9:.2f} GB; {expected / 1e9:.2f} GB were expected")
        if config.profile:
            _tell_profile(session, view)
        if session.agent.updates == 0:
            view.warn(
                f"nothing was learned: replay.minimum={config.replay.minimum:,} transitions come before the first "
                f"update and the run ended after {session.progress.transitions:,}; raise the budget or lower it"
            )
        return Result(directory.path, session.progress.transitions, session.agent.updates, reporter.last_evaluation)
    finally:
        session.envs.close()


def _tracker(config: Config, directory: RunDirectory, view: View) -> Tracker:
    wanted, path = config.tracking.writers, directory.path
    name = str(path.relative_to(config.runs))
    told = services.Run(path, name, config.tracking.project, flatten(asdict(config)))
    return Tracker(path, services.start(wanted, told, view.warn), services.TENSORBOARD in wanted)


def _source(session: Session, loaded: Loaded | None, view: View) -> str:
    """Continue from a checkpoint, or begin with what another run learned; returns what the run goes out from."""
    config = session.config
    if loaded is not None:
        restored = session.restore(loaded, view.warn, view.track)
        session.watch.lap("resume")
        return f"{loaded.path.name}, {restored}"
    if config.init_from is None:
        return "a new run"
    origin = initialise(session, config.init_from, config.init_what)
    if session.watcher is not None:
        session.watcher.rebase()
    return f"a new run from {origin}"


def _tell_profile(session: Session, view: View) -> None:
    session.watch.lap("finish")
    session.directory.write("profile.json", json.dumps(time_profile.document(session.watch.totals), indent=1))
    for line in time_profile.table(session.watch.totals):
        view.note(line)


def _finished(loaded: Loaded, directory: RunDirectory, view: View) -> Result:
    """What an earlier start of the same command ended with."""
    evaluation = Evaluation.from_lists(loaded.documents["evaluation"]) if "evaluation" in loaded.documents else None
    told = f", evaluated at {evaluation.mean:.5g}" if evaluation else ""
    more = "give it a larger env_steps or max_minutes to go on"
    view.note(f"{directory.path} is finished at step {loaded.step:,}{told}; {more}")
    _say_where(directory, view)
    return Result(directory.path, loaded.step, int(loaded.tensors("agent")["updates"]), evaluation)


def _say_where(directory: RunDirectory, view: View) -> None:
    """Commands to copy, for a shell in which nothing was activated."""
    tensorboard = Path(sys.executable).with_name("tensorboard")
    command = str(tensorboard) if tensorboard.exists() else "tensorboard"
    view.note(
        f"checkpoint: {directory.path}/checkpoints   "
        f"TensorBoard: {shlex.quote(_short(command))} --logdir {shlex.quote(str(directory.path))}"
    )


def _short(path: str) -> str:
    """Relative to the working directory where that is shorter."""
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    return relative if len(relative) < len(path) else path


def _record(session: Session, tracker: Tracker, view: View) -> None:
    from rlplastic.video import record

    step = session.progress.transitions
    path = session.directory.path / "videos" / f"step_{step:012d}.mp4"
    with view.during("filming"):
        problem = record(session.agent.act, session.config.env, path, seed=session.config.seed, transitions=step)
    if problem:
        view.note(f"no video: {problem}")
        return
    tracker.video("eval/episode", path, step)
    view.note(f"video: {path}")


def expected_peak(session: Session) -> int:
    """Bytes of memory that this process will hold at most: what it holds now, and what learning adds."""
    config, envs = session.config, session.envs
    evaluated = max(config.evaluation.final_episodes, config.evaluation.episodes if config.evaluation.every else 0)
    expected = resources.resident_bytes() + resources.LIBRARIES + session.logged_action_bytes
    expected += session.environment_bytes * evaluated
    if config.device == "cpu":
        expected += working_bytes(config, envs.observation_dims, envs.action_dim)
    return expected + (resources.COMPILER if config.compile == "on" else 0)


def describe(session: Session, choices: Iterable[Choice]) -> list[tuple[str, str, str]]:
    """The start-up banner: what was decided, and why."""
    config, envs, replay = session.config, session.envs, session.replay
    assert config.replay.batch_size and config.replay.capacity
    queues = 1 if replay.holdout is None else 2
    batch = config.replay.batch_size * session.group.size
    share = f"each has {envs.num_envs} environments and draws {config.replay.batch_size} rows"
    row = memory.bytes_per_transition(replay.layout, queues)
    total = memory.memory_bytes(config.replay.capacity, envs.num_envs, replay.layout, queues, config.replay.prioritised)
    groups = ", ".join(f"{group} {dim}" for group, dim in envs.observation_dims.items())
    budget = " or ".join(
        part
        for part in (
            f"{config.env_steps:,} transitions" if config.env_steps is not None else "",
            f"{config.max_minutes:g} minutes of training" if config.max_minutes is not None else "",
        )
        if part
    )
    horizon = "the budget" if config.schedule.kind == "budget" else f"{config.schedule.horizon:,} updates"
    constant = getattr(config.agent, "final_learning_rate", None) is None
    rates = "learning rates are constant" if constant else f"learning rates follow half a cosine over {horizon}"
    watched = MONITOR[config.monitor.mode]
    if session.watcher is None and config.monitor.mode != "off":
        watched = f"agent={config.agent.name} is none that can be read: plasticity is not measured"
    priming = []
    if config.priming_updates:
        first = f"on the first {session.replay_ratio.minimum:,} transitions, before training goes on"
        priming = [("priming", f"{config.priming_updates:,} updates", first)]
    return [
        ("environment", envs.description, f"observations: {groups}; {envs.action_dim} actions in [-1, 1]"),
        ("autoreset", envs.autoreset.value, "declared by the backend"),
        ("seed", str(config.seed), "training, evaluation and every rebuild use different streams of it"),
        ("budget", budget, "whichever comes first" if " or " in budget else "then a final evaluation"),
        ("schedule", config.schedule.kind, rates),
        ("monitor", config.monitor.mode, watched),
        *priming,
        (
            "replay memory",
            f"{total / 1e6:,.0f} MB",
            f"{row} bytes for each of {replay.num_slots * replay.num_envs:,} rows",
        ),
        (
            "samples per transition",
            f"{config.first_replay_ratio * batch:g}",
            f"{'at first: ' if session.pacer else ''}replay ratio {config.first_replay_ratio:g} x batch {batch}",
        ),
        *([("ranks", str(session.group.size), share)] if session.group.size > 1 else []),
        *((choice.what, choice.value, choice.reason) for choice in choices),
    ]

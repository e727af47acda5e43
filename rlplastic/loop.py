"""The one training loop: act -> step -> update -> store -> log -> evaluate -> checkpoint.

One turn is one step of the whole vector of environments. With ``overlap`` the simulation runs while the learner
learns: actions are sent, the previous answer is stored and the updates that are owed are done, then the answer is
received. So the policy that acts is the one from before those updates: a lag of one vector step, the same in every run,
so that equal seeds give equal bits. Without it the answer is received and stored first: every action comes from the
newest policy, and every update may draw the newest transition.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from rlplastic.command_line import stop_was_asked
from rlplastic.errors import CheckpointWriteError, Interrupted, NonFiniteError
from rlplastic.reporting import Follower, Reporter
from rlplastic.session import Actions, Session

PRIMING_UPDATES_A_TURN = 100


def train(session: Session, reporter: Reporter | Follower) -> None:
    """Train until the budget is spent, then evaluate and save.

    Raises:
        Interrupted: SIGINT, SIGTERM or SIGHUP arrived; the step was finished and the run saved.
        NonFiniteError: a NaN or infinity appeared; the last good checkpoint is untouched.
        DistributedError: a rank is gone or silent, or computed something else than the others.
        CheckpointWriteError: the last checkpoint could not be written.
        LogWriteError: the last logs could not be written.
    """
    session.watch.start()
    with stop_signals() as stop:
        while not session.budget.spent(session.progress):
            added = advance(session)
            adapt(session, reporter, added)
            after(session, reporter, added)
            if agree_to_stop(session, stop.is_set()):
                reporter.save()
                again = "without fresh=true" if session.config.fresh else "the same command"
                raise Interrupted(
                    f"interrupted at step {session.progress.transitions} and saved; rerun {again} to resume"
                )
        if session.group.total(reporter.unlogged):  # the first rank knows
            reporter.log()
        # The final evaluation takes a while: a run killed meanwhile must not lose its last stretch.
        save_or_warn(reporter)
        if session.config.evaluation.final_episodes:
            reporter.evaluate(session.config.evaluation.final_episodes)
            session.final_evaluation = reporter.last_evaluation
        reporter.save(finished=True)


def agree_to_stop(session: Session, asked: bool) -> bool:
    """Whether any rank was asked to stop; on the way the first rank's clock becomes that of all."""
    answers = session.group.numbers([session.progress.train_seconds, asked])
    session.progress.train_seconds = answers[0][0]
    return any(stop for _, stop in answers)


def advance(session: Session) -> int:
    """One vector step and the updates that are due; returns the transitions it added."""
    started = session.watch.elapsed
    if session.priming:
        _prime(session)
        added = 0
    else:
        action = _send(session)
        if not session.config.overlap:
            added = _receive(session, action)
        session.store_received()
        session.watch.lap("store")
        # while all that some rank's replay holds is held out, updates wait
        owed = session.progress.credit >= 1 and session.group.all(session.replay.transitions > 0)
        _learn(session, session.replay_ratio.due(session.progress) if owed else 0)
        if session.config.overlap:
            added = _receive(session, action)
    session.progress.train_seconds += session.watch.elapsed - started
    return added


def _send(session: Session) -> Actions:
    """Choose actions and let the simulation begin."""
    progress = session.progress
    uniform = progress.transitions < session.uniform_until
    action: Actions = session.agent.explore(
        session.observation, progress.vector_steps, session.episodes.active, uniform
    )
    with _stopping(session, action):
        session.envs.send(action)
    session.watch.lap("act")
    return action


@contextmanager
def _stopping(session: Session, action: Actions) -> Iterator[None]:
    """What the environments say of a non-finite action stops the run, with the evidence."""
    try:
        yield
    except NonFiniteError as error:
        session.guard.stop("action", str(error), {"action": torch.as_tensor(action)})


def _prime(session: Session) -> None:
    """Some of the updates on the first transitions (`Config.priming_updates`); the environments wait meanwhile."""
    session.store_received()
    session.watch.lap("store")
    due = min(session.config.priming_updates - session.progress.primed, PRIMING_UPDATES_A_TURN)
    session.progress.primed += due
    _learn(session, due, waiting=True)


def _learn(session: Session, due: int, waiting: bool = False) -> None:
    """So many updates; no transitions come in meanwhile if the environments are ``waiting``."""
    agent, watch = session.agent, session.watch
    budget_used = session.budget.used(session.progress)
    for batch in session.sampler.batches(agent.updates, due, agent.reward_scale) if due else ():
        watch.lap("sample")
        section = "compile" if session.compiling else "update"
        metrics = agent.update(batch, budget_used)
        if agent.td_error is not None:
            session.sampler.reprioritise(batch.rows, agent.td_error)
        watch.lap(section)
        session.guard.check_update(metrics, batch, agent.updates)
        session.metrics.add(metrics)
        watch.lap("check")
        if session.watcher is not None:
            session.watcher.after_update(batch, budget_used, waiting)
            watch.lap("monitor")


def _receive(session: Session, action: Actions) -> int:
    """Wait for the simulation and count what came; it is stored later (see `Session.received`)."""
    progress, watch = session.progress, session.watch
    with _stopping(session, action):
        step = session.envs.receive()
    watch.lap("env")
    session.guard.check_step(step, action)
    valid = session.episodes.observe(step)
    if session.watcher is not None:
        session.watcher.episodes_ended(session.episodes.ended)
    session.received = action, step, valid
    session.observation = step.observation
    added = session.group.total(int(valid.sum()))
    progress.vector_steps += 1
    session.replay_ratio.accrue(progress, added)
    if session.rebuild_is_due:
        session.rebuild()
    watch.lap("store")
    return added


def adapt(session: Session, reporter: Reporter | Follower, added: int) -> None:
    """With `replay_ratio=adaptive`, at the end of a window: what the critic's measurements make of the ratio."""
    decision = session.pacer.after(session.progress, added) if session.pacer is not None else None
    if decision is not None:
        session.progress.train_seconds += session.watch.lap("monitor")
        reporter.paced(decision)


def after(session: Session, reporter: Reporter | Follower, added: int) -> None:
    """What happens between turns, each at its own cadence in environment transitions; none of it changes the run.

    The checkpoint comes last: it must not promise a log or an evaluation that was not written yet.
    """
    config, progress, watch = session.config, session.progress, session.watch
    reporter.tell_findings()
    assert config.evaluation.every is not None and config.tracking.every and config.checkpoint.every, "resolve first"
    if progress.crossed(config.evaluation.every, added) and not session.budget.spent(progress):
        reporter.evaluate(config.evaluation.episodes)
    started = watch.elapsed
    if progress.crossed(config.tracking.every, added):
        session.compare_ranks()
        reporter.log()
    if progress.crossed(config.checkpoint.every, added):
        save_or_warn(reporter)
    progress.train_seconds += watch.elapsed - started


def save_or_warn(reporter: Reporter | Follower) -> None:
    """A checkpoint, or a warning: training goes on, since a later save may succeed and stopping would lose more."""
    try:
        reporter.save()
    except CheckpointWriteError as error:
        reporter.view.warn(str(error))


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP set; a second signal acts as usual. Only the main thread can listen.

    SIGHUP, the end of the terminal, comes more than once: from the kernel and from the shell. `nohup` has it ignored.
    """
    event = threading.Event()
    if stop_was_asked():  # while the run was set up, but nobody heard
        event.set()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if previous[signal.SIGHUP] is signal.SIG_IGN:
        del previous[signal.SIGHUP]

    def remember(number: int, frame: FrameType | None) -> None:
        event.set()
        if number != signal.SIGHUP:
            signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, remember)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""What a run tells while it runs: scalars, tables and the terminal, fed from a session at the loop's cadence."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from rlplastic.command_line import flatten, within
from rlplastic.config import BUDGETS, HANDLING
from rlplastic.envs.base import Observation
from rlplastic.errors import LogWriteError
from rlplastic.evaluation import Evaluation, evaluate
from rlplastic.plasticity.replay_ratio import Decision
from rlplastic.session import Session
from rlplastic.terminal import Moment, Status, View
from rlplastic.time_profile import LEARNING
from rlplastic.tracking import SECTIONS, EvaluationRow, TimingRow, Tracker

RECENT_EPISODES = 100


class Reporter:
    """Logs, evaluates and saves on behalf of the loop; nothing here changes what is learned.

    A log that cannot be written is told once and ends nothing: what is missing is kept, and written when that is
    possible again.
    """

    def __init__(self, session: Session, tracker: Tracker, view: View) -> None:
        self.session, self.tracker, self.view = session, tracker, view
        self.last_evaluation: Evaluation | None = None
        self._shown_evaluation = tracker.last_evaluation()
        self._recent: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._logged_transitions = session.progress.transitions
        self._logged_updates = session.agent.updates
        self._last_move = 0
        self._unwritten = False
        self._finished = False
        view.watch(self._moment, self._status(None, None, {}))

    def _moment(self) -> Moment:
        """Called by the view's thread: it reads plain numbers, which waits for no device and moves nothing."""
        session, progress = self.session, self.session.progress
        phase = "learning"
        if self._finished:
            phase = "finishing"
        elif progress.transitions < session.replay_ratio.minimum:
            phase = "collecting"
        elif session.compiling:
            phase = "compiling"
        return Moment(phase, progress.transitions, progress.train_seconds / 60, session.agent.updates)

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """Turn a log that cannot be written into one warning, until it can be written again."""
        try:
            yield
        except LogWriteError as error:
            if not self._unwritten:
                self.view.warn(f"{error}: meanwhile the run goes on, and what is missing is kept")
            self._unwritten = True
        else:
            if self._unwritten:
                self.view.note("logs are written again; nothing is missing")
            self._unwritten = False

    @property
    def unlogged(self) -> bool:
        """Whether there is something since the last log, be it of an earlier attempt."""
        return bool(self.session.metrics) or self.session.progress.transitions > self._logged_transitions

    def log(self) -> None:
        """Scalars since the last log, a row of timing.csv, and the terminal's view."""
        session, progress = self.session, self.session.progress
        means = session.metrics.pop()
        session.guard.check_means(means)
        scalars = means | self._episodes() | self._state(learned=bool(means))
        session.watch.lap("log")
        sections = session.watch.pop()
        total = max(sum(sections.values()), 1e-9)
        training = max(total - sections.get("evaluate", 0.0), 1e-9)
        sections["learn"] = sum(sections.get(name, 0.0) for name in LEARNING)
        fractions = {f"fraction_{name}": sections.get(name, 0.0) / total for name in SECTIONS}
        transitions = progress.transitions - self._logged_transitions
        updates = session.agent.updates - self._logged_updates
        env_rate, update_rate = transitions / training, updates / training
        self._logged_transitions, self._logged_updates = progress.transitions, session.agent.updates
        if transitions:
            assert session.config.replay.batch_size, "resolve the configuration first"
            batch = session.config.replay.batch_size * session.group.size
            scalars |= {
                "train/updates_per_transition": updates / transitions,
                "train/samples_per_transition": updates * batch / transitions,
            }
        scalars |= {"speed/env_steps_per_s": env_rate, "speed/updates_per_s": update_rate}
        scalars |= {f"speed/{name}": part for name, part in fractions.items()}
        wall = session.watch.elapsed
        row = TimingRow(progress.transitions, session.agent.updates, wall, progress.train_seconds, **fractions)
        with self._logging():
            self.tracker.scalars(progress.transitions, scalars)
        with self._logging():
            self.tracker.timing(row)
        self.view.update(self._status(env_rate, update_rate, means))
        session.watch.lap("log")

    def _episodes(self) -> dict[str, float]:
        """Returns and lengths of the training episodes that ended since the last log; nothing without any."""
        returns, lengths = self.session.finished_episodes()
        if not returns:
            return {}
        self._recent.extend(returns)
        return {"train/return": float(np.mean(returns)), "train/length": float(np.mean(lengths))}

    def _state(self, learned: bool) -> dict[str, float]:
        """Where the learner, the replay and the budget stand."""
        session = self.session
        norms = {name: float(value) for name, value in session.agent.norms().items()} if learned else {}
        return norms | {
            "replay/reward_scale": float(session.agent.reward_scale),
            "replay/transitions": session.replay.transitions,
            "train/budget_used": session.budget.used(session.progress),
            "train/replay_ratio": session.replay_ratio.ratio,
        }

    def _status(self, env_rate: float | None, update_rate: float | None, means: dict[str, float]) -> Status:
        session, row = self.session, self._shown_evaluation
        return Status(
            step=session.progress.transitions,
            minutes=session.progress.train_seconds / 60,
            env_steps=session.budget.env_steps,
            max_minutes=session.budget.max_minutes,
            updates=session.agent.updates,
            env_steps_per_s=env_rate,
            updates_per_s=update_rate,
            replay_ratio=session.replay_ratio.ratio,
            train_return=float(np.mean(self._recent)) if self._recent else None,
            train_episodes=len(self._recent),
            eval_return=row.return_mean if row else None,
            eval_ci95=(row.return_ci95_high - row.return_ci95_low) / 2 if row else None,
            critic_loss=means.get("loss/critic"),
            alpha=means.get("policy/alpha"),
        )

    def paced(self, decision: Decision) -> None:
        """What became of the replay ratio, and why; the terminal hears of it when the direction changes."""
        session, step = self.session, self.session.progress.transitions
        assert session.pacer is not None
        word = {1: "rises", 0: "stays", -1: "falls"}[decision.move]
        told = f"replay ratio {word}, {decision.ratio:.4g}: {decision.reason}"
        readings = session.pacer.readings
        scalars = {f"pace/{name}": value for name, value in readings.items()} | {"pace/move": decision.move}
        if decision.worse:
            scalars["pace/worse"] = max(decision.worse.values())
        record = {"event": "replay_ratio", "updates": session.agent.updates, **asdict(decision), "readings": readings}
        with self._logging():
            self.tracker.finding(step, record, scalars, told)
        if decision.move not in (0, self._last_move):
            self._last_move = decision.move
            self.view.note(f"step {step:,}: {told}")
        session.watch.lap("log")

    def evaluate(self, episodes: int) -> Evaluation:
        """Deterministic returns on environments of their own, into eval.csv and TensorBoard."""
        session, step = self.session, self.session.progress.transitions
        act: Callable[[Observation], NDArray[np.float32]] = session.agent.act
        with self.view.during("evaluating"):
            result = evaluate(
                act, session.config.env, seed=session.config.seed, episodes=episodes, index=step, transitions=step
            )
        self.last_evaluation = result
        row = EvaluationRow.of(step, session.agent.updates, result)
        self._shown_evaluation = row
        with self._logging():
            self.tracker.evaluation(row)
        self.view.note(
            f"evaluation at step {step:,}: return {row.return_mean:.5g}, 95 % interval "
            f"[{row.return_ci95_low:.5g}, {row.return_ci95_high:.5g}] "
            f"over {episodes} episodes"
        )
        session.watch.lap("evaluate")
        return result

    def tell_findings(self) -> None:
        """What the plasticity monitor found since the last call; decisions are told on the terminal, too."""
        session, step = self.session, self.session.progress.transitions
        for event in session.watcher.pop_events() if session.watcher is not None else ():
            with self._logging():
                self.tracker.finding(step, event.record, event.scalars, event.sentence)
            with self._logging():
                self.tracker.histograms(step, event.weights)
            if event.sentence:
                self.view.note(f"plasticity at step {step:,}: {event.sentence}")

    def save(self, finished: bool = False) -> None:
        """A checkpoint that the logs agree with; see `Session.save` for the errors.

        Raises:
            LogWriteError: a finished run's logs cannot be written; unfinished as it then is, rerunning it writes them.
        """
        with self.view.during("saving"):
            with self._logging():
                if finished:
                    settings = flatten(asdict(self.session.config))
                    # TensorBoard shows the first settings of a run, and a larger budget may continue it.
                    told = {key: value for key, value in settings.items() if not within(key, (*BUDGETS, *HANDLING))}
                    self.tracker.hyperparameters(self.session.progress.transitions, told, "eval/return_mean")
                self.tracker.flush()
            if finished and self._unwritten:
                raise LogWriteError(
                    "the last logs are not written: make that possible and rerun the command, which goes on from the "
                    "last checkpoint"
                )
            self.session.save(self.session.directory.log_lengths(), finished)
        self._finished = finished
        self.session.watch.lap("checkpoint")


class Follower:
    """What a rank other than the first has instead: it takes part in saving, and tells nothing but warnings."""

    last_evaluation: Evaluation | None = None
    unlogged = False

    def __init__(self, session: Session, view: View) -> None:
        self.session, self.view = session, view

    def log(self) -> None:
        """Begin new means and times where the first rank does, give it episodes, and stop where it does at a NaN."""
        self.session.guard.check_means(self.session.metrics.pop())
        self.session.finished_episodes()
        self.session.watch.pop()

    def tell_findings(self) -> None:
        """The monitor finds the same on the first rank, which tells it."""
        if self.session.watcher is not None:
            self.session.watcher.pop_events()

    def paced(self, decision: Decision) -> None:
        """The pacer decides the same on the first rank, which tells it."""

    def evaluate(self, episodes: int) -> None:
        """The first rank evaluates; the others wait for it in the next message."""

    def save(self, finished: bool = False) -> None:
        """This rank's part of a checkpoint; see `Session.save` for the errors."""
        self.session.save({}, finished)

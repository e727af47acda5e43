"""What a run tells while it runs: scalars, tables and the terminal, fed from a session at the loop's cadence."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rlplastic.envs.base import Observation
from rlplastic.evaluation import Evaluation, evaluate
from rlplastic.session import Session
from rlplastic.terminal import Status, View
from rlplastic.tracking import SECTIONS, EvaluationRow, TimingRow, Tracker

RECENT_EPISODES = 100


class Reporter:
    """Logs, evaluates and saves on behalf of the loop; nothing here changes what is learned."""

    def __init__(self, session: Session, tracker: Tracker, view: View) -> None:
        self.session, self.tracker, self.view = session, tracker, view
        self.last_evaluation: Evaluation | None = None
        self._recent: deque[float] = deque(maxlen=RECENT_EPISODES)
        self._logged_transitions = session.progress.transitions
        self._logged_updates = session.agent.updates

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
        fractions = {f"fraction_{name}": sections.get(name, 0.0) / total for name in SECTIONS}
        env_rate = (progress.transitions - self._logged_transitions) / training
        update_rate = (session.agent.updates - self._logged_updates) / training
        self._logged_transitions, self._logged_updates = progress.transitions, session.agent.updates
        scalars |= {"speed/env_steps_per_s": env_rate, "speed/updates_per_s": update_rate}
        self.tracker.scalars(
            progress.transitions, scalars | {f"speed/{name}": part for name, part in fractions.items()}
        )
        wall = session.watch.elapsed
        self.tracker.timing(
            TimingRow(progress.transitions, session.agent.updates, wall, progress.train_seconds, **fractions)
        )
        self.view.update(self._status(env_rate, update_rate, means))
        session.watch.lap("log")

    def _episodes(self) -> dict[str, float]:
        """Returns and lengths of the training episodes that ended since the last log; nothing without any."""
        episodes = self.session.episodes.pop_finished()
        if not len(episodes.returns):
            return {}
        self._recent.extend(episodes.returns.tolist())
        return {"train/return": float(episodes.returns.mean()), "train/length": float(episodes.lengths.mean())}

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

    def _status(self, env_rate: float, update_rate: float, means: dict[str, float]) -> Status:
        session, evaluation = self.session, self.last_evaluation
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
            eval_return=evaluation.mean if evaluation else None,
            eval_ci95=(evaluation.ci95[1] - evaluation.ci95[0]) / 2 if evaluation else None,
            critic_loss=means.get("loss/critic"),
            alpha=means.get("policy/alpha"),
        )

    def evaluate(self, episodes: int) -> Evaluation:
        """Deterministic returns on environments of their own, into eval.csv and TensorBoard."""
        session, step = self.session, self.session.progress.transitions
        act: Callable[[Observation], NDArray[np.float32]] = session.agent.act
        result = evaluate(act, session.config.env, seed=session.config.seed, episodes=episodes, index=step)
        self.last_evaluation = result
        low, high = result.ci95
        row = EvaluationRow(
            step, session.agent.updates, episodes, result.mean, result.std, low, high, float(np.mean(result.lengths))
        )
        self.tracker.evaluation(row)
        self.view.note(
            f"evaluation at step {step:,}: return {result.mean:.5g}, 95 % interval [{low:.5g}, {high:.5g}] "
            f"over {episodes} episodes"
        )
        session.watch.lap("evaluate")
        return result

    def save(self, finished: bool = False) -> None:
        """A checkpoint that the logs agree with; see `Session.save` for the errors."""
        self.tracker.flush()
        self.session.save(self.session.directory.log_lengths(), finished)
        self.session.watch.lap("checkpoint")

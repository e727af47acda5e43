"""Which rows are transitions, and the return and length of every finished episode, whatever the autoreset mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlplastic.envs.base import Array, AutoresetMode, Step


class FinishedEpisodes(NamedTuple):
    """Episodes in the order of their ends; ties in the order of environments. All arrays are (episodes,).

    returns: float64, undiscounted; lengths: int64, transitions; terminated: bool, False where only the time limit ended
    the episode; environments: int64.
    """

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]
    terminated: NDArray[np.bool_]
    environments: NDArray[np.int64]


_NONE = FinishedEpisodes(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0, np.int64))


class EpisodeStatistics:
    """Follows ``num_envs`` environments step by step."""

    def __init__(self, num_envs: int, autoreset: AutoresetMode) -> None:
        self._next_step = autoreset is AutoresetMode.NEXT_STEP
        self._returns = np.zeros(num_envs, np.float64)
        self._lengths = np.zeros(num_envs, np.int64)
        self._after_done = np.zeros(num_envs, np.bool_)
        self._finished: list[FinishedEpisodes] = []
        self.ended = _NONE.returns
        """Returns of the episodes that ended in the newest vector step."""

    @property
    def active(self) -> NDArray[np.bool_]:
        """(N,) bool: where the next action will be obeyed; under NEXT_STEP it is ignored after a done."""
        return ~self._after_done

    def observe(self, step: Step) -> NDArray[np.bool_]:
        """Add one vector step; returns (N,) bool, True where the row is a transition.

        Under NEXT_STEP the row after a done is the reset, not a transition; under SAME_STEP every row is one.
        """
        valid = ~self._after_done
        np.add(self._returns, step.reward, out=self._returns, where=valid)
        self._lengths += valid
        done = (step.terminated | step.truncated) & valid
        self.ended = self._returns[done]
        if done.any():
            (ended,) = np.nonzero(done)
            self._finished.append(
                FinishedEpisodes(self._returns[ended], self._lengths[ended], step.terminated[ended], ended)
            )
            self._returns[ended] = 0.0
            self._lengths[ended] = 0
        if self._next_step:
            self._after_done = done
        return valid

    def pop_finished(self) -> FinishedEpisodes:
        """The episodes that ended since the last call."""
        parts, self._finished = self._finished, []
        return FinishedEpisodes(*(np.concatenate(column) for column in zip(_NONE, *parts, strict=True)))

    def restart(self) -> None:
        """The environments were built anew: episodes in progress are dropped and the next row is a transition."""
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self._after_done = np.zeros_like(self._after_done)

    def state_dict(self) -> dict[str, Array]:
        """Everything needed to go on exactly; arrays only."""
        finished = self.pop_finished()
        self._finished = [finished]
        return {
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "after_done": self._after_done.copy(),
            **{f"finished_{name}": array for name, array in finished._asdict().items()},
        }

    def load_state_dict(self, state: Mapping[str, Array]) -> None:
        """Go on from ``state_dict``."""
        self._returns = np.array(state["returns"], np.float64)
        self._lengths = np.array(state["lengths"], np.int64)
        self._after_done = np.array(state["after_done"], np.bool_)
        self._finished = [FinishedEpisodes(*(np.array(state[f"finished_{name}"]) for name in FinishedEpisodes._fields))]

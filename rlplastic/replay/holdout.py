"""Which episodes are kept from training, for validation: a share of whole episodes, chosen by key.

Whether an episode is held out is a function of (seed, rank, column, number of the episode in that column): the choice
depends on nothing that happens in it, and needs no state. n-step returns never reach across episodes, so no held-out
row leaks into a training batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlplastic import seeding


@dataclass(frozen=True)
class Holdout:
    """A share of episodes that training never samples."""

    share: float
    """In (0, 1)."""
    seed: int
    rank: int = 0

    def takes(self, column: int, episode: int) -> bool:
        """Whether episode number ``episode`` (from 0) of a column is held out; a column's first one never is.

        So training has something to sample as soon as there is anything.
        """
        draw = seeding.key("holdout", self.seed, self.rank, column, episode, bits=53) / 2**53
        return episode > 0 and draw < self.share

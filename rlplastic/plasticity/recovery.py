"""What an intervention cost in return, and whether the return came back: the window after a commit.

Dip depth is how far the smoothed training return fell below what it was before; dip area is the sum over updates of
what was missing; recovery takes until the smoothed return first reaches the old one. (Stability-gap measures, De Lange
et al., arXiv 2205.13452, with returns for accuracies.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

SMOOTHED = 5
"""Episodes whose mean is a point of the smoothed return."""
LONGEST = 2
"""Where too few episodes have ended, the window lasts this many times as long, and then no longer."""


@dataclass
class Recovery:
    """The window that follows a commit.

    Args:
        since: the update of the commit.
        window: updates.
        before: mean return of the last training episodes before it; None where there was none.
        margin: share of it that may be missing at the end.
    """

    since: int
    window: int
    before: float | None
    margin: float
    returns: list[float] = field(default_factory=list)
    """Of the training episodes that ended in the window."""
    at: list[int] = field(default_factory=list)
    """The updates at which they ended."""

    def episode(self, updates: int, value: float) -> None:
        """A training episode ended with this return."""
        self.returns.append(value)
        self.at.append(updates)

    def is_over(self, updates: int) -> bool:
        """Whether it can be judged now, or will not be judged any better."""
        passed = updates - self.since
        enough = self.before is None or len(self.returns) >= SMOOTHED
        return passed >= self.window * (1 if enough else LONGEST)

    @property
    def level(self) -> float | None:
        """Mean return of the later half of the window; None without an episode."""
        later = self.returns[len(self.returns) // 2 :]
        return fmean(later) if later else None

    @property
    def recovered(self) -> bool:
        """Whether the return is at least (1 - margin) of before, in the direction that is worse for negative ones.

        True where it was never seen: there is nothing to go back to.
        """
        if self.before is None or self.level is None:
            return True
        return self.level >= self.before - self.margin * abs(self.before)

    def report(self) -> dict[str, float | int | None]:
        """Return before and after, dip depth, dip area, and updates until recovery (None: not within the window)."""
        found: dict[str, float | int | None] = {"return_before": self.before, "return_after": self.level}
        if self.before is None or not self.returns:
            return found | {"dip_depth": None, "dip_area": None, "updates_to_recover": None}
        smooth = [fmean(self.returns[max(0, i - SMOOTHED + 1) : i + 1]) for i in range(len(self.returns))]
        starts = [self.since, *self.at[:-1]]
        area = sum(
            max(self.before - value, 0.0) * (end - start)
            for value, start, end in zip(self.returns, starts, self.at, strict=True)
        )
        back = [at - self.since for at, value in zip(self.at, smooth, strict=True) if value >= self.before]
        return found | {
            "dip_depth": max(self.before - min(smooth), 0.0),
            "dip_area": area,
            "updates_to_recover": back[0] if back else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return asdict(self)

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> Recovery:
        """Continue from `state_dict`."""
        return cls(**state)
